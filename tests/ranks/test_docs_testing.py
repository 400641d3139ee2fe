"""The example of docs/testing.md does what the page says, on the right call and on the wrong one."""

import re
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).parents[2] / "docs" / "testing.md"
MY_PROJECT = """
    import torch

    class MyModel(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 2)

        def forward(self, x):
            return self.linear(x)

    def compute_loss(model, x):
        return {call}.square().mean()
"""


def section(name: str) -> str:
    text = DOCUMENT.read_text()
    return re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```\n<!-- end {name} -->", text, re.DOTALL)[1]  # type: ignore[index]


def mask_figures(text: str) -> str:
    """Hide the differences, whose last digits depend on the processor."""
    return re.sub(r"\d+\.\d+", "#", text)


@pytest.mark.parametrize(("call", "outcome"), [("model(x)", "passed"), ("model.module(x)", "failed")])
def test_the_example_tells_the_call_from_the_bypass(run_user_project, call, outcome):
    files = {"my_project.py": MY_PROJECT.format(call=call), "test_my_model.py": section("example")}
    run = run_user_project(files)
    assert run.outcomes == {"test_training_step_synchronizes_gradients": outcome}, run.output
    if outcome == "failed":
        output = mask_figures(run.output)
        shown = mask_figures(section("failure")).splitlines()
        assert [line for line in shown if line != "…" and line not in output] == []


def test_the_example_is_short():
    assert len(section("example").splitlines()) < 15
