"""How a task ended on each rank, and which rank began the trouble.

When one rank fails, its peers fail a moment later with "connection closed by peer": true, and useless. The
functions here put the cause first and fold such consequences into one line each. Pure: texts in, texts out.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Ending = Literal["returned", "raised", "died", "hung", "leaked"]

# What gloo, NCCL and the TCPStore say on a rank whose *peer* went away or never came.
_PEER_TROUBLE = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|socket (closed|timeout)|timed ?out"
    r"|application timeout caused pair closure|failed to (recv|read|send)|remote process exited|recvvalue",
    re.IGNORECASE,
)
_COMMUNICATION_ERROR = re.compile(r"^(E\s+)?([\w.]*\.)?(RuntimeError|Dist\w*Error)\b")
_FRAME = re.compile(r'File "(?P<file>.+)", line (?P<line>\d+) in (?P<function>.+)')
_HARNESS = re.compile(r"/(_pytest|pluggy|ddpcall/ranks)/|/(ddpcall/pytest_plugin|runpy)\.py|<frozen |<string>")
_WAITS_FOR_PEERS = re.compile(r"/torch/(distributed|autograd/graph\.py)")


@dataclass(frozen=True)
class RankOutcome:
    """What one rank did with one task.

    Attributes:
        rank: rank in the task's process group.
        ending: `returned`, `raised`, `died` (the process ended), `hung` (still running at the timeout) or
            `leaked` (returned, but left threads or child processes behind).
        value: what the function returned, None unless it returned.
        error: one line that says what went wrong, empty if nothing did.
        details: traceback of the exception, or the Python stacks of a rank that hung.
        stdout: what the rank wrote to standard output during the task, shortened in the middle if it is long.
        stderr: the same for standard error.
        ended_s: monotonic time of the end in seconds; comparable between the ranks of one machine.
    """

    rank: int
    ending: Ending
    value: Any = None
    error: str = ""
    details: str = ""
    stdout: str = ""
    stderr: str = ""
    ended_s: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether this rank did anything but return."""
        return self.ending != "returned"


class RanksFailed(RuntimeError):
    """A task failed on at least one rank; the message shows every rank, the cause first.

    Attributes:
        outcomes: one `RankOutcome` per rank, in rank order.
    """

    def __init__(self, task: str, outcomes: Sequence[RankOutcome]) -> None:
        super().__init__(describe_failure(task, outcomes))
        self.outcomes = list(outcomes)


def is_consequence(error: str) -> bool:
    """Tell whether an error line only says that a peer went away.

    Args:
        error: "TypeOfError: message", as a traceback ends.

    Blind to: an error of the user's own that wraps the peer's trouble in another exception type.
    """
    return bool(_COMMUNICATION_ERROR.match(error) and _PEER_TROUBLE.search(error))


def split_causes(outcomes: Sequence[RankOutcome]) -> tuple[list[RankOutcome], list[RankOutcome]]:
    """Split the failed ranks into causes, earliest first, and consequences.

    Returns:
        Two lists. The first is empty only if no rank failed: where every failure looks like a consequence (all
        ranks wait in a collective, or a rank returned too early) all of them are causes.
    """
    failed = sorted((o for o in outcomes if o.failed), key=lambda o: o.ended_s)
    for is_cause in (_is_own_fault, _hangs_alone):
        if causes := [outcome for outcome in failed if is_cause(outcome)]:
            return causes, [outcome for outcome in failed if outcome not in causes]
    return failed, []


def _is_own_fault(outcome: RankOutcome) -> bool:
    stopped = outcome.ending == "hung" and outcome.error.startswith("stopped")
    return stopped or (outcome.ending != "hung" and not is_consequence(outcome.error))


def _hangs_alone(outcome: RankOutcome) -> bool:
    return outcome.ending == "hung" and not waits_for_peers(outcome.details)


def describe_failure(task: str, outcomes: Sequence[RankOutcome]) -> str:
    """Write the report of a failed task: causes in full, consequences in one line each."""
    causes, consequences = split_causes(outcomes)
    lines = [f"{task} failed on {_name_ranks(causes)} of {len(outcomes)}."]
    lines += [_describe_causes(alike) for alike in _group_alike(causes)]
    if returned := [o for o in outcomes if not o.failed]:
        lines.append(f"{_name_ranks(returned)} returned without an error.")
        if all(o.ending == "hung" or is_consequence(o.error) for o in causes):
            lines.append("So the ranks did not issue the same collectives: compare what each rank called.")
    if consequences:
        lines.append("Consequences (folded; the cause is above):")
        lines += [f"  rank {o.rank}: {o.error.splitlines()[0][:300]}" for o in consequences]
    lines += [text for outcome in consequences if (text := describe_output(outcome))]
    return "\n".join(lines)


def _group_alike(causes: Sequence[RankOutcome]) -> list[list[RankOutcome]]:
    """Group the ranks that failed with the very same message, as asserts about the whole world do."""
    groups: dict[tuple[str, str], list[RankOutcome]] = {}
    for outcome in causes:
        groups.setdefault((outcome.ending, outcome.error), []).append(outcome)
    return list(groups.values())


def _describe_causes(alike: Sequence[RankOutcome]) -> str:
    """Show the details of the first of the ranks that failed alike, and what each of them printed."""
    first = alike[0]
    headline = first.error.splitlines()[0][:150] if first.error else first.ending
    rule = f"----- {_name_ranks(alike)}: {headline} "
    parts = [rule.ljust(100, "-"), first.details.rstrip(), *(describe_output(outcome) for outcome in alike)]
    return "\n".join(part for part in parts if part)


def describe_output(outcome: RankOutcome) -> str:
    """Show what a rank printed, or nothing if it printed nothing."""
    streams = (("stdout", outcome.stdout), ("stderr", outcome.stderr))
    return "\n".join(
        f"----- rank {outcome.rank} {name}\n{text.rstrip()}" for name, text in streams if text.strip()
    )


def _name_ranks(outcomes: Sequence[RankOutcome]) -> str:
    names = ", ".join(str(outcome.rank) for outcome in sorted(outcomes, key=lambda o: o.rank))
    return f"rank {names}" if len(outcomes) == 1 else f"ranks {names}"


def describe_exit(status: int) -> str:
    """Say how a process ended, from its exit status (negative: the signal that killed it)."""
    import signal

    if status >= 0:
        return f"the process exited with status {status} before the task was done"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"the process was killed by {name}"


def shorten(text: str, limit_chars: int = 64_000) -> str:
    """Cut the middle out of a long text and say how much is missing."""
    if len(text) <= limit_chars:
        return text
    half = limit_chars // 2
    left_out = len(text) - 2 * half
    return f"{text[:half]}\n[... {left_out:,} characters left out ...]\n{text[-half:]}"


def trim_stacks(dump: str) -> str:
    """Drop the test harness's own frames and the threads left empty by that from a faulthandler dump."""
    kept: list[str] = []
    for block in re.split(r"\n(?=(?:Current thread|Thread) 0x)", dump.strip()):
        header, *frames = block.splitlines()
        frames = [frame for frame in frames if not _HARNESS.search(frame)]
        if any(_FRAME.search(frame) for frame in frames):
            kept.append("\n".join([header, *frames]))
    return "\n".join(kept)


def locate_main_thread(stacks: str) -> str:
    """Name the innermost place outside torch where the main thread is; empty if there is none.

    Source: faulthandler prints the threads youngest first, so the main thread comes last.
    """
    frames = [match for line in _main_thread(stacks) if (match := _FRAME.search(line))]
    own = next((frame for frame in frames if "/torch/" not in frame["file"]), None)
    return f"{own['function']} ({own['file']}:{own['line']})" if own else ""


def waits_for_peers(stacks: str) -> bool:
    """Tell whether the main thread stands in a collective or in a backward whose reducer waits for one."""
    frames = _main_thread(stacks)[:4]
    return any(_WAITS_FOR_PEERS.search(frame) for frame in frames)


def _main_thread(stacks: str) -> list[str]:
    blocks = re.split(r"(?m)^(?:Current thread|Thread) 0x.*$", stacks)
    return [line for line in blocks[-1].splitlines() if _FRAME.search(line)]
