"""The watch on every script of the corpus: the marked mistakes on their lines, and nothing else."""

import pytest

from tests.corpus.score import corpus_scripts, score_script
from tests.watch.launched import ForkedLauncher


@pytest.fixture(scope="module")
def launcher():
    with ForkedLauncher() as launcher:
        yield launcher


@pytest.mark.parametrize("script", corpus_scripts(), ids=lambda script: f"{script.parent.name}/{script.stem}")
def test_watch_names_the_marked_mistakes_and_nothing_else(script, launcher):
    score = score_script(script, launcher=launcher)
    assert score.good, score
