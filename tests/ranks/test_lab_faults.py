"""Each fault of a run of the lab: one message, the right exit code, an end in time, and nothing lost."""

import dataclasses
import fcntl
import os
import signal
import socket
import subprocess

import pytest
import torch.distributed as dist

from ddpcall.lab.errors import WrongUse
from ddpcall.lab.experiment import _agree_on_config, _describe_code, _flatten
from ddpcall.lab.schema import TrainConfig
from ddpcall.lab.world import World
from tests.ranks.faulty_model import STEP
from tests.ranks.forked_lab import LabRun
from tests.watch.launched import ForkedLauncher


@pytest.fixture(scope="module")
def launcher():
    with ForkedLauncher("lab") as launcher:
        yield launcher


@pytest.fixture
def run(launcher, tmp_path):
    return lambda *overrides, **fault: LabRun(launcher, tmp_path, *overrides, **fault)


@pytest.fixture
def small_disk(tmp_path):
    """Mount a small file system at `run`; give its size and options."""
    if os.getuid() != 0:
        pytest.skip("only root can mount a small file system")
    directory = tmp_path / "run"
    directory.mkdir()

    def mount(options):
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")

    yield mount
    subprocess.run(["umount", directory], check=False)


# ---- ranks that are killed, stopped, or leave ---------------------------------------------------------------


@pytest.mark.parametrize("point", ["forward", "backward", "collective", "save"])
def test_a_rank_that_is_killed_is_named(run, point):
    victim = 0 if point == "save" else 1
    done = run("checkpoint.every=3", fault="kill", point=point, victim=victim)
    assert (done.codes[victim], done.codes[1 - victim]) == (-signal.SIGKILL, 1)
    assert done.how_it_ended() == ("rank lost", victim)
    assert len(done.said) == 1
    assert f"rank {victim} disappeared" in done.said[0]


@pytest.mark.parametrize("point", ["collective", "save"])
def test_a_rank_that_is_stopped_is_named_when_the_trials_time_is_over(run, point):
    done = run("checkpoint.every=3", "trial_timeout_s=3", fault="stop", point=point)
    assert done.codes == [1, -signal.SIGKILL], "the launcher kills what is stopped"
    assert done.how_it_ended() == ("hung", 1)
    assert "no answer from rank 1: dead or stopped" in done.summary()["reason"]


@pytest.mark.parametrize(("fault", "cause"), [("exit", "sys.exit('enough')"), ("interrupt", "KeyboardInterrupt")])
def test_a_model_that_leaves_on_one_rank_ends_the_run(run, fault, cause):
    done = run(fault=fault, point="forward")
    assert set(done.codes) <= {1, -signal.SIGTERM}
    assert done.how_it_ended() == ("failed", 1)
    assert [line.endswith(f"the code under test left with {cause}") for line in done.said] == [True]


def test_a_model_that_leaves_on_every_rank_is_no_success(run):
    done = run("model._target_=sys.exit")
    assert set(done.codes) <= {1, -signal.SIGTERM}
    assert done.summary()["outcome"] == "failed"
    assert len(done.said) == 1


@pytest.mark.parametrize("fault", ["raise", "raise_bare"])
@pytest.mark.parametrize("point", ["forward", "backward"])
def test_a_model_that_raises_on_one_rank_is_told_with_its_traceback(run, fault, point):
    done = run(fault=fault, point=point)
    assert set(done.codes) <= {1, -signal.SIGTERM}
    assert done.how_it_ended() == ("failed", 1)
    assert len(done.said) == 1
    assert f"rank 1 raised in step {STEP - 1}" in done.said[0]
    assert "ValueError" in done.summary()["reason"]


# ---- signals as a scheduler sends them ----------------------------------------------------------------------


def test_sigterm_saves_and_a_second_launch_goes_on_from_there(run, tmp_path):
    saving = ("checkpoint.every=1000", "checkpoint.resume=auto", "steps=200")
    done = run(*saving, fault="terminate_all", point="forward", victim=0)
    assert done.codes == [1, 1]
    assert done.summary()["outcome"] == "interrupted"
    step = int(done.summary()["reason"].rpartition("a checkpoint of step ")[2].split()[0])
    assert STEP <= step < 200
    assert len(done.said) == 1
    (saved,) = (tmp_path / "run" / "checkpoints").glob("*/step*")
    assert saved.name == f"step{step}"
    again = run(*saving)
    assert again.codes == [0, 0], again.err
    assert again.summary()["outcome"] == "ok"
    assert "resumed: 0 of 1 trials" in again.out


def test_sigterm_without_checkpoints_ends_at_once(run):
    done = run("steps=2000", fault="terminate_all", point="forward", victim=0)
    assert done.codes == [1, 1]
    assert done.summary()["outcome"] == "interrupted"
    assert done.summary()["reason"].endswith("stopped by SIGTERM")


# ---- the launcher and the store -----------------------------------------------------------------------------


@pytest.mark.parametrize("victim", [0, 1])
def test_a_store_whose_host_is_gone_ends_all_ranks_with_one_message(run, victim):
    done = run("steps=2000", fault="agent_gone", point="forward", victim=victim)
    assert done.codes == [1, 1]
    assert done.summary()["outcome"] == "failed"
    assert len(done.said) == 1
    assert "is gone: the launcher or host that ran it ended" in done.said[0]
    assert "Traceback" not in done.err


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return str(listener.getsockname()[1])


def test_a_launcher_without_a_store_is_enough(run):
    done = run(TORCHELASTIC_USE_AGENT_STORE="False", MASTER_PORT=free_port())
    assert done.codes == [0, 0], done.err


def test_a_port_in_use_is_one_message(run):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        done = run(
            TORCHELASTIC_USE_AGENT_STORE="False", MASTER_PORT=port,
            settings={"ddpcall.lab.world.CONNECT_SECONDS": 3},
        )  # fmt: skip
    assert done.codes[0] == 2
    assert len(done.said) == 1
    assert f"cannot open the store at 127.0.0.1:{port}" in done.said[0]


def test_a_rank_that_never_comes_is_named(run):
    done = run(WORLD_SIZE="3", settings={"ddpcall.lab.experiment.GATHER_SECONDS": 1.0})
    assert set(done.codes) <= {1, -signal.SIGTERM}
    assert len(done.said) == 1
    assert done.said[0].endswith("2 did not come within 1 s. Start all 3 ranks")


def test_a_rank_0_that_never_comes_is_said_by_rank_1(run):
    done = run(
        ranks=2, RANK="1", TORCHELASTIC_USE_AGENT_STORE="False", MASTER_PORT=free_port(),
        settings={"ddpcall.lab.world.CONNECT_SECONDS": 1},
    )  # fmt: skip
    assert 2 in done.codes
    assert "nobody listens at 127.0.0.1:" in done.err
    assert "Traceback" not in done.err


# ---- a run directory that cannot be written ---------------------------------------------------------------------


def occupy_by_file(path):
    path.write_text("")


def occupy_by_loop(path):
    path.symlink_to(path.name)


def put_directory(name):
    return lambda path: (path / name).mkdir(parents=True)


@pytest.mark.parametrize(
    "prepare",
    [occupy_by_file, occupy_by_loop, put_directory("evidence.jsonl"), put_directory("summary.json")],
    ids=["file", "loop", "evidence", "summary"],
)
def test_a_run_directory_that_cannot_be_is_one_sentence(run, tmp_path, prepare):
    prepare(tmp_path / "run")
    done = run()
    assert 2 in done.codes
    assert set(done.codes) <= {2, -signal.SIGTERM}
    assert [line.endswith("Write another hydra.run.dir") for line in done.said] == [True]
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("options", "why"), [("size=64k,ro", "Read-only file system"), ("size=4k", "No space left on device")]
)
def test_a_disk_that_cannot_be_written_is_one_sentence(run, small_disk, options, why):
    small_disk(options)
    done = run()
    assert 2 in done.codes
    assert [why in line for line in done.said] == [True]
    assert "Traceback" not in done.err


def test_a_disk_that_fills_up_under_the_evidence_is_no_success(run, small_disk):
    small_disk("size=128k")
    done = run(fault="fill", point="forward", victim=0)
    assert set(done.codes) <= {1, -signal.SIGTERM}
    assert done.summary()["outcome"] == "failed"
    assert ["No space left on device" in line for line in done.said] == [True]
    assert "Traceback" not in done.err


def test_a_disk_that_fills_up_under_the_checkpoints_is_told_and_the_training_goes_on(run, small_disk):
    small_disk("size=256k")
    done = run("checkpoint.every=3", "probes.enabled=false", fault="fill", point="forward", victim=0)
    assert "no checkpoint of step 3: rank 0: OSError: [Errno 28] No space left on device" in done.err


def test_two_runs_in_one_directory_do_not_mix(run, tmp_path):
    (tmp_path / "run").mkdir()
    held = os.open(tmp_path / "run", os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = run()
    finally:
        os.close(held)
    assert 2 in done.codes
    assert ["another run is going on there" in line for line in done.said] == [True]
    assert not (tmp_path / "run" / "evidence.jsonl").exists()


def test_a_stdout_that_cannot_be_written_changes_no_result(run):
    done = run(fault="close_out", point="forward", victim=0)
    assert done.codes == [0, 0]
    assert done.summary()["outcome"] == "ok"
    assert ["stdout cannot be written: No space left on device" in line for line in done.said] == [True]


def test_an_ascii_stdout_is_enough(run):
    done = run(PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONUTF8="0")
    assert done.codes == [0, 0], done.err


# ---- what was asked for -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trial_timeout_s=inf", "write a number of seconds above 0 and below"),
        ("trial_timeout_s=nan", "write a number of seconds above 0 and below"),
        ("seed=99999999999999999999999", "write a number from 0 to"),
        ("seed=-1", "write a number from 0 to"),
    ],
)
def test_numbers_that_cannot_be_are_wrong_use(run, override, message):
    done = run(override)
    assert 2 in done.codes
    assert [message in line for line in done.said] == [True]
    assert "Traceback" not in done.err


def test_a_name_cannot_steer_the_terminal(run):
    done = run("name='[red]x[/nope]'")
    assert done.codes == [0, 0], done.err
    assert "[red]x[/nope]" in done.out


def test_ranks_with_other_code_are_told_before_training():
    config = TrainConfig(model={"_target_": "tests.ranks.user_models.Good"})
    here, there = (World(rank=rank, world_size=2, store=store) for store in [dist.HashStore()] for rank in (0, 1))
    own = _flatten(dataclasses.asdict(config)) | _describe_code(config)
    there.publish("config", own | {"source of tests.ranks.user_models.Good": "another"})
    with pytest.raises(
        WrongUse, match=r"source of tests.ranks.user_models.Good: '\w+' on rank 0, 'another' on rank 1"
    ):
        _agree_on_config(config, here)
    there.publish("config", own)
    _agree_on_config(config, here)


# ---- numbers that are none --------------------------------------------------------------------------------------


def test_losses_that_become_nan_are_evidence_and_equal_nans_are_equal(run):
    done = run("grid.path=[call,inner_call]", point="loss")
    assert done.codes == [0, 0], done.err
    call, inner = done.summary()["trials"]
    assert call["verdicts"]["gradients"] == "synced", "the two steps before are"
    assert inner["verdicts"]["gradients"] == "local"


def test_a_loss_that_is_nan_from_the_first_step_on_proves_nothing(run):
    done = run("optimizer.lr=nan", "grid.path=[call]", "expect=[{gradients: synced}]", point="loss", FIRST_NAN="1")
    assert done.summary()["trials"][0]["verdicts"]["gradients"] == "none"
    assert done.codes.count(0) < 2


# ---- more ranks than cores --------------------------------------------------------------------------------------


def test_eight_ranks_measure_what_two_do(run):
    done = run("grid.path=[call,inner_call]", ranks=8)
    assert done.codes == [0] * 8, done.err
    call, inner = done.summary()["trials"]
    assert (call["verdicts"]["gradients"], call["verdicts"]["mixing"]) == ("synced", "averaged")
    assert (inner["verdicts"]["gradients"], inner["verdicts"]["mixing"]) == ("local", "local")
