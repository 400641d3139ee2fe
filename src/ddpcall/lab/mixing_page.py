"""Mixing matrices as images for docs/mixing_matrix.md, drawn from a run; a test compares them with a fresh one.

python -m ddpcall.lab.mixing_page docs/mixing_matrix.md RUN_DIR     the run of experiment=mixing_matrix
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from ddpcall.lab.report.load import load_run
from ddpcall.lab.report.mixing import MixingPicture, build_pictures
from ddpcall.lab.report.page import CELL, HEAD, column_left, row_top

IMAGES = Path("images", "mixing")
_MOST_UNEXPLAINED = 1e-3  # beyond it the matrix does not say what the ranks used
_PAPER, _PANEL, _MORE, _INK, _SOFT = "#fdfdfc", "#f4f5f7", "#2f45b8", "#15181e", "#525b68"


@dataclass(frozen=True)
class Drawing:
    """One measured matrix: the image, and the same in words for those who do not see it."""

    svg: str
    words: str


def read_drawings(run: Path) -> dict[str, Drawing]:
    """Draw the matrices of a run, by the wrapper's name or else that of the window it stands in."""
    drawings = {}
    for trial in load_run(run).trials:
        mixing = trial.evidence.mixing if trial.evidence is not None else None
        found = build_pictures([trial])
        if mixing is None or found is None:
            continue
        if all(value is not None and value <= _MOST_UNEXPLAINED for value in mixing.residual):
            name = trial.cell.wrapper if trial.cell.window == "plain" else trial.cell.window
            drawings[name] = Drawing(draw(found.pictures[0]), describe(found.pictures[0]))
    return drawings


def describe(picture: MixingPicture) -> str:
    """Return a matrix as text, a row a rank."""
    rows = [
        f"rank {name} uses {', '.join(entry.text for entry in entries)}"
        for name, entries in zip(picture.rows, picture.entries, strict=True)
    ]
    return f"{picture.word}: {'; '.join(rows)}"


def draw(picture: MixingPicture) -> str:
    """Return a matrix as an SVG document, on paper of its own."""
    width = column_left(picture, len(picture.columns) - 1) + CELL + 8
    height = row_top(picture, len(picture.rows)) + 8
    in_block = len(picture.columns) // max(1, len(picture.blocks))
    parts = [f'<rect width="{width}" height="{height}" rx="8" fill="{_PAPER}"/>']
    for number, name in enumerate(picture.blocks):
        parts.append(_text(column_left(picture, number * in_block), 16, name, _SOFT, "start"))
    for number, name in enumerate(picture.columns):
        center = column_left(picture, number) + CELL // 2 - 1
        parts.append(_text(center, row_top(picture, 0) - 12, name, _SOFT))
    for row, (name, entries) in enumerate(zip(picture.rows, picture.entries, strict=True)):
        top = row_top(picture, row)
        parts.append(_text(HEAD - 8, top + 27, name, _SOFT, "end"))
        for column, entry in enumerate(entries):
            left = column_left(picture, column)
            box = f'<rect x="{left}" y="{top}" width="{CELL - 2}" height="{CELL - 2}" rx="4"'
            parts.append(f'{box} fill="{_PANEL}"/>{box} fill="{_MORE}" fill-opacity="{entry.strength:.2g}"/>')
            ink = _PAPER if entry.strength > 0.5 else _INK if entry.value else _SOFT
            parts.append(_text(left + CELL // 2 - 1, top + 27, entry.text, ink))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
    style = 'font-family="system-ui, sans-serif" font-size="14"'
    return "\n".join([f'{head} viewBox="0 0 {width} {height}" {style}>', *parts, "</svg>\n"])


def _text(x: int, y: int, text: str, color: str, anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{color}">{text}</text>'


def fill_page(text: str, drawings: dict[str, Drawing]) -> str:
    """Put each drawing between its markers: `<!-- mixing NAME -->` and `<!-- end mixing -->`.

    Raises:
        KeyError: The page asks for a matrix that the run has not.
    """

    def image(match: re.Match[str]) -> str:
        name = match.group(1)
        place = (IMAGES / f"{name}.svg").as_posix()
        return f"<!-- mixing {name} -->\n![{drawings[name].words}]({place})\n<!-- end mixing -->"

    return re.sub(r"<!-- mixing (\w+) -->.*?<!-- end mixing -->", image, text, flags=re.DOTALL)


def main() -> None:
    """Write the images beside a page, and their descriptions into it."""
    page, run = map(Path, sys.argv[1:])
    drawings = read_drawings(run)
    page.write_text(fill_page(page.read_text(), drawings))
    (page.parent / IMAGES).mkdir(parents=True, exist_ok=True)
    for name, drawing in drawings.items():
        (page.parent / IMAGES / f"{name}.svg").write_text(drawing.svg)


if __name__ == "__main__":
    main()
