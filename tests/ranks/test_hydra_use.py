"""The lab as Hydra's users use it: their own code, sweeps, directories of their own."""

import re

from tests.ranks.lab_process import ROOT, run_lab

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
