"""Every claim is run, on its own premise and on an altered one; command and documents say what was measured."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ddpcall.lab.errors import WrongUse
from ddpcall.ranks import RankPool
from ddpcall.teach import claims as catalogue
from ddpcall.teach import command
from ddpcall.teach.claims import CLAIMS, SOURCES, Claim, distributed, find_claims, torchscript
from ddpcall.teach.claims.claim import times
from ddpcall.teach.claims.run import observe, run_claim
from ddpcall.teach.command import record_claims, show_code
from ddpcall.teach.pages import read_verdicts, replace_blocks
from ddpcall.teach.question import DEPENDS, FALSE, SKIPPED, TRUE, Result
from ddpcall.teach.show import count_outcomes, list_remarks
from tests.ranks import claim_premises
from tests.ranks.lab_process import ROOT, TIMEOUT_S, clean_environment

# Measured on torch 2.13.0; another version may come to others, and then this table says for which one.
EXPECTED = {
    "FI-1": FALSE,
    "FI-2": FALSE,
    "FI-3": FALSE,
    "FI-4": FALSE,
    "FI-5": TRUE,
    "FI-6": DEPENDS,
    "FM-1": TRUE,
    "FM-2": TRUE,
    "FM-3": DEPENDS,
    "FM-4": DEPENDS,
    "FM-5": TRUE,
    "FM-6": TRUE,
    "FM-7": TRUE,
    "FM-8": DEPENDS,
    "CF-1": FALSE,
    "CF-2": DEPENDS,
    "CF-3": FALSE,
    "CF-4": DEPENDS,
    "CF-5": FALSE,
    "CF-6": DEPENDS,
    "CF-7": DEPENDS,
    "CF-8": DEPENDS,
    "TS-1": FALSE,
    "TS-2": FALSE,
    "TS-3": TRUE,
    "TS-4": TRUE,
    "TS-5": TRUE,
}
ALTERED_PREMISES: list[tuple[str, dict[str, Any], str]] = [
    ("FI-1", {"name": "forward"}, TRUE),
    ("FI-2", {"name": "forward"}, TRUE),
    ("FI-3", {"traced": "_forward_impl"}, TRUE),
    ("FI-5", {"how": "trace"}, FALSE),
    ("FI-6", {"whole_class": torchscript.Branches}, FALSE),
    ("FM-1", {"path": "forward"}, FALSE),
    ("FM-2", {"module_class": claim_premises.HooksOnForward}, FALSE),
    ("FM-4", {"module_class": nn.ReLU}, TRUE),
    ("FM-5", {"grad_enabled": False}, FALSE),
    ("FM-6", {"modules": (torchscript.PlainArithmetic,)}, FALSE),
    ("FM-7", {"moves": False}, FALSE),
    ("CF-2", {"module_class": claim_premises.HooksOnForward}, FALSE),
    ("CF-3", {"dropout_class": claim_premises.DropoutInCall}, DEPENDS),
    ("CF-4", {"spellings": ("DDP(m)",)}, FALSE),
    ("CF-4", {"spellings": ("replicate(m)",)}, TRUE),
    ("CF-5", {"spelling": "replicate(m)"}, TRUE),
    ("CF-7", {"spelling": claim_premises.call_child}, FALSE),
    ("CF-8", {"spellings": ("m alone", "DDP(m)", "torch.compile(m)")}, FALSE),
    ("CF-8", {"spellings": ("m with a hook", "replicate(m)", "fully_shard(m)", "m.compile()")}, TRUE),
    ("TS-2", {"attribute": "no_such_method"}, TRUE),
    ("TS-3", {"registered": "after"}, FALSE),
    ("TS-4", {"path": "call"}, FALSE),
    ("TS-5", {"hooks": (torchscript.typed_hook,)}, FALSE),
]


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as ranks:
        yield ranks


@pytest.fixture(scope="module")
def results(pool) -> dict[str, Result]:
    return {claim.key: run_claim(claim, pool) for claim in CLAIMS}


def claim(id: str) -> Claim:
    return find_claims([id])[0]


def test_the_catalogue_holds_every_claim_in_the_order_of_the_documents():
    assert [claim.key for claim in CLAIMS] == list(EXPECTED)
    assert {claim.source for claim in CLAIMS} == set(SOURCES.values())


@pytest.mark.parametrize("id", EXPECTED)
def test_the_verdict_of_a_claim(results, id):
    result = results[id]
    assert (result.measured, result.failed) == (EXPECTED[id], False), result.sentence


@pytest.mark.parametrize(("id", "premise", "verdict"), ALTERED_PREMISES)
def test_an_altered_premise_gives_another_verdict(pool, id, premise, verdict):
    result = run_claim(claim(id), pool, **premise)
    assert (result.measured, result.failed) == (verdict, False), result.sentence
    assert verdict is not EXPECTED[id]


def test_judges_answer_otherwise_on_other_evidence(pool):
    """For claims whose premise cannot be altered in this torch, the measured evidence is, one fact at a time."""

    def judged(key: str, **changes: Any) -> str:
        (outcome,) = pool.run(observe, 1, claim(key).experiment, {})
        evidence, _ = outcome.value
        assert changes.keys() <= evidence.keys()
        return claim(key).judge({**evidence, **changes}).word

    other = "RuntimeError: graphs differ"
    assert judged("FI-4", keyword_error=other, accepted_error=other) is TRUE
    assert judged("FI-4", keyword_error=other) is FALSE
    assert judged("FI-4", keyword_error="") is FALSE
    assert judged("FI-6", **dict.fromkeys(("traced", "scripted", "methods", "state"), (("a",), ("b",)))) is TRUE
    assert judged("FM-3", delegating=0) is TRUE
    assert judged("FM-3", own=1) is FALSE
    assert judged("FM-8", in_forward=2) is TRUE
    assert judged("FM-8", scale=1.0) is FALSE
    assert judged("CF-1", errors={"model(x)": 0.0, "model.forward(x)": 1.0}) is TRUE
    fired = {("call", "own"): 3, ("call", "child"): 3, ("forward", "own"): 0, ("forward", "child"): 0}
    assert judged("CF-2", fired=fired) is TRUE
    updates = {("call", "train"): 1, ("call", "eval"): 0, ("forward", "train"): 1, ("forward", "eval"): 1}
    zeroed = {("call", "train"): 0.5, ("call", "eval"): 0.0, ("forward", "train"): 0.0, ("forward", "eval"): 0.0}
    assert judged("CF-3", updates=updates, zeroed=zeroed) is TRUE
    assert judged("CF-6", operators={"call": 1, "forward": 0}) is TRUE
    assert judged("CF-6", scopes={"call": ("Linear_0",), "forward": ("Linear_0",)}) is FALSE
    assert judged("CF-7", operators=[("a",), ()]) is TRUE
    none = {"scripted": "", "traced": ""}
    assert judged("TS-1", errors=none, fired={"scripted": 1, "traced": 1}) is TRUE
    assert judged("TS-1", errors=none, fired={"scripted": 0, "traced": 1}) is FALSE


def test_the_evidence_of_cf_8_names_what_each_wrapper_loses(results):
    sentence = results["CF-8"].sentence
    for words in (
        "DDP(m): nothing",
        "m with a hook: hook skipped",
        "replicate(m): gradients off by",
        "fully_shard(m): raises RuntimeError",
        "m.compile(): runs eager",
    ):
        assert words in sentence
    assert next(iter(distributed.SPELLINGS)) == "m alone"


def test_every_sentence_holds_a_number_or_what_was_raised(results):
    for result in results.values():
        assert re.search(r"\d|once|never|synced", result.sentence), result.sentence


def test_deprecated_parts_are_named_by_their_warnings(results):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.jit.script(nn.Linear(2, 2))
    named = {f"{one.category.__name__}: {str(one.message).split('. ')[0]}" for one in caught}
    assert named <= set(results["FI-5"].warnings)
    assert any("TracerWarning" in warning for warning in results["FM-4"].warnings)
    assert results["FM-1"].warnings == ()
    for warning in named:
        assert any(warning in line and "FI-5" in line for line in list_remarks(list(results.values())))


def test_a_torch_without_script_skips_its_claims_and_says_so(pool, monkeypatch):
    monkeypatch.delattr(torch.jit, "script")
    result = run_claim(claim("FI-5"), pool)
    sentence = f"torch {torch.__version__} has no torch.jit.script"
    assert (result.measured, result.sentence, result.failed) == (SKIPPED, sentence, False)
    assert list_remarks([result]) == []
    assert run_claim(claim("FI-3"), pool).measured is FALSE  # tracing is still there


def test_a_failed_control_gives_no_verdict(pool):
    """Without a wrapper no call synchronizes, so what forward loses cannot be said."""
    result = run_claim(claim("CF-4"), pool, spellings=("m alone",))
    sentence = "the control failed: some wrapper synchronizes by call"
    assert (result.measured, result.sentence, result.failed) == (SKIPPED, sentence, True)


def failing_claim() -> Claim:
    return dataclasses.replace(claim("FM-1"), experiment=claim_premises.raise_error)


def test_an_experiment_that_fails_gives_no_verdict_and_exit_code_1(pool, monkeypatch, capsys):
    result = run_claim(failing_claim(), pool)
    assert result.failed
    assert result.measured is SKIPPED
    assert "rank 0: OSError: no disk" in result.sentence
    monkeypatch.setattr(catalogue, "CLAIMS", [failing_claim()])
    assert command.claims(["FM-1"]) == 1
    assert "1 skipped" in capsys.readouterr().out


def run_shown_code(path: str, experiment: str, judge: str) -> Any:
    """Import a shown script on this rank and run what it defines."""
    spec = importlib.util.spec_from_file_location("shown", path)
    assert spec is not None
    assert spec.loader is not None
    shown = importlib.util.module_from_spec(spec)
    sys.modules["shown"] = shown
    try:
        spec.loader.exec_module(shown)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = getattr(shown, judge)(**getattr(shown, experiment)())
        return answer.word
    finally:
        del sys.modules["shown"]


@pytest.mark.parametrize("id", EXPECTED)
def test_the_shown_code_comes_to_the_same_verdict_by_itself(pool, tmp_path, id):
    path, one = tmp_path / "shown.py", claim(id)
    path.write_text(show_code(one))
    names = (one.experiment.__name__, one.judge_evidence.__name__)
    outcomes = pool.run(run_shown_code, one.num_ranks, str(path), *names)
    assert [outcome.value for outcome in outcomes] == [EXPECTED[id]] * one.num_ranks, outcomes[0].error


def test_the_shown_code_is_the_code_that_runs_and_no_more():
    shown = show_code(claim("CF-2"))
    assert shown.startswith('"""CF-2: hooks before and after the forward do not fire')
    assert "def count_hooks(" in shown
    assert "def judge_hooks_do_not_fire(" in shown
    assert "judge_can_skip_hooks" not in shown
    assert "import contextlib" not in shown


def run_command(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *(str(argument) for argument in arguments)],
        cwd=cwd,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def test_a_shown_script_of_two_ranks_runs_as_a_script(tmp_path):
    shown = run_command("-m", "ddpcall", "claims", "CF-4", "--show", cwd=tmp_path)
    (tmp_path / "cf4.py").write_text(shown.stdout)
    done = run_command("cf4.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Outcome.DEPENDS" in done.stdout
    assert "DDP(m) inner call off by" in done.stdout


def test_the_command_prints_a_table_and_writes_json(tmp_path):
    done = run_command("-m", "ddpcall", "claims", "cf-1", "FM-3", "--json", "verdicts.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"torch {torch.__version__}" in done.stdout
    assert "FM-3 is depends, where a first look said true" in done.stdout
    assert "1 false, 1 depends" in done.stdout
    written = json.loads((tmp_path / "verdicts.json").read_text())
    assert written["schema"] == 1
    assert [(one["id"], one["verdict"], one["torch"]) for one in written["claims"]] == [
        ("CF-1", "false", torch.__version__),
        ("FM-3", "depends", torch.__version__),
    ]
    assert set(written["claims"][0]) == {"id", "verdict", "evidence", "torch"}


def test_the_command_without_a_package_it_needs_says_what_to_install(tmp_path):
    hide = "import sys; sys.modules['rich.table'] = None; from ddpcall.cli import main; main(['claims'])"
    done = run_command("-c", hide, cwd=tmp_path)
    assert done.returncode == 2
    assert "pip install 'ddpcall[lab]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_id_is_wrong_use_and_names_the_nearest(capsys):
    assert command.claims(["CF-33"]) == 2
    message = capsys.readouterr().err
    assert "there is no claim 'CF-33'" in message
    assert "CF-3" in message
    with pytest.raises(WrongUse, match=r"nearest are .*TS-4"):
        find_claims(["TS4"])


def test_a_json_path_without_a_directory_is_wrong_use_before_anything_runs(capsys, tmp_path):
    path = tmp_path / "nowhere" / "verdicts.json"
    assert command.claims(["--json", str(path)]) == 2
    assert "there is no directory" in capsys.readouterr().err
    assert command.claims(["--json", str(tmp_path)]) == 2
    assert "is a directory" in capsys.readouterr().err


def test_the_list_names_every_claim_and_its_source(capsys):
    assert command.claims(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(claim.key in listed for claim in CLAIMS)
    said = " ".join(listed.split())
    assert all(source.replace("`", "") in said for source in SOURCES.values())


def test_ids_are_taken_once_in_the_order_asked_for_and_in_either_case():
    assert [claim.key for claim in find_claims(["TS-1", "cf-2", "TS-1"])] == ["TS-1", "CF-2"]


def test_documented_verdicts_are_not_stale(results):
    text = (ROOT / "docs" / "claims.md").read_text()
    stated = read_verdicts(text)
    assert list(stated) == list(EXPECTED)
    assert stated == {id: str(results[id].measured) for id in stated}, "run make claims"
    assert re.search(r"^Measured on \d{4}-\d\d-\d\d with torch \d\S+, Python", text, re.MULTILINE)


def test_every_disagreement_of_the_run_is_documented(results):
    text = (ROOT / "docs" / "claims.md").read_text()
    lines = [line for line in list_remarks(list(results.values())) if "a first look said" in line]
    assert [line for line in lines if f"* {line}" not in text] == []
    assert len(re.findall(r"where a first look said", text)) == len(lines)
    assert set(re.findall(r"^\* \*\*(\w\w-\d+)\.\*\*", text, re.MULTILINE)) == {line.split()[0] for line in lines}


def test_blocks_are_written_anew_and_read_back(results):
    text = "before\n<!-- claims FM-2 CF-3 -->\nold\n<!-- end claims -->\nafter\n"
    written = replace_blocks(text, list(results.values()), "Measured.")
    assert read_verdicts(written) == {"FM-2": "true", "CF-3": "false"}
    assert written.startswith("before\n")
    assert written.endswith("Measured.\n<!-- end claims -->\nafter\n")
    assert "old" not in written
    assert replace_blocks(written, list(results.values()), "Measured.") == written
    with pytest.raises(ValueError, match="no <!-- claims"):
        replace_blocks("no block", [], "")


def test_results_are_counted_and_written_as_json(results):
    chosen = [results["FM-1"], results["CF-3"], results["FM-2"]]
    assert count_outcomes(chosen) == "2 true, 1 false"
    assert [one["verdict"] for one in record_claims(chosen)["claims"]] == ["true", "false", "true"]


def test_numbers_are_said_as_people_say_them():
    assert [times(number) for number in range(4)] == ["never", "once", "twice", "3 times"]
