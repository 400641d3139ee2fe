"""What goes wrong is told once, in a file and on the terminal, and nothing is left hanging."""

import signal
import subprocess
import sys
import time

import pytest

from tests.ranks.lab_process import ROOT, SCRIPT, clean_environment, run_lab, torchrun
from tests.ranks.processes import wait_until_gone

USER_MODELS = {"PYTHONPATH": str(ROOT)}
QUICK = ("steps=5", "tensorboard=false")


def model(name: str) -> str:
    return f"model._target_=tests.ranks.user_models.{name}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("experiment=nope",), "Could not find 'experiment/nope'"),
        (("+stepz=3",), "+stepz=3: there is no key stepz, and nothing would read it. Did you mean steps=3?"),
        (("steps=abc",), "Value 'abc' of type 'str' could not be converted to Integer"),
        (("backend=nccl", "device=cpu"), "backend=nccl needs CUDA tensors, but the device is the CPU"),
        (("data.batch_size=5000",), "data.batch_size=5000 on 2 ranks does not fit the 1438 training samples"),
        (("wrapper=none", "path=inner_call"), "none × inner_call makes no sense"),
        (("grid.path=[sideways]",), "'sideways' is unknown; write one of: call, forward"),
        (("steps=0",), "steps=0: write steps=1 or more"),
        (("model._target_=my.module.MyNet",), "model._target_=my.module.MyNet cannot be imported"),
        (("path=inner_method", model("Good")), "which Good does not have"),
    ],
)
def test_wrong_use_is_one_message_exit_code_2_and_no_traceback_of_ours(tmp_path, overrides, message):
    run = run_lab(tmp_path, *overrides, environment=USER_MODELS)
    assert run.code == 2
    assert run.err.count(message) == 1
    assert "Traceback" not in run.err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("+stepz=3",), "+stepz=3: there is no key stepz, and nothing would read it. Did you mean steps=3?"),
        (("backend=nccl", "device=cpu"), "backend=nccl needs CUDA tensors"),
        (("--multirun", "steps=3,4"), "--multirun on several ranks would let them drift apart"),
    ],
)
def test_two_ranks_say_what_is_wrong_once(tmp_path, overrides, message):
    run = run_lab(tmp_path, *overrides, ranks=2)
    assert run.code != 0
    assert run.err.count(message) == 1
    assert "src/ddpcall/" not in run.err


@pytest.mark.parametrize(("option", "shown"), [("--help", "forward_bypass"), ("--cfg=job", "trial_timeout_s")])
def test_help_and_cfg_begin_no_run(tmp_path, option, shown):
    done = subprocess.run(
        [sys.executable, SCRIPT, option], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_multirun_from_one_process_runs_each_job_on_its_own_ranks(tmp_path):
    run = run_lab(tmp_path, "--multirun", "steps=2,3", "tensorboard=false")
    assert run.code == 0, run.err
    assert len(list(tmp_path.glob("runs/train/*/*/summary.json"))) == 2
    table = run.out.partition("sweep of 2 jobs")[2]
    assert [name for name in ("steps=2", "steps=3", "averaged") if name not in table] == []
    assert "train/" in (tmp_path / "runs" / "index.html").read_text()


def test_hydra_run_dir_is_honored_on_every_rank(tmp_path):
    run = run_lab(tmp_path, "hydra.run.dir=here", *QUICK, ranks=2)
    assert run.code == 0, run.err
    assert (tmp_path / "here" / "summary.json").exists()
    assert not (tmp_path / "runs").exists()


def test_missing_ranks_are_started_and_said_in_one_line(tmp_path):
    run = run_lab(tmp_path, *QUICK, ranks=1)
    assert run.code == 0, run.err
    assert run.out.count("train needs 2 ranks, 1 was started: starting 2 on this machine") == 1
    assert run.summary()["environment"]["world_size"] == 2


def test_an_expectation_that_does_not_hold_is_listed_and_fails_the_run(tmp_path):
    run = run_lab(tmp_path, "expect=[{gradients: local}]", *QUICK)
    assert run.code == 1
    assert "not as expected Mlp: ddp × call: gradients is synced, expected local" in run.out
    summary = run.summary()
    assert summary["outcome"] == "expectations failed"
    assert summary["trials"][0]["unmet"] == {"gradients": {"expected": "local", "measured": "synced"}}
    assert summary["trials"][0]["expectation_met"] is False


def test_a_model_that_raises_everywhere_is_evidence_and_the_next_trial_runs(tmp_path):
    models = "grid.model=[tests.ranks.user_models.Raising,ddpcall.lab.models.Mlp]"
    run = run_lab(tmp_path, models, *QUICK, ranks=2, environment=USER_MODELS)
    raising, working = run.summary()["trials"]
    assert run.code == 1
    assert raising["verdicts"]["gradients"] == "crashed"
    assert raising["error"].endswith("step 0: ValueError: my model is broken")
    assert working["verdicts"]["gradients"] == "synced"
    (failures,) = [record["failures"] for record in run.records("evidence.jsonl") if record["failures"]]
    assert sorted(failure["rank"] for failure in failures) == [0, 1]
    timelines = [line for line in run.records("timeline.jsonl") if line["raised"]]
    assert [(line["model"], line["rank"], line["step"]) for line in timelines] == [
        ("tests.ranks.user_models.Raising", rank, 0) for rank in (0, 1)
    ]
    assert [event["detail"] for event in timelines[0]["events"]][1::2] == ["raised ValueError"] * 2


def test_a_rank_that_raises_alone_ends_the_run_with_its_own_traceback(tmp_path):
    run = run_lab(tmp_path, model("RaisingOnOne"), *QUICK, ranks=2, environment=USER_MODELS)
    assert run.code != 0
    assert "ValueError: rank one is broken" in run.err
    assert (run.summary()["outcome"], run.summary()["first_failing_rank"]) == ("failed", 1)
    assert wait_until_gone(tmp_path) == []


@pytest.mark.parametrize("victim", ["0", "1"])
def test_a_killed_rank_is_named_and_leaves_no_orphan(tmp_path, victim):
    run = run_lab(tmp_path, model("Killed"), *QUICK, ranks=2, environment={**USER_MODELS, "VICTIM": victim})
    assert run.code != 0
    assert run.err.count(f"rank {victim} disappeared") == 1
    assert (run.summary()["outcome"], run.summary()["first_failing_rank"]) == ("rank lost", int(victim))
    assert wait_until_gone(tmp_path) == []


@pytest.mark.parametrize("ranks", [2, 0], ids=["torchrun", "python"])
def test_a_crash_leaves_every_ranks_stack(tmp_path, ranks):
    run = run_lab(tmp_path, model("Crashing"), *QUICK, ranks=ranks, environment=USER_MODELS)
    summary = run.summary()
    assert run.code != 0
    assert (summary["outcome"], summary["first_failing_rank"]) == ("rank lost", 1)
    assert "Segmentation fault" in summary["reason"]
    assert "in misbehave" in summary["reason"]
    assert "in misbehave" in (run.only_run() / "stacks" / "rank1.txt").read_text()
    assert sorted(summary["stacks"]) == ["0", "1"]
    assert "in misbehave" not in summary["stacks"]["0"]
    assert [file.name for file in (run.only_run() / "stacks").iterdir()] == ["rank1.txt"]


def test_without_a_crash_no_stacks_are_left(tmp_path):
    run = run_lab(tmp_path, model("Good"), *QUICK, ranks=2, environment=USER_MODELS)
    assert run.code == 0
    assert not (run.only_run() / "stacks").exists()


def test_a_rank_that_exits_with_0_halfway_is_no_success(tmp_path):
    run = run_lab(tmp_path, model("Exiting"), *QUICK, ranks=2, environment=USER_MODELS)
    assert run.code != 0
    assert (run.summary()["outcome"], run.summary()["first_failing_rank"]) == ("rank lost", 1)


def test_a_rank_killed_under_plain_python_fails_the_run_too(tmp_path):
    run = run_lab(tmp_path, model("Killed"), *QUICK, environment=USER_MODELS)
    assert run.code == 1
    assert run.summary()["outcome"] == "rank lost"
    assert wait_until_gone(tmp_path) == []


def test_a_hang_is_cut_and_every_ranks_stack_reported(tmp_path):
    run = run_lab(tmp_path, model("Hanging"), *QUICK, "trial_timeout_s=15", ranks=2, environment=USER_MODELS)
    summary = run.summary()
    assert run.code != 0
    assert (summary["outcome"], sorted(summary["stacks"])) == ("hung", ["0", "1"])
    assert "in misbehave" in summary["stacks"]["1"]
    assert "in misbehave" not in summary["stacks"]["0"]
    assert "_engine_run_backward" in summary["stacks"]["0"]
    assert wait_until_gone(tmp_path) == []


def test_ranks_started_with_different_configurations_are_told_by_name(tmp_path):
    script = f"exec {sys.executable} {SCRIPT} steps=$((5 + RANK)) seed=7 tensorboard=false"
    done = subprocess.run(
        [*torchrun(2), "--no-python", "bash", "-c", script],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode != 0
    assert done.stderr.count("the ranks were started with different configurations") == 1
    assert "steps: 5 on rank 0, 6 on rank 1" in done.stderr
    assert "seed" not in done.stderr
    assert list(tmp_path.glob("runs/*/*/summary.json")) == []


@pytest.mark.parametrize("launcher", [torchrun(2), [sys.executable]], ids=["torchrun", "python"])
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_leaves_a_summary_that_says_so_and_no_process(tmp_path, launcher, stop):
    options = ("experiment=forward_bypass", "steps=20000", "tensorboard=false")
    with subprocess.Popen(
        [*launcher, str(SCRIPT), *options],
        cwd=tmp_path,
        env=clean_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not list(tmp_path.glob("runs/*/*/summary.json")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(stop)
        assert process.stderr is not None
        messages = process.stderr.read()
    assert process.returncode != 0
    assert messages.count("ddpcall: interrupted") == 1
    (summary,) = tmp_path.glob("runs/*/*/summary.json")
    assert '"outcome": "interrupted"' in summary.read_text()
    assert wait_until_gone(tmp_path) == []


def test_a_reader_that_stops_reading_changes_nothing(tmp_path):
    command = [sys.executable, str(SCRIPT), "grid.path=[call,forward]", *QUICK]
    environment = clean_environment()
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
