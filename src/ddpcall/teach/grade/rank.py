"""One rank of a graded run: `python -m ddpcall.teach.grade.rank SCRIPT`, under torchrun.

The observer is put on before the watch, the watch before the script; the script finds neither in its arguments or
its environment, and runs as it would under `ddpcall watch`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ddpcall.findings import Finding
from ddpcall.launch_environment import read_place
from ddpcall.teach.grade.observations import FACTS, FINDINGS, FactFile
from ddpcall.teach.grade.observe import RankObserver
from ddpcall.watch import session
from ddpcall.watch.options import Options
from ddpcall.watch.program.script import load_script, run_program

__all__ = ["main", "session"]


class GradingOptions(Options):
    """A watch's options under which a comment in the script silences nothing."""

    def wants(self, finding: Finding) -> bool:
        """Say yes to every finding."""
        return True


def main() -> None:
    """Run the script under observer and watch, tell how it ended, and leave as it left."""
    script, findings = sys.argv[1], Path(os.environ.pop(FINDINGS))
    facts = FactFile(Path(os.environ.pop(FACTS)), read_place().rank)
    observer = RankObserver(facts.tell)
    observer.start()
    code, error = 0, None
    try:
        # Findings are read by the grader; the exit code stays the script's own. Ranks are compared at every step.
        run_program(load_script(script), [], GradingOptions(json=findings, every=1, fail_on="never"))
    except SystemExit as stop:
        code = stop.code
        uncaught = getattr(sys, "last_value", None)
        if code == 1 and uncaught is not None:
            error = f"{type(uncaught).__name__}: {uncaught}"
    except SyntaxError as wrong:
        code, error = 1, f"SyntaxError: {wrong}"
    observer.report_end(code, error)
    facts.close()
    sys.exit(code)


if __name__ == "__main__":
    main()
