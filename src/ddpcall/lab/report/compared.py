"""A page of two compared runs: the ladder, green down to the first red, and how the difference grows by step."""

from __future__ import annotations

import math
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ddpcall.compare.two_runs import TwoRuns

_WIDTH, _HEIGHT, _MARGIN = 640, 240, 40
_LOWEST = 1e-9
_COLORS = {"parameters": "#7a7a7a", "loss": "#b35c00", "gradients": "#1f6fb2", "update": "#3b8a3e"}


def render_page(result: TwoRuns, a: str, b: str) -> str:
    """Return the page: one HTML document that needs nothing else.

    Args:
        result: What `ddpcall compare` found.
        a: What run A is.
        b: What run B is.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    steps = list(result.curve)
    lines = [(what, color, _draw(result, what)) for what, color in _COLORS.items()]
    ticks = [(f"1e{power}", _height(10.0**power)) for power in range(-9, 1, 3)]
    marks = [(step, _place(step, steps)) for step in steps]
    return environment.get_template("compared.html.j2").render(
        result=result,
        runs={"A": a, "B": b},
        lines=lines,
        ticks=ticks,
        marks=marks,
        size=(_WIDTH, _HEIGHT, _MARGIN),
        is_number=lambda number: not math.isnan(number),
    )


def _draw(result: TwoRuns, what: str) -> str:
    steps = list(result.curve)
    points = [
        f"{_place(step, steps):.1f},{_height(values[what]):.1f}"
        for step, values in result.curve.items()
        if math.isfinite(values[what])
    ]
    return " ".join(points)


def _place(step: int, steps: list[int]) -> float:
    """Return where a step lies from left to right, in the order of the logarithm: the first steps matter most."""
    span = math.log2(steps[-1] - steps[0] + 1) or 1.0
    return _MARGIN + (_WIDTH - 2 * _MARGIN) * math.log2(step - steps[0] + 1) / span


def _height(difference: float) -> float:
    share = math.log10(min(max(difference, _LOWEST), 10.0) / _LOWEST) / 10
    return _HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * share
