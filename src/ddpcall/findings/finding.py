"""What a kind of finding is: code, severity, why it matters, the line to write; and one finding of a run."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

DDP_SOURCE = "https://github.com/pytorch/pytorch/blob/main/torch/nn/parallel/distributed.py"
DDP_DOCS = "https://docs.pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html"
MODULE_DOCS = "https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html"
FSDP_DOCS = "https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html"
COMPILE_DOCS = "https://docs.pytorch.org/docs/stable/generated/torch.compile.html"
ISSUE = "https://github.com/pytorch/pytorch/issues/"


class Severity(StrEnum):
    """How much harm: `error` trains another model, `warning` loses something, `note` is worth knowing."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"

    @property
    def rank(self) -> int:
        """Order: 0 for a note, 2 for an error."""
        return (Severity.NOTE, Severity.WARNING, Severity.ERROR).index(self)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One kind of finding.

    Attributes:
        code: DC and three digits: 1xx gradients, 2xx replicas, 3xx what a call loses on one rank, 4xx data and
            randomness, 5xx control flow.
        name: The code in words.
        severity: The usual severity; a finding may have a lower one.
        title: One line.
        why: What it does to the trained model.
        wrong: A line that raises it.
        fix: What to write instead.
        silent_when: The harmless look-alikes, on which it stays silent.
        blind_to: What it cannot see.
        links: Where the behavior is documented, or was met.
    """

    code: str
    name: str
    severity: Severity
    title: str
    why: str
    wrong: str
    fix: str
    silent_when: str
    blind_to: str
    links: tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """A line: its file, its number from 1, the function it stands in."""

    file: str
    line: int
    function: str


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something wrong in a user's run.

    Attributes:
        code: The rule's code.
        name: The rule's name.
        severity: error, warning or note.
        message: What happened, with numbers.
        file: The user's file, or an installed library's; empty where no line can be told.
        line: From 1; 0 where no line can be told.
        function: The function the line stands in.
        ranks: The ranks on which it was seen.
        step: The first optimizer step (from 1) it was seen in.
        parameters: Parameters or buffers concerned, by name.
        cause: One word for the mechanism: the event's kind.
        fix: The line to write instead.
        count: How often it was seen on the rank that saw it most.
        called_from: The user's line that led to this one, where it is an installed library's or a hook's helper.
    """

    code: str
    name: str
    severity: str
    message: str
    file: str
    line: int
    function: str
    ranks: tuple[int, ...]
    step: int
    parameters: tuple[str, ...]
    cause: str
    fix: str
    count: int = 1
    called_from: Place | None = None
