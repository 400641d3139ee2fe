"""Runs scripts with Lightning Fabric where they say DistributedDataParallel: `_fabric_launcher.py SCRIPT…`.

A script stays as it is. Under the name it imports stands a class that hands the module to `Fabric.setup_module`
with the DDP strategy and the script's own DDP options (all but `device_ids` and `output_device`, which Fabric
sets). `isinstance` against that name is true for Fabric's wrapper and for a real DDP; a subclass of it is one of
the real DDP, so Fabric has no part in it. `torch.distributed` finds the group that the script has made.

What Fabric's wrapper has is Fabric's: `.module` (the user's module), `state_dict` (no `module.` prefix), names of
parameters, the tracked methods of the user's module. What it has not and the DDP inside has is lent, for reading
and for setting: `no_sync`, `join`, `require_backward_grad_sync`, `register_comm_hook`, `reducer`, …

`--module-is-wrapper`: `.module` of the wrapper is the wrapper, as if the script said `model.method(x)` for
`model.module.method(x)`, which is how Fabric's users write it and where Fabric looks. `isinstance` against DDP's
name is then false for it, so that loops which unwrap end.

`_composable.replicate` keeps the real DDP, Accelerate gets Fabric's.

The ranks a script asks for (tests/corpus/marks.py) are forked from this process, which has imported torch once,
in the environment that torchrun makes. Prints a JSON line a script: {script, exit_code (-1: over the time limit),
output, seconds, parted}; each module that was wrapped is WRAPPED in the output, and `parted` says whether the
ranks' parameters differed after an optimizer step, as tests/corpus/harm.py sees it.
"""

import argparse
import json
import os
import random
import signal
import socket
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import torch.distributed._composable.replicate
import torch.multiprocessing as mp
import torch.nn.parallel
from lightning_fabric import Fabric  # pyright: ignore[reportMissingImports]
from lightning_fabric.strategies import DDPStrategy  # pyright: ignore[reportMissingImports]
from lightning_fabric.wrappers import _FabricModule  # pyright: ignore[reportMissingImports]
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel import distributed as torch_distributed

from bench.peers_corpus import WRAPPED
from tests.corpus.harm import WITNESS, compare, run_as_rank
from tests.corpus.marks import read_marks

TIMEOUT_S = 40.0


class Lending(_FabricModule):
    """Fabric's wrapper, with the attributes of the DDP inside where it has none of that name."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            inside = nn.Module.__getattr__(self, "_forward_module")
            if not hasattr(inside, name):
                raise
            return getattr(inside, name)

    def __setattr__(self, name: str, value: Any) -> None:
        inside = self._forward_module
        if hasattr(inside, name) and not hasattr(self._original_module, name) and name not in dir(self):
            setattr(inside, name, value)
        else:
            super().__setattr__(name, value)


class ModuleIsWrapper(Lending):
    @property
    def module(self) -> nn.Module:
        return self


class FabricInstead(type):
    """The type of what stands where DistributedDataParallel stood: called, it wraps with Fabric as its `kind`."""

    kind: type[Lending]

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> type:
        if bases:
            return types.new_class(name, (DistributedDataParallel,), exec_body=lambda body: body.update(namespace))
        return super().__new__(mcs, name, bases, namespace)

    def __call__(cls, module: nn.Module, device_ids: Any = None, output_device: Any = None, **options: Any) -> Any:
        ranks = int(os.environ["WORLD_SIZE"])
        fabric = Fabric(accelerator="cpu", devices=ranks, strategy=DDPStrategy(**options))
        fabric.launch()
        wrapped = fabric.setup_module(module)
        object.__setattr__(wrapped, "__class__", cls.kind)  # its own would reach the module inside
        print(WRAPPED, flush=True)
        return wrapped

    def __instancecheck__(cls, one: object) -> bool:
        return cls.__subclasscheck__(type(one))

    def __subclasscheck__(cls, one: type) -> bool:
        if issubclass(cls.kind, ModuleIsWrapper):  # `while isinstance(model, DDP): model = model.module` must end
            return issubclass(one, DistributedDataParallel)
        return issubclass(one, (_FabricModule, DistributedDataParallel))

    def __getattr__(cls, name: str) -> Any:
        return getattr(DistributedDataParallel, name)


def run_script(rank: int, script: str, kind: type[Lending], output: str) -> None:
    """What a rank does: the script as `__main__`, with Fabric in DDP's place; prints to the file `output`."""
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    random.seed()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    instead: Any = FabricInstead("DistributedDataParallel", (), {"kind": kind})
    torch.nn.parallel.DistributedDataParallel = instead
    torch_distributed.DistributedDataParallel = instead
    run_as_rank(script)


def launch_environment(ranks: int) -> dict[str, str]:
    """The variables that torchrun sets, but for those of the single rank; the port was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sizes = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    return sizes | store | {"TORCHELASTIC_RUN_ID": "fabric"}


def launch(script: str, kind: type[Lending], output: Path) -> int:
    """Runs a script on its ranks; returns the exit code of the first that failed, -1 over the time limit."""
    ranks = read_marks(Path(script)).ranks
    os.environ |= launch_environment(ranks)
    until = time.monotonic() + TIMEOUT_S
    arguments = (script, kind, str(output))
    context = mp.start_processes(run_script, arguments, nprocs=ranks, join=False, start_method="fork")
    assert context is not None
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > until:
                for pid in context.pids():
                    os.kill(pid, signal.SIGKILL)
                return -1
    except mp.ProcessRaisedException as error:
        with output.open("a") as file:
            file.write(f"\n{error}\n")
        return 1
    except mp.ProcessExitedException as error:
        return error.exit_code
    return 0


def have_parted(witnessed: Path) -> bool:
    """Whether parameters differed between the ranks after a step; False where a rank left no record."""
    records = [json.loads(path.read_text()) for path in witnessed.glob("*.json")]
    return len(records) > 1 and "parameters differ from step" in compare(records)


def run_one(script: str, kind: type[Lending]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "output"
        output.write_text("")
        os.environ[WITNESS] = name
        began = time.monotonic()
        code = launch(script, kind, output)
        seconds = time.monotonic() - began
        ended = {"exit_code": code, "output": output.read_text(), "seconds": seconds}
        return {"script": script, **ended, "parted": have_parted(Path(name))}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--module-is-wrapper", action="store_true")
    parser.add_argument("scripts", nargs="+")
    options = parser.parse_args()
    kind = ModuleIsWrapper if options.module_is_wrapper else Lending
    for script in options.scripts:
        print(json.dumps(run_one(script, kind)), flush=True)


if __name__ == "__main__":
    main()
