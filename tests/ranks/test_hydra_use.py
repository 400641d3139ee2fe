"""The lab as Hydra's users use it: their own code, sweeps, directories of their own."""

import re
import subprocess
import sys

import pytest

from tests.ranks.lab_process import ROOT, clean_environment, run_lab

QUICK = ("steps=3", "device=cpu", "tensorboard=false")


def write_documented_module(directory) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own_code.md").read_text(), re.S)
    (directory / "mine.py").write_text("\n\n".join(blocks))


def test_the_documented_code_of_ones_own_is_wrapped_called_and_measured(tmp_path):
    write_documented_module(tmp_path)
    own = ["data._target_=mine.load", "data.width=7", "loss._target_=mine.soft_loss", "loss.smoothing=0.2"]
    own += ["optimizer._target_=torch.optim.Adagrad", "optimizer.lr_decay=0.01"]
    own += ["wrapper._target_=mine.wrap", "path._target_=mine.step"]
    run = run_lab(tmp_path, *own, "grid.wrapper=[ddp,custom]", "grid.path=[call,custom]", *QUICK)
    assert run.code == 0, run.err
    trials = {(trial["wrapper"], trial["path"]): trial for trial in run.summary()["trials"]}
    assert {pair: trial["verdicts"]["gradients"] for pair, trial in trials.items()} == {
        ("ddp", "call"): "synced",
        ("ddp", "custom"): "local",
        ("custom", "call"): "synced",
        ("custom", "custom"): "local",
    }
    # The user's wrapper is DDP with other buckets: the same models.
    assert trials["custom", "call"]["consequence"] == trials["ddp", "call"]["consequence"]
    assert "no cell has an expectation" in run.out


def test_a_file_with_a_target_comes_from_a_directory_of_ones_own(tmp_path):
    write_documented_module(tmp_path)
    (tmp_path / "own" / "data").mkdir(parents=True)
    (tmp_path / "own" / "data" / "mine.yaml").write_text("_target_: mine.load\nwidth: 7\n")
    run = run_lab(tmp_path, "--config-dir", "own", "data=mine", "data.width=5", *QUICK)
    assert run.code == 0, run.err
    config = (run.only_run() / "config.yaml").read_text()
    assert "_target_: mine.load" in config


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ddpcall train experiment=forward", "experiment=forward_bypass"),
        ("ddpcall train wrapper=replicate_", "wrapper=replicate_with_fsdp"),
        ("ddpcall re", "report"),
    ],
)
def test_the_shell_completes_commands_and_what_stands_behind_train(line, expected):
    command = [sys.executable, "-m", "ddpcall", "-sc", "query=bash"]
    environment = clean_environment(COMP_LINE=line, COMP_POINT=str(len(line)))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert expected in done.stdout.split(), done.stderr


def test_the_script_for_the_shell_completes_the_command_itself():
    command = [sys.executable, "-m", "ddpcall", "-sc", "install=bash"]
    done = subprocess.run(
        command, env=clean_environment(), capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout.rstrip().endswith("complete -o nospace -o default -F hydra_bash_completion ddpcall"), (
        done.stderr
    )
