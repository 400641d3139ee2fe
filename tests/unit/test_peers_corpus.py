"""How `bench.peers_corpus` classifies what a peer said, on made-up runs; no peer is needed."""

from pathlib import Path

import pytest

from bench.peers_corpus import (
    WRAPPED,
    Checked,
    Outcome,
    every_nth,
    gone,
    judge_fabric,
    judge_traincheck,
    sample_of,
    sums,
    tracked_variable,
)
from tests.corpus.marks import Expected, Marks
from tests.corpus.runner import Run

MARKS = Marks(expected=(Expected(frozenset({"DC101"}), 12),), accepted=frozenset({("DC101", 20)}))
RIGHT = Marks()


def complaint(*lines: int, script: str = "one") -> str:
    frames = "".join(f'  File "/corpus/{script}.py", line {line}, in train\n' for line in lines)
    error = "RuntimeError: You are calling the method `Net.loss()` from outside the model."
    return f"{WRAPPED}\nTraceback\n{frames}{error}"


def verdict(output: str, wrong: bool, exit_code: int = 0, marks: Marks | None = None) -> str:
    marks = marks or (MARKS if wrong else RIGHT)
    return judge_fabric("one", wrong, marks, Run(exit_code, output, 1.0)).verdict


@pytest.mark.parametrize(
    ("output", "on_line"),
    [
        (complaint(40, 12), True),
        (complaint(40, 20), True),
        (complaint(40, 13), False),
        (complaint(12, script="another_one"), False),
    ],
    ids=["marked", "accepted", "elsewhere", "in another file"],
)
def test_fabrics_error_about_a_wrong_script_is_a_find_that_leads_to_a_line_or_not(output: str, on_line: bool):
    outcome = judge_fabric("one", True, MARKS, Run(1, output, 1.0))
    assert (outcome.verdict, outcome.says, outcome.on_line) == ("found", "Net.loss()", on_line)


def test_fabrics_error_about_a_right_script_is_false():
    assert verdict(complaint(12), wrong=False, exit_code=1) == "false"


def test_a_run_that_ends_as_the_script_alone_does_is_a_miss_or_silence():
    assert verdict(WRAPPED, wrong=True) == "missed"
    assert verdict(WRAPPED, wrong=False) == "silent"
    assert (
        verdict(f"{WRAPPED}\nRuntimeError: its own", wrong=True, exit_code=1, marks=Marks(exit_code=1)) == "missed"
    )


@pytest.mark.parametrize(
    ("output", "exit_code", "reason"),
    [
        ("fine", 0, "wraps nothing with DistributedDataParallel"),
        (f"{WRAPPED}\nValueError: first\nKeyError: '_forward_module.0'", 1, "KeyError: '_forward_module.0'"),
        (WRAPPED, 3, "exit code 3 instead of 0"),
        (WRAPPED, -1, "over the time limit"),
    ],
)
def test_a_run_that_tells_nothing_about_fabric_is_not_applicable(output: str, exit_code: int, reason: str):
    for wrong, marks in ((True, MARKS), (False, RIGHT)):
        outcome = judge_fabric("one", wrong, marks, Run(exit_code, output, 1.0))
        assert (outcome.verdict, outcome.says) == ("not applicable", reason)


def test_a_mistake_is_gone_when_replicas_that_parted_stay_together_and_nothing_was_said():
    def outcomes(output: str, parted: str) -> list[Outcome]:
        return [judge_fabric(name, True, MARKS, Run(0, output, 1.0), name in parted) for name in "abc"]

    assert gone(outcomes(WRAPPED, "ab"), outcomes(WRAPPED, "b")) == ["a"]
    assert gone(outcomes(WRAPPED, "ab"), outcomes(complaint(12), "")) == []
    right = [judge_fabric("a", False, RIGHT, Run(0, WRAPPED, 1.0), parted) for parted in (True, False)]
    assert gone(right[:1], right[1:]) == []


def test_traincheck_speaks_by_violations_and_those_that_right_scripts_have_too_are_told_apart():
    wrong = Checked("wrong", True, MARKS, frozenset({"a", "b", "c"}))
    right = Checked("right", False, RIGHT, frozenset({"a", "d"}))
    clean = Checked("clean", False, RIGHT)
    missed = Checked("missed", True, MARKS)
    crashed = Checked("crashed", True, MARKS, trouble="crashes under collect")
    everything = [wrong, right, clean, missed, crashed]
    outcomes = [judge_traincheck(one, everything) for one in everything]
    assert [o.verdict for o in outcomes] == ["found", "false", "silent", "missed", "not applicable"]
    assert outcomes[0].says == "3 violated, 2 by no right script"
    assert outcomes[1].says == "2 violated, 2 by no other right script"
    assert outcomes[4].says == "crashes under collect"
    assert sums(outcomes) == ("5 scripts: found 1 (0 on the line), missed 1, false 1, silent 1, not applicable 1")


def test_the_sample_takes_turns_between_wrong_and_right_and_leaves_the_references_out(tmp_path: Path):
    def write(kind: str, name: str, source: str) -> Path:
        (tmp_path / kind).mkdir(exist_ok=True)
        path = tmp_path / kind / f"{name}.py"
        path.write_text(source)
        return path

    wrong = [write("wrong", f"w{n}", "model = DDP(net)\n") for n in range(4)]
    right = [write("right", f"r{n}", "model = DDP(net)\n") for n in range(3)]
    left_out = [
        write("right", "reference", "model = DDP(net)\n"),
        write("right", "single", "model = DDP(net)  # ranks: 1\n"),
        write("wrong", "nameless", "run(DDP(net))\n"),
    ]
    chosen = sample_of([*wrong, *right, *left_out], 2, ["reference"])
    assert [path.stem for path in chosen] == ["w0", "r0", "w2", "r1"]


def test_even_distances_and_all_when_there_are_no_more():
    paths = [Path(str(n)) for n in range(10)]
    assert [path.name for path in every_nth(paths, 3)] == ["0", "3", "6"]
    assert every_nth(paths, 20) == paths


def test_the_variable_that_collect_can_follow():
    assert tracked_variable("def main():\n    ddp = DistributedDataParallel(net, static_graph=True)") == "ddp"
    assert tracked_variable("net = Net()\nself.model = DDP(net)\nrun(DDP(net))") is None
