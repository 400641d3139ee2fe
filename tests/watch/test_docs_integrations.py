"""docs/integrations.md: its callbacks are run by their own trainers on two ranks, its commands are parsed."""

import importlib.util
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from ddpcall.cli import _watch_parser
from tests.ranks.lab_process import ROOT, clean_environment, torchrun

PAGE = (ROOT / "docs" / "integrations.md").read_text()
TRANSFORMERS = """
import torch
from transformers import Trainer, TrainingArguments

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
    def forward(self, x, labels=None):
        return {"loss": (self.layer(x) - labels).square().mean()}

class Bypassing(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        model = model.module if BYPASS else model
        return model(**inputs)["loss"]

data = [{"x": torch.randn(4), "labels": torch.randn(1)} for _ in range(32)]
arguments = TrainingArguments("out", max_steps=3, per_device_train_batch_size=2, use_cpu=True, report_to=[],
                              save_strategy="no", disable_tqdm=True)
Bypassing(Net(), arguments, train_dataset=data, callbacks=[WatchCallback()]).train()
"""
LIGHTNING = """
import torch
from lightning.pytorch import LightningModule, Trainer

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.automatic_optimization = not BYPASS
    def training_step(self, batch, index):
        loss = self.layer(batch[0]).square().mean()
        if BYPASS:
            with self.trainer.strategy.block_backward_sync():
                loss = self.layer(batch[0]).square().mean()
                self.manual_backward(loss)
            self.optimizers().step()
            self.optimizers().zero_grad()
        return loss
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(32, 4)), batch_size=2)
Trainer(max_steps=3, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[WatchCallback()]).fit(Net(), loader)
"""
ACCELERATE = """
import torch
from accelerate import Accelerator

def loss_of(model, batch):
    return (model.module if BYPASS else model)(batch[0]).square().mean()

model = torch.nn.Linear(4, 1)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(32, 4)), batch_size=2)
train(Accelerator(cpu=True), model, torch.optim.SGD(model.parameters(), lr=0.1), loader, loss_of)
"""


def block(name: str) -> str:
    match = re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```\n<!-- end {name} -->", PAGE, re.DOTALL)
    assert match is not None
    return match[1]


@pytest.mark.parametrize("bypass", [False, True], ids=["right", "bypassed"])
@pytest.mark.parametrize(
    ("library", "training"),
    [("transformers", TRANSFORMERS), ("lightning", LIGHTNING), ("accelerate", ACCELERATE)],
)
def test_a_callback_fails_the_training_that_bypasses_the_wrapper_and_no_other(library, training, bypass, tmp_path):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed; write: pip install {library}")
    script = tmp_path / "train.py"
    script.write_text(f"BYPASS = {bypass}\n{block(library)}\n{training}")
    done = subprocess.run(
        [*torchrun(2), str(script)],
        cwd=tmp_path,
        env=clean_environment(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode != 0) == bypass, done.stderr
    assert ("DC101 gradients-not-synchronized" in done.stderr) == bypass, done.stderr


def test_the_commands_of_the_workflow_and_the_hook_are_the_watchs():
    steps = yaml.safe_load(block("actions"))["jobs"]["watch"]["steps"]
    (hook,) = yaml.safe_load(block("pre-commit"))["repos"][0]["hooks"]
    commands = [step["run"] for step in steps if step.get("run", "").startswith("ddpcall")] + [hook["entry"]]
    assert len(commands) == 2
    for command in commands:
        _, name, *arguments = shlex.split(command)
        options = _watch_parser().parse_args(arguments)
        assert (name, options.num_ranks, Path(options.script[0]).name) == ("watch", "2", "train.py")
    assert (
        next(step for step in steps if "sarif" in step.get("uses", ""))["with"]["sarif_file"] == "findings.sarif"
    )
