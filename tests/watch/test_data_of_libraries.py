"""What accelerate, Transformers and Lightning do with data, randomness and gathers: silent where it is right."""

import importlib.util

import pytest

from tests.watch.launched import Launched

ACCELERATE = """
import sys
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset


class Rows(IterableDataset):
    def __iter__(self):
        return iter(torch.randn(64, 4, generator=torch.Generator().manual_seed(1)))


def train(kind, **configuration):
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**configuration))
    set_seed(1)
    data, held_out = TensorDataset(torch.randn(60, 4)), TensorDataset(torch.randn(37, 4))
    loader = DataLoader(Rows(), batch_size=8) if kind == "rows" else DataLoader(data, batch_size=8, shuffle=True)
    if kind == "own sampler":
        sampler = DistributedSampler(data)
        loader = DataLoader(data, batch_size=8, sampler=sampler)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model, optimizer, evaluation = accelerator.prepare(model, optimizer, DataLoader(held_out, batch_size=8))
    loader = loader if kind == "own sampler" else accelerator.prepare(loader)
    for epoch in range(3):
        model.train()
        if kind == "resumed":
            loader.set_epoch(epoch)
        is_resumed = (kind, epoch) == ("resumed", 1)
        for batch in accelerator.skip_first_batches(loader, 2) if is_resumed else loader:  # epoch
            x = batch if torch.is_tensor(batch) else batch[0]
            if kind == "noise":
                x = x + torch.randn_like(x)  # noise
            outputs = nn.functional.normalize(model(x), dim=1)
            others = accelerator.gather(outputs) if kind == "gather" else outputs.detach()  # gather
            optimizer.zero_grad()
            accelerator.backward(torch.logsumexp(outputs @ others.T, 1).mean())
            optimizer.step()
        model.eval()
        with torch.no_grad():
            predictions = [accelerator.gather_for_metrics(model(x)) for (x,) in evaluation]
        num = torch.tensor([0.0, len(torch.cat(predictions)) / accelerator.num_processes])
        assert accelerator.reduce(num, "sum")[1] == 37
    accelerator.free_memory()


if sys.argv[1] == "right":
    for kind, configuration in {
        "plain": {}, "dispatched": {"dispatch_batches": True}, "split": {"split_batches": True},
        "seedable": {"use_seedable_sampler": True}, "rows": {}, "resumed": {"use_seedable_sampler": True},
    }.items():
        train(kind, **configuration)
else:
    train(sys.argv[1])
"""
TRANSFORMERS = """
import sys, tempfile
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments


class Tiny(PreTrainedModel):
    config_class = PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = nn.Linear(4, 2)
        self.post_init()

    def forward(self, x=None, labels=None):
        if sys.argv[1] == "noise" and self.training:
            x = x + torch.randn_like(x)  # noise
        logits = self.layer(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Rows(Dataset):
    def __init__(self, num):
        self.x = torch.randn(num, 4, generator=torch.Generator().manual_seed(num))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "labels": int(self.x[index].sum() > 0)}


class Stream(IterableDataset):
    def __iter__(self):
        return map(Rows(96).__getitem__, range(96))


for data, accelerator_config in ((Rows(100), {}), (Stream(), {}), (Rows(100), {"split_batches": True})):
    arguments = TrainingArguments(
        tempfile.mkdtemp(), per_device_train_batch_size=8, per_device_eval_batch_size=8, max_steps=16,
        use_cpu=True, eval_strategy="steps", eval_steps=6, save_strategy="no", report_to=[], disable_tqdm=True,
        accelerator_config=accelerator_config,
    )
    accuracy = lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())}
    given = {"train_dataset": data, "eval_dataset": Rows(61), "compute_metrics": accuracy}
    Trainer(Tiny(PretrainedConfig()), arguments, **given).train()
    if sys.argv[1] == "noise":
        break
"""
LIGHTNING = """
import sys, tempfile
import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

KIND = sys.argv[1]


class Tiny(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 6)

    def training_step(self, batch, number):
        outputs = nn.functional.normalize(self.layer(batch[0]), dim=1)
        others = self.all_gather(outputs, sync_grads=KIND == "right").flatten(0, 1)  # gather
        return torch.logsumexp(outputs @ others.T, 1).mean()

    def validation_step(self, batch, number):
        self.log("loss", self.layer(batch[0]).square().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


L.seed_everything(0)
trainer = L.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=3, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, default_root_dir=tempfile.mkdtemp(),
)
train, held_out = (TensorDataset(torch.randn(num, 4)) for num in (60, 37))
trainer.fit(Tiny(), DataLoader(train, batch_size=8, shuffle=True), DataLoader(held_out, batch_size=8))
"""
AS_TORCHRUN = {"ACCELERATE_USE_CPU": "1", "GROUP_RANK": "0"}


@pytest.fixture
def run(launcher, tmp_path):
    """Runs a script on two ranks; skips where the library is missing."""

    def run(library, script, kind):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
        done = Launched(launcher, tmp_path, script, kind, environment=AS_TORCHRUN)
        assert done.codes in ([0, 0], [1, 0]), done.err
        assert "Traceback" not in done.err
        return done.found

    return run


def line(script, mark):
    (found,) = (number for number, text in enumerate(script.splitlines(), 1) if text.endswith(f"# {mark}"))
    return found


@pytest.mark.parametrize(
    ("kind", "code", "mark"),
    [("own sampler", "DC401", "epoch"), ("noise", "DC404", "noise"), ("gather", "DC113", "gather")],
)
def test_what_a_loop_of_accelerate_does_wrong_is_told(run, kind, code, mark):
    assert run("accelerate", ACCELERATE, kind) == [(code, line(ACCELERATE, mark))]


def test_loaders_of_accelerate_and_its_evaluation_are_silent(run):
    assert run("accelerate", ACCELERATE, "right") == []


def test_the_trainer_of_transformers_is_silent(run):
    assert run("transformers", TRANSFORMERS, "right") == []


def test_noise_in_a_model_of_transformers_is_told(run):
    assert run("transformers", TRANSFORMERS, "noise") == [("DC404", line(TRANSFORMERS, "noise"))]


@pytest.mark.parametrize("kind", ["right", "without gradient"])
def test_the_trainer_of_lightning_is_silent_but_for_a_gather_without_gradient(run, kind):
    found = run("lightning", LIGHTNING, kind)
    assert [code for code, _ in found] == ([] if kind == "right" else ["DC113"])
