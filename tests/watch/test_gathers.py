"""DC113: what a loss computes from a gathered tensor; and what looks like it, on two ranks."""

import inspect

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed import _functional_collectives as functional_collectives
from torch.distributed.nn.functional import all_gather as all_gather_with_gradient
from torch.nn.parallel import DistributedDataParallel

import ddpcall
from ddpcall.watch.rules.gathers import advise

# torch 2.13 renames what many scripts call.
pytestmark = [pytest.mark.ranks(2), pytest.mark.filterwarnings("ignore::FutureWarning")]


def gather(x):
    gathered = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, x.contiguous())  # list
    return gathered


def gather_objects(x):
    gathered = [{"features": x}] * dist.get_world_size()
    dist.all_gather_object(gathered, {"features": x})
    return [each["features"] for each in gathered]


def gather_by_lightning(x, **kwargs):
    strategies = pytest.importorskip("lightning.fabric.strategies", reason="Lightning is not installed")
    return strategies.DDPStrategy().all_gather(x, **kwargs).unbind()


def gather_functional(x):
    name = "all_gather_single" if hasattr(functional_collectives, "all_gather_single") else "all_gather_tensor"
    return [getattr(functional_collectives, name)(x, 0, dist.group.WORLD)]


def contrast(x, others, labels=None):
    logits = F.normalize(x, dim=1) @ F.normalize(others, dim=1).T
    labels = torch.arange(len(x)) + dist.get_rank() * len(x) if labels is None else labels
    return F.cross_entropy(logits / 0.1, labels)


def put_back(gathered, x):
    gathered[dist.get_rank()] = x
    return torch.cat(gathered)


def others_alone(gathered, x):
    return torch.cat([x, *(each for rank, each in enumerate(gathered) if rank != dist.get_rank())])


def quietly(function, x):
    with torch.no_grad():
        return torch.cat(function(x))


LOST = {
    "in a matrix product": lambda x: contrast(x, torch.cat(gather(x))),
    "both sides": lambda x: contrast(
        torch.cat([x, x[:1]]), torch.cat(gather(x)), torch.zeros(5, dtype=torch.long)
    ),
    "distances": lambda x: torch.cdist(x, torch.cat(gather(x))).mean(),
    "under a default device": lambda x: on_device(x),
    "stacked": lambda x: contrast(x, torch.stack(gather(x)).flatten(0, 1)),
}


def on_device(x):
    with torch.device("cpu"):
        others = torch.cat(gather(x))
    with torch.device("cpu"):
        return contrast(x, others)


RIGHT = {
    "own part put back": lambda x: contrast(x, put_back(gather(x), x)),
    "own part replaced": lambda x: contrast(x, others_alone(gather(x), x), torch.arange(len(x))),
    "with a gradient": lambda x: contrast(x, torch.cat(list(all_gather_with_gradient(x)))),
    "a queue": lambda x: contrast(x, torch.cat(gather(x.detach()))),
    "under no_grad": lambda x: contrast(x, quietly(gather, x)),
    "detached afterwards": lambda x: contrast(x, torch.cat(gather(x)).detach()),
    "parts detached": lambda x: contrast(x, torch.cat([each.detach() for each in gather(x)])),
    "by a functional collective": lambda x: contrast(x, gather_functional(x)[0]),
    "objects put back": lambda x: contrast(x, put_back(gather_objects(x), x)),
    "objects detached": lambda x: contrast(x, torch.cat(gather_objects(x.detach()))),
    "for the log": lambda x: x.square().mean() + 0 * float(torch.cat(gather(x)).mean()),
    "a baseline": lambda x: (x.sum(1) - torch.cat(gather(x)).mean()).square().mean(),
    "accuracy": lambda x: x.square().mean() * (1 + 0 * torch.cat(gather(x)).argmax(1).float().mean()),
    "not in the backward": lambda x: (contrast(x, torch.cat(gather(x))), x.square().mean())[1],
    "gathered and freed": lambda x: (gather(x), contrast(x, torch.randn(8, 3)))[1],
}


def train(rank, loss):
    torch.manual_seed(0)
    ddp = DistributedDataParallel(nn.Linear(6, 3))
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    torch.manual_seed(rank.rank)
    with ddpcall.watch(on_finding="record", every=10) as session:
        for _ in range(3):
            optimizer.zero_grad()
            loss(ddp(torch.randn(4, 6))).backward()
            optimizer.step()
    assert session.watched.faults == ()
    assert torch._C._len_torch_function_stack() == 0
    return [finding for finding in session.findings if finding.code == "DC113"]


@pytest.mark.parametrize("loss", LOST.values(), ids=LOST)
def test_a_gather_that_lets_no_gradient_through_is_told_on_its_line(rank, loss):
    (finding,) = train(rank, loss)
    line = inspect.getsourcelines(gather)[1] + 2
    assert (finding.step, finding.severity, finding.line) == (1, "note", line)
    assert "gathered from 2 ranks here requires grad, and the result does not" in finding.message


@pytest.mark.parametrize("loss", RIGHT.values(), ids=RIGHT)
def test_what_is_meant_or_has_its_gradient_is_silent(rank, loss):
    assert train(rank, loss) == []


def test_copies_that_were_sent_as_objects_lead_back_to_nothing(rank):
    (finding,) = train(rank, lambda x: contrast(x, torch.cat(gather_objects(x))))
    assert finding.line == inspect.getsourcelines(gather_objects)[1] + 2


def test_lightning_gathers_without_a_gradient_unless_told_otherwise(rank, monkeypatch):
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # set by its import
    (finding,) = train(rank, lambda x: contrast(x, torch.cat(gather_by_lightning(x))))
    assert "sync_grads=True" in finding.fix
    for loss in (
        lambda x: contrast(x, torch.cat(gather_by_lightning(x, sync_grads=True))),
        lambda x: contrast(x, torch.cat(quietly(lambda x: [*gather_by_lightning(x)], x)[None].unbind())),
        lambda x: contrast(x, torch.cat(gather_by_lightning(x.detach()))),
        lambda x: x.square().mean() + 0 * float(gather_by_lightning(x.mean())[0]),
    ):
        assert train(rank, loss) == []


@pytest.mark.filterwarnings("error")
def test_the_advised_line_gives_the_gradient_of_one_process(rank):
    line = advise(by_lightning=False).split("`")[1]
    torch.manual_seed(0)
    model, x = nn.Linear(6, 3), torch.randn(8, 6)
    own = slice(4 * rank.rank, 4 * rank.rank + 4)

    whole = model(x)
    contrast(whole, whole.clone(), torch.arange(8)).backward()
    expected, model.weight.grad = model.weight.grad, None

    scope = {"torch": torch, "dist": dist, "features": model(x[own])}
    exec(line, scope)
    contrast(scope["features"], scope["gathered"]).backward()
    assert model.weight.grad is not None
    dist.all_reduce(model.weight.grad)
    torch.testing.assert_close(model.weight.grad / 2, expected)
