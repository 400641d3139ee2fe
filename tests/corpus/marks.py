"""What a corpus script says must be found in it: comments beside the code, read as data.

x = m.forward(y)  # raises: DC101            this line must be named, or be where a library's line was called from
x = m.forward(y)  # raises: DC101, DC304     by both codes
x = m.forward(y)  # raises: DC101|DC104      by one of the two
loss.backward()  # or: DC101                 accepted in place of a line marked `raises: DC101`
# raises: DC201                              on a line of its own: anywhere, or at no line
# ranks: 1                                   ranks to run on (2)
# begins: 2                                  optimizer steps done before the mistake (0)
# exit: 1                                    the exit code of the script alone (0)
# hang-after: 2                              the watch's option of that name, in seconds
"""

import io
import re
import tokenize
from dataclasses import dataclass
from pathlib import Path

MARK = re.compile(r"#\s*(raises|or|ranks|begins|exit|hang-after):\s*([\w|, ]+)")


@dataclass(frozen=True)
class Expected:
    """One finding that must be made: any of `codes`, at `line` (0: anywhere)."""

    codes: frozenset[str]
    line: int

    def __str__(self) -> str:
        return "|".join(sorted(self.codes)) + (f":{self.line}" if self.line else "")


@dataclass(frozen=True)
class Marks:
    """What a script states: findings to make, other lines that are accepted, how to run it."""

    expected: tuple[Expected, ...] = ()
    accepted: frozenset[tuple[str, int]] = frozenset()
    ranks: int = 2
    begins: int = 0
    exit_code: int = 0
    hang_after: int = 60


def read_marks(script: Path) -> Marks:
    """Reads a script's marks.

    Raises:
        ValueError: an `or` line has no `raises` line with one of its codes.
    """
    source = script.read_text()
    lines = source.splitlines()
    expected: list[Expected] = []
    accepted: set[tuple[str, int]] = set()
    numbers = {"ranks": 2, "begins": 0, "exit": 0, "hang-after": 60}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        match = MARK.search(token.string) if token.type == tokenize.COMMENT else None
        if match is None:
            continue
        kind, text = match.group(1), match.group(2).strip()
        line = token.start[0]
        if kind in numbers:
            numbers[kind] = int(text)
            continue
        alone = lines[line - 1].lstrip().startswith("#")
        for part in text.split(","):
            codes = frozenset(code.strip() for code in part.split("|"))
            if kind == "raises":
                expected.append(Expected(codes, 0 if alone else line))
            else:
                accepted.update((code, line) for code in codes)
    known = {code for one in expected for code in one.codes}
    if orphans := {code for code, _ in accepted} - known:
        raise ValueError(f"{script.name}: `or:` without `raises:` for {sorted(orphans)}")
    return Marks(tuple(expected), frozenset(accepted), *numbers.values())
