"""docs/watch.md: its script is run, and says what the page says it says."""

import re
from pathlib import Path

from tests.watch.launched import Launched

PAGE = Path(__file__).parents[2] / "docs" / "watch.md"


def block(name):
    """Return the code block between `<!-- name -->` and `<!-- end name -->`."""
    match = re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```\n<!-- end {name} -->", PAGE.read_text(), re.DOTALL)
    assert match is not None
    return match[1]


def test_the_example_of_the_page_is_what_comes_out(launcher, tmp_path):
    run = Launched(launcher, tmp_path, block("script"), "--its", "own", "arguments")
    assert run.err.splitlines()[1:] == block("example").splitlines()[1:]
    assert run.err.splitlines()[0] in [
        block("example").splitlines()[0].replace("rank 0", f"rank {r}") for r in (0, 1)
    ]
    assert sorted(run.codes) == [0, 1]


def test_the_same_script_with_the_line_the_page_tells_to_write_is_silent(launcher, tmp_path):
    script = block("script").replace("ddp.module(", "ddp(")
    assert script != block("script")
    run = Launched(launcher, tmp_path, script, "--its", "own", "arguments")
    assert run.err.startswith(
        "ddpcall watch: no findings: 1 DDP model, 10 steps on 2 of 2 ranks, compared 10 times; 10 steps measured: "
        "every rank used the mean of both ranks' gradients (largest residual "
    )
    assert run.err.count("\n") == 1
    assert (run.codes, run.found) == ([0, 0], [])
