"""The view as one HTML page that needs nothing else: templates escape what they are given, filters lay it out."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from ddpcall.findings import Severity
from ddpcall.lab.report.final_models import FinalModels
from ddpcall.lab.report.mixing import MixingPicture
from ddpcall.lab.report.modes import MaskStrip
from ddpcall.lab.report.series import Line, Plot
from ddpcall.lab.report.timeline import Lane, Span
from ddpcall.lab.report.truth import OverviewCell, TruthTable, VerdictCell
from ddpcall.lab.report.view import ReportView, RunView
from ddpcall.lab.report.words import MOST_RANKS_NAMED, format_number, format_share, list_by_rank, plural
from ddpcall.lab.run_directory import json_safe
from ddpcall.verdicts import VERDICTS, find_tone

TEMPLATES = Path(__file__).parent / "templates"
_LABEL_WIDTH = 0.3  # of the axis of accuracies
_KINDS = {"pre_hook", "forward", "hook", "backward", "bucket", "collective", "optimizer"}
_SEVERITY_TONES = {Severity.ERROR: "lost", Severity.WARNING: "part", Severity.NOTE: "other"}
_SECTION_TITLES = {
    "failure": "What was raised",
    "consequence": "How good the models are",
    "evidence": "Evidence",
}


def render_page(view: ReportView) -> str:
    """Return the page: one self-contained HTML document."""
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            view=view,
            several=len(view.runs) + len(view.watches) > 1,
            css=Markup((TEMPLATES / "report.css").read_text()),
            js=Markup((TEMPLATES / "report.js").read_text()),
        )
    )


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters.update(_FILTERS)
    environment.globals.update(dict[str, Any](CELL=CELL, HEAD=HEAD))
    return environment


def mark_code(text: str) -> Markup:
    """Escape a text and set what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def embed_json(value: Any) -> Markup:
    """Return JSON that can stand inside a script element: nothing in it can end the element."""
    text = json.dumps(json_safe(value), separators=(",", ":"), ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def collect_evidence(table: TruthTable) -> Markup:
    """Return what the script opens behind the cells; sections that are alike in several rows stand there once."""
    numbers: dict[Any, int] = {}
    rows = []
    for row in table.rows:
        tones = {cell.name: cell.tone for cell in row.cells}
        keys = [
            (s.name, _title(s.name), s.word, tones.get(s.name, "none"), s.expected, s.facts) for s in row.evidence
        ]
        rows.append(
            {
                "label": row.label,
                "spelling": row.spelling,
                "sections": [numbers.setdefault(key, len(numbers)) for key in keys],
            }
        )
    return embed_json({"rows": rows, "sections": list(numbers)})


def _title(section: str) -> str:
    return VERDICTS[section].title if section in VERDICTS else _SECTION_TITLES[section]


def list_sections(run: RunView) -> list[tuple[str, str]]:
    """Return anchor and name of the sections that a run has."""
    present = {
        ("failed", "Not as expected"): run.failures,
        ("comparisons", "One process"): run.comparisons,
        ("table", "Truth table"): run.table,
        ("mixing", "Who learns from whom"): run.mixing,
        ("models", "What it costs"): run.final_models,
        ("parting", "Replicas part"): run.distance or run.accuracy,
        ("timeline", "One step"): run.timelines,
        ("modes", "Batch norm and dropout"): run.modes,
        ("repeat", "Repeat it"): True,
    }
    return [section for section, there in present.items() if there]


def tick_height(plot: Plot, value: float) -> float:
    """Return how far below the top of a plot a value lies, in percent."""
    low, high = plot.ticks[0], plot.ticks[-1]
    return round(100 * (high - value) / (high - low), 3)


def draw_path(plot: Plot, line: Line) -> str:
    """Return a curve as SVG path data, in a box of 1000 × 1000."""
    first, last = plot.steps
    wide = (last - first) or 1
    points = [
        f"{1000 * (step - first) / wide:.1f} {10 * tick_height(plot, value):.1f}" for step, value in line.points
    ]
    return f"M{points[0]}h1" if len(points) == 1 else "M" + "L".join(points)


def write_value(plot: Plot, value: float) -> str:
    """Return a value as its plot reads: a share in percent, or a number."""
    return format_share(value) if plot.is_share else format_number(value)


def write_tick(plot: Plot, value: float) -> str:
    """Return the label of a tick."""
    return f"{value:.3g}" if not plot.is_share else f"{100 * value:.3g}%"


def describe_plot(plot: Plot) -> str:
    """Say in words what a plot shows: where each curve begins and ends."""
    ends = [
        f"{line.name}: {write_value(plot, line.points[0][1])} at step {line.points[0][0]}, "
        f"{write_value(plot, line.points[-1][1])} at step {line.points[-1][0]}"
        for line in plot.lines
    ]
    return f"{plot.title}, steps {plot.steps[0]} to {plot.steps[1]}. {'; '.join(ends)}."


def plot_data(plot: Plot) -> Markup:
    """Return what the step cursor needs: step, value and its text, by curve."""
    lines = [[(step, value, write_value(plot, value)) for step, value in line.points] for line in plot.lines]
    return embed_json({"steps": plot.steps, "lines": lines})


def span_left(span: Span, scale: float) -> float:
    """Return where a span begins, in percent of the whole."""
    return round(max(0.0, 100 * span.start_us / scale), 3)


def span_width(span: Span, scale: float) -> float:
    """Return how wide a span is, likewise."""
    return round(max(0.0, 100 * (span.end_us - max(span.start_us, 0.0)) / scale), 3)


def describe_span(span: Span) -> str:
    """Return what a span is, in one line."""
    more = f" ({span.detail})" if span.detail else ""
    if span.absent:
        return f"absent: {span.name}{more}"
    return f"{span.name}{more}: {span.start_us / 1000:.3f} to {span.end_us / 1000:.3f} ms"


def describe_lane(lane: Lane) -> str:
    """Return what lies on a lane, in one line."""
    shown = [describe_span(span) for span in lane.spans[:12]]
    more = [f"{len(lane.spans) - 12} more"] if len(lane.spans) > 12 else []
    return f"{lane.name}: {'; '.join([*shown, *more])}"


def describe_overview(cell: OverviewCell) -> str:
    """Return what the overview shows of a trial, in words."""
    hooks = ", ".join(f"{VERDICTS[hook.name].title} {hook.word}" for hook in cell.hooks)
    return f"gradients {cell.gradients.word}, {hooks}"


def mark_hook(hook: VerdictCell) -> str:
    """Return the class of a hook's mark."""
    return {"fired": "on", "skipped": "off"}.get(hook.word, "nothing")


def place_dots(models: FinalModels) -> list[tuple[float, str]]:
    """Return position in percent and label of each different accuracy; of many ranks, near ones share a label."""
    ranks: dict[float, list[int]] = {}
    is_crowded = len(models.accuracy or ()) > MOST_RANKS_NAMED
    for rank, accuracy in sorted(enumerate(models.accuracy or ()), key=lambda each: each[1]):
        near = next(
            (other for other in reversed(ranks) if is_crowded and accuracy - other < _LABEL_WIDTH), accuracy
        )
        ranks.setdefault(near, []).append(rank)
    return [
        (round(100 * min(max(accuracy, 0.0), 1.0), 2), _name_ranks(group)) for accuracy, group in ranks.items()
    ]


def _name_ranks(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks)) if len(ranks) <= MOST_RANKS_NAMED else f"{len(ranks)} ranks"


def write_quality(models: FinalModels) -> str:
    """Return accuracy, or else loss, by rank."""
    if models.accuracy:
        return list_by_rank(models.accuracy, format_share)
    return list_by_rank(models.loss, format_number)


def write_distances(models: FinalModels) -> str:
    """Return the distance from the synchronized run by rank."""
    return list_by_rank(models.distance, format_number) if models.distance else "–"


CELL, GAP, HEAD = 52, 12, 56  # `60–63` and `0.062` fit: of a mixing matrix, in pixels


def column_left(picture: MixingPicture, column: int) -> int:
    """Return how far from the left of a picture a column begins: a gap stands before each further backward."""
    in_block = len(picture.columns) // max(1, len(picture.blocks))
    return HEAD + CELL * column + GAP * (column // in_block)


def row_top(picture: MixingPicture, row: int) -> int:
    """Return how far from the top of a picture a row begins: the backwards' names stand above."""
    return HEAD + CELL * row + (22 if picture.blocks else 0)


def write_masks(strip: MaskStrip) -> str:
    """Return how often the masks were the same."""
    told = [same for same in strip.same if same is not None]
    return f"the same in {sum(told)} of {plural(len(told), 'step')}"


def write_kept(strip: MaskStrip) -> str:
    """Return the share that dropout kept on each rank."""
    return list_by_rank(strip.kept, format_share)


_FILTERS: dict[str, Callable[..., Any]] = {
    "prose": mark_code,
    "sections": list_sections,
    "height": tick_height,
    "path": draw_path,
    "value": write_value,
    "tick": write_tick,
    "describe": describe_plot,
    "data": plot_data,
    "left": span_left,
    "width": span_width,
    "describe_span": describe_span,
    "describe_lane": describe_lane,
    "describe_overview": describe_overview,
    "mark": mark_hook,
    "dots": place_dots,
    "quality": write_quality,
    "distances": write_distances,
    "column_left": column_left,
    "row_top": row_top,
    "masks": write_masks,
    "kept": write_kept,
    "number": format_number,
    "plural": plural,
    "evidence_data": collect_evidence,
    "gradients_cell": lambda models: VerdictCell(
        "gradients", models.gradients, find_tone("gradients", models.gradients), ""
    ),
    "known_kind": lambda kind: kind if kind in _KINDS else "unknown",
    "known_severity": lambda severity: severity if severity in list(Severity) else "note",
    "severity_tone": lambda severity: _SEVERITY_TONES.get(severity, "other"),
}


def to_json(view: ReportView) -> str:
    """Return the view model as JSON; `schema` is its version."""
    return json.dumps(json_safe(dataclasses.asdict(view)), indent=2, ensure_ascii=False) + "\n"
