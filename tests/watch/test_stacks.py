"""Stacks that are used and not followed are named; a mere import of one is no use."""

import json

import pytest

from tests.watch.launched import Launched

# Where each library has what the watch looks for; Horovod's own __init__ has it from another module, as here.
PACKAGES = {
    "deepspeed": ("deepspeed/runtime/engine.py", "DeepSpeedEngine", "DeepSpeed's engine"),
    "apex": ("apex/parallel/distributed.py", "DistributedDataParallel", "apex's DistributedDataParallel"),
    "fairscale": (
        "fairscale/nn/data_parallel/sharded_ddp.py",
        "ShardedDataParallel",
        "fairscale's ShardedDataParallel",
    ),
    "megatron": (
        "megatron/core/distributed/distributed_data_parallel.py",
        "DistributedDataParallel",
        "Megatron's DistributedDataParallel",
    ),
    "horovod": ("horovod/torch/__init__.py", "DistributedOptimizer", "Horovod's DistributedOptimizer"),
}
WRAPPER = """
import torch
class {name}(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module
    def forward(self, x):
        return self.module(x)
"""
HOROVOD = {
    "horovod/torch/__init__.py": "from horovod.torch.optimizer import DistributedOptimizer\n",
    "horovod/torch/optimizer.py": "def DistributedOptimizer(optimizer):\n    return optimizer\n",
}

TRAINING = """
import os, sys
sys.path.insert(0, "packages")
import importlib
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

kind, name, use = sys.argv[1:]
rank = int(os.environ["RANK"])
if kind == "python_reducer" and use == "used":
    torch._dynamo.config.optimize_ddp = "python_reducer"
dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Linear(2, 2).requires_grad_(False))
wrap = prepare = lambda it: it
if kind in ("delayed", "one_delayed") and use == "used":
    number = 1 if kind == "one_delayed" else 2
    wrap = lambda it: DistributedDataParallel(
        it, delay_all_reduce_named_params=list(it.named_parameters())[:number], param_to_hook_all_reduce=it[0].bias
    )
elif kind in ("delayed", "python_reducer"):
    wrap = DistributedDataParallel
else:
    stack = getattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2])
    if use == "imported":
        wrap = DistributedDataParallel
    elif kind == "horovod":
        prepare = stack
    else:
        wrap = stack
model = wrap(model)
vars(model).setdefault("_lazy_init_ran", True)  # torch 2.13 forgets it where all parameters are delayed
optimizer = prepare(torch.optim.SGD(model.parameters(), lr=0.1))
torch.manual_seed(rank)
for step in range(3):
    loss = model(torch.randn(3, 4)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    if use == "used":
        for parameter in filter(lambda each: each.requires_grad, model.parameters()):
            dist.all_reduce(parameter.grad)
    optimizer.step()
dist.barrier()
del model
dist.destroy_process_group()
"""


def write_package(directory, file, name):
    for path, text in HOROVOD.items() if file in HOROVOD else [(file, WRAPPER.format(name=name))]:
        path = directory / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def watch(launcher, directory, kind, use, *options):
    name = ""
    if kind in PACKAGES:
        file, called, _ = PACKAGES[kind]
        write_package(directory / "packages", file, called)
        name = f"{file.removesuffix('.py').removesuffix('/__init__').replace('/', '.')}.{called}"
    run = Launched(launcher, directory, TRAINING, kind, name, use, options=options)
    return run, json.loads((directory / "f.json").read_text())["watched"]["not_followed"]


@pytest.mark.parametrize("kind", PACKAGES)
def test_a_stack_that_is_used_is_named_and_what_it_does_to_gradients_is_measured(launcher, tmp_path, kind):
    run, not_followed = watch(launcher, tmp_path, kind, "used")
    assert not_followed == [PACKAGES[kind][2]]
    assert run.codes == [0, 0], run.err
    assert "3 steps measured: every rank used the sum of both ranks' gradients" in run.err
    assert f"; not followed: {PACKAGES[kind][2]}" in run.err


@pytest.mark.parametrize("kind", PACKAGES)
def test_a_stack_that_is_used_and_not_measured_proves_nothing(launcher, tmp_path, kind):
    run, _ = watch(launcher, tmp_path, kind, "used", "--every", "0")
    assert sorted(run.codes) == [0, 2], run.err
    assert f"nothing could be found out: {PACKAGES[kind][2]} is not followed by the watch" in run.err


@pytest.mark.parametrize(
    ("kind", "stack"), [("python_reducer", "DDP's python reducer"), ("delayed", "DDP's delayed all-reduce")]
)
def test_a_reducer_of_ddps_that_is_not_followed_is_named_with_the_line_to_write(launcher, tmp_path, kind, stack):
    run, not_followed = watch(launcher, tmp_path, kind, "used", "--every", "0")
    assert not_followed == [stack]
    assert sorted(run.codes) == [0, 2], run.err
    assert f"{stack} is not followed by the watch. To have it watched, leave " in run.err


def test_parameters_that_ddp_reduces_later_are_named_beside_those_that_are_followed(launcher, tmp_path):
    run, not_followed = watch(launcher, tmp_path, "one_delayed", "used")
    assert not_followed == ["DDP's delayed all-reduce"]
    assert run.codes == [0, 0], run.err
    assert "compared 3 times; 3 steps measured" in run.err
    assert "; not followed: DDP's delayed all-reduce" in run.err


@pytest.mark.parametrize("kind", [*PACKAGES, "python_reducer", "delayed"])
def test_a_stack_that_is_only_imported_is_not_named(launcher, tmp_path, kind):
    run, not_followed = watch(launcher, tmp_path, kind, "imported")
    assert not_followed == []
    assert run.codes == [0, 0], run.err
    assert "no findings: 1 DDP model, 3 steps on 2 of 2 ranks" in run.err
