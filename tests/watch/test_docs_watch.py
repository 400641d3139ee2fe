"""docs/watch.md and the README: their scripts are run, and say what the page says they say."""

import re
from pathlib import Path

import pytest

from tests.watch.launched import Launched

ROOT = Path(__file__).parents[2]
PAGES = ["docs/watch.md", "README.md"]


def block(page, name):
    """Return the code block between `<!-- name -->` and `<!-- end name -->`."""
    match = re.search(
        rf"<!-- {name} -->\n```\w+\n(.*?)```\n<!-- end {name} -->", (ROOT / page).read_text(), re.DOTALL
    )
    assert match is not None
    return match[1]


@pytest.mark.parametrize("page", PAGES)
def test_the_example_of_the_page_is_what_comes_out(page, launcher, tmp_path):
    run = Launched(launcher, tmp_path, block(page, "script"), "--its", "own", "arguments")
    first, *others = block(page, "example").splitlines()
    assert run.err.splitlines()[1:] == others
    assert run.err.splitlines()[0] in [first.replace("rank 0", f"rank {r}") for r in (0, 1)]
    assert sorted(run.codes) == [0, 1]


@pytest.mark.parametrize("page", PAGES)
def test_the_same_script_with_the_line_the_page_tells_to_write_is_silent(page, launcher, tmp_path):
    script = block(page, "script").replace("ddp.module(", "ddp(")
    assert script != block(page, "script")
    run = Launched(launcher, tmp_path, script, "--its", "own", "arguments")
    assert run.err.startswith(
        "ddpcall watch: no findings: 1 DDP model, 10 steps on 2 of 2 ranks, compared 10 times; 10 steps measured: "
        "every rank used the mean of both ranks' gradients (largest residual "
    )
    assert run.err.count("\n") == 1
    assert (run.codes, run.found) == ([0, 0], [])
