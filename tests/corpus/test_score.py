"""The scorer's own logic on made-up findings, and a handful of scripts for truth."""

import json
from pathlib import Path

import pytest

from ddpcall.findings import CATALOGUE
from tests.corpus.harm import compare as compare_ranks
from tests.corpus.harm import witness_script
from tests.corpus.marks import Expected, Marks, read_marks
from tests.corpus.runner import Run, run_on_ranks
from tests.corpus.score import (
    CORPUS,
    Found,
    Score,
    compare,
    corpus_scripts,
    put_lookup_first,
    read_findings,
    score_script,
    summary,
    trouble_of,
)

BYPASS = Expected(frozenset({"DC101"}), 12)
MARKS = Marks(expected=(BYPASS,), accepted=frozenset({("DC101", 20)}))


def test_the_lookup_comes_before_the_first_import_and_no_line_moves():
    source = (
        '"""A docstring,\nimport nothing."""\nfrom __future__ import annotations\n\nimport torch  # first\nx = 1\n'
    )
    changed = put_lookup_first(source)
    assert changed.splitlines()[4] == "import tests.corpus.lookup_first; import torch  # first"
    assert changed.replace("import tests.corpus.lookup_first; ", "") == source


@pytest.mark.parametrize(
    ("findings", "exact", "elsewhere", "missed", "false"),
    [
        ([], 0, 0, 1, 0),
        ([Found("DC101", 12)], 1, 0, 0, 0),
        ([Found("DC101", 20)], 0, 1, 0, 0),
        ([Found("DC101", 12), Found("DC101", 20)], 1, 0, 0, 0),
        ([Found("DC101", 13)], 0, 0, 1, 1),
        ([Found("DC102", 12)], 0, 0, 1, 1),
        ([Found("DC101", 12), Found("DC201", 0)], 1, 0, 0, 1),
    ],
)
def test_findings_are_matched_by_code_and_line(findings, exact, elsewhere, missed, false):
    score = compare("script", MARKS, findings)
    assert [len(part) for part in (score.exact, score.elsewhere, score.missed, score.false)] == [
        exact,
        elsewhere,
        missed,
        false,
    ]
    assert score.good == (missed == 0 and false == 0)


def test_script_without_marks_must_stay_silent():
    assert compare("right", Marks(), []).good
    assert not compare("right", Marks(), [Found("DC207", 0)]).good


def test_finding_anywhere_is_accepted_when_no_line_is_marked():
    marks = Marks(expected=(Expected(frozenset({"DC201"}), 0),))
    assert compare("script", marks, [Found("DC201", 33)]).good
    assert compare("script", marks, [Found("DC201", 0)]).good


def test_finding_two_steps_after_the_mistake_began_is_late():
    marks = Marks(expected=(BYPASS,), begins=3)
    assert compare("script", marks, [Found("DC101", 12, step=5)]).good
    assert compare("script", marks, [Found("DC101", 12, step=6)]).late


@pytest.mark.parametrize(
    ("exit_code", "expected_exit", "findings", "trouble"),
    [
        (0, 0, [], ""),
        (1, 0, [Found("DC101", 12)], ""),
        (1, 0, [], "exit code 1 instead of 0"),
        (1, 1, [], ""),
        (0, 1, [], "exit code 0 instead of 1"),
        (-1, 0, [], "ran into the time limit"),
        (-9, 0, [Found("DC101", 12)], "died of signal 9"),
    ],
)
def test_endings_of_watched_runs(exit_code, expected_exit, findings, trouble):
    assert trouble_of(Run(exit_code, "", 1.0), Marks(exit_code=expected_exit), findings) == trouble


def test_summary_counts_over_all_scripts():
    scores = [
        compare("a", MARKS, [Found("DC101", 12)]),
        compare("b", MARKS, [Found("DC101", 20), Found("DC301", 1)]),
        Score("c", missed=(BYPASS,), trouble="no findings file"),
    ]
    assert summary(scores) == (
        "3 scripts: found 2 of 3 (1 on another accepted line), missed 1, false 1, late 0, troubled runs 1"
    )


def test_line_of_another_file_is_no_line_of_the_script(tmp_path: Path):
    file = tmp_path / "findings.json"
    records = [
        {"code": "DC101", "file": "/somewhere/script.py", "line": 4, "step": 1},
        {"code": "DC101", "file": "/somewhere/other.py", "line": 4},
        {"code": "DC201", "file": None, "line": None},
        {"code": "DC101", "file": "/lib/loop.py", "line": 4, "called_from": {"file": "/a/script.py", "line": 9}},
    ]
    file.write_text(json.dumps({"schema": 1, "findings": records}))
    here, elsewhere, nowhere, called = read_findings(file, Path("script.py"))
    assert (here, elsewhere, nowhere) == (Found("DC101", 4, 1), Found("DC101", 0), Found("DC201", 0))
    assert called == Found("DC101", 9)


def test_findings_of_another_schema_are_refused(tmp_path: Path):
    file = tmp_path / "findings.json"
    file.write_text(json.dumps({"schema": 2, "findings": []}))
    with pytest.raises(ValueError, match="schema 2"):
        read_findings(file, Path("script.py"))


def test_marks_are_read_from_comments(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(
        '"""raises: DC999 in a docstring is prose."""\n'
        "# begins: 2\n# ranks: 3\n# exit: 1\n# raises: DC201\n"
        "x = 1  # raises: DC101, DC304\n"
        "y = 2  # raises: DC102|DC103\n"
        "z = '# raises: DC105'  # or: DC101\n"
    )
    marks = read_marks(script)
    assert [str(e) for e in marks.expected] == ["DC201", "DC101:6", "DC304:6", "DC102|DC103:7"]
    assert marks.accepted == {("DC101", 8)}
    assert (marks.begins, marks.ranks, marks.exit_code) == (2, 3, 1)


def test_accepted_line_without_an_expectation_is_refused(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text("x = 1  # or: DC101\n")
    with pytest.raises(ValueError, match="DC101"):
        read_marks(script)


def test_corpus_covers_every_code_and_says_where_each_script_comes_from():
    wrong = sorted((CORPUS / "wrong").glob("*.py"))
    right = sorted((CORPUS / "right").glob("*.py"))
    codes = {code for path in wrong for expected in read_marks(path).expected for code in expected.codes}
    assert codes == set(CATALOGUE)
    assert len(wrong) >= 34
    assert len(right) >= 24
    assert [path.name for path in wrong if "Source: " not in path.read_text()] == []
    assert [path.name for path in wrong if not read_marks(path).expected] == []
    assert [path.name for path in right if read_marks(path).expected] == []
    assert corpus_scripts() == wrong + right


def test_launch_that_hangs_is_ended(tmp_path: Path):
    script = tmp_path / "hangs.py"
    script.write_text("import threading\nprint('started', flush=True)\nthreading.Event().wait()\n")
    run = run_on_ranks(1, [str(script)], timeout_s=2.0)
    assert run.exit_code == -1
    assert "started" in run.output


def test_witness_tells_first_differing_step():
    def rank(gradients: list[str]) -> dict:
        steps = [{"gradients": g, "parameters": "p", "settings": "s", "modes": "m", "rng": g} for g in gradients]
        return {"steps": steps, "inputs": gradients, "buffers": []}

    assert compare_ranks([rank(["a", "b"]), rank(["a", "c"])]) == {
        "steps": [2, 2],
        "gradients differ from step": 1,
        "batches in common": 1,
    }


def test_witness_sees_the_harm_of_a_late_bypass():
    found = witness_script(CORPUS / "wrong" / "rae_40_stage_two.py")
    assert found == {
        "exit": 0,
        "steps": [6, 6],
        "gradients differ from step": 2,
        "parameters differ from step": 2,
    }


@pytest.mark.parametrize(
    "name",
    [
        "wrong/openvla_oft_160_action_head.py",
        "wrong/compiled_loss_function.py",
        "wrong/library_unwraps_model.py",
        "right/bypass_reduced_by_hand.py",
    ],
)
def test_watch_names_the_marked_line_and_nothing_else_under_torchrun(name: str):
    pytest.importorskip("ddpcall.watch")
    score = score_script(CORPUS / name)
    assert score.good, score
