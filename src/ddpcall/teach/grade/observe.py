"""What a grader wants to know of one rank, observed while a student's script runs in it, and told as it happens.

The observer sits on torch, not on the script: on DDP's constructor, on optimizer steps, on forwards of wrapped
models and on hooks as they are registered. A rank's own gradients and those its optimizer used are measured as the
lab and the watch do it, by `ddpcall.mixing`.

Blind to: updates without a torch optimizer, gradients taken with `torch.autograd.grad`, `type(m).forward(m, x)`,
and code that means to deceive it from inside the same process (docs/teaching.md).
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ddpcall.mixing.collect import MixingCollector
from ddpcall.mixing.places import Place
from ddpcall.mixing.record import PRESENT
from ddpcall.mixing.sums import sum_backwards
from ddpcall.replicas import digest_bytes, digest_tensor
from ddpcall.taps import (
    ForwardTap,
    ReducerLog,
    find_tensors,
    hook_arrival,
    in_backward,
    replace_attribute,
    tap_reducer,
)

MOST_ROWS = 1024  # samples of a batch that are told apart
_HOOKS = ("register_forward_pre_hook", "register_forward_hook", "register_full_backward_hook")


@dataclass
class _Tracked:
    """One parameter of a wrapped model, its name there, and the DDPs that own it.

    Attributes:
        arrivals: Gradients since the last step, `[while one of the reducers was armed, while none was]`.
    """

    parameter: nn.Parameter
    name: str
    reducers: list[ReducerLog] = field(default_factory=list)
    arrivals: list[int] = field(default_factory=lambda: [0, 0])


class RankObserver:
    """Observes this process from `start` to `report_end`.

    Args:
        tell: Gets each fact: `tell(kind, **facts)`.
    """

    def __init__(self, tell: Callable[..., None]) -> None:
        self._tell = tell
        self._tracked: dict[int, _Tracked] = {}
        self._models: list[nn.Module] = []
        self._fired: Counter[str] = Counter()
        self._before: dict[int, int] = {}
        self._has_begun = False
        self._forwards = ForwardTap(self._see_forward, lambda: False)
        self._functions = list_functions()
        self._collector: MixingCollector | None = None
        self._forget_steps: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Put everything on; nothing takes it off but the end of the process."""
        construct = DistributedDataParallel.__init__

        @functools.wraps(construct)
        def see_wrapping(ddp: Any, *args: Any, **kwargs: Any) -> None:
            construct(ddp, *args, **kwargs)
            self._see_wrapping(ddp)

        replace_attribute(DistributedDataParallel, "__init__", see_wrapping)
        for name in _HOOKS:
            replace_attribute(nn.Module, name, self._counting(getattr(nn.Module, name)))
        register_optimizer_step_pre_hook(lambda optimizer, *_: self._before_step(optimizer))
        self._collect()

    def _collect(self) -> None:
        """Measure own and used gradients of all wrapped parameters that are trained now."""
        if self._collector is not None:
            self._collector.stop()
        self._forget_steps()
        trained = [each for each in self._tracked.values() if each.parameter.requires_grad]
        self._collector = MixingCollector([Place(each.name, each.parameter) for each in trained], [])
        self._rows = {id(each.parameter): row for row, each in enumerate(trained)}
        self._collector.start()
        # After the collector's own hook, which ends the step that is read here.
        handle = register_optimizer_step_post_hook(lambda optimizer, *_: self._after_step(optimizer))
        self._forget_steps = handle.remove

    # ---- what is wrapped, and what runs through it -----------------------------------------------------------

    def _see_wrapping(self, ddp: DistributedDataParallel) -> None:
        inner, log = ddp.module, ReducerLog()
        tap_reducer(ddp, log)
        if all(inner is not model for model in self._models):
            self._models.append(inner)
            self._forwards.put(inner)
        for name, parameter in inner.named_parameters():
            tracked = self._tracked.setdefault(id(parameter), _Tracked(parameter, name))
            if parameter.requires_grad and name not in ddp.parameters_to_ignore:
                if not tracked.reducers:
                    hook_arrival(parameter, functools.partial(self._see_arrival, tracked))
                tracked.reducers.append(log)
        self._collect()
        modules = [[name, repr(module)] for name, module in inner.named_modules()]
        self._tell("wrap", modules=modules, ranks=dist.get_world_size(ddp.process_group))

    def _see_arrival(self, tracked: _Tracked, _: Tensor) -> None:
        armed = [log for log in tracked.reducers if log.armed]
        for log in armed:
            log.arrive()
        tracked.arrivals[0 if armed else 1] += 1

    def _see_forward(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        tensors = [tensor for tensor in find_tensors([args, kwargs]) if tensor.dim() > 0]
        rows = digest_rows(tensors[0]) if tensors else []
        self._tell("forward", gradients=torch.is_grad_enabled(), training=module.training, rows=rows)
        return original(*args, **kwargs)

    def _counting(self, register: Callable[..., Any]) -> Callable[..., Any]:
        """Count what fires of the hooks registered from now on, by the module's role."""

        @functools.wraps(register)
        def register_counted(module: nn.Module, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            @functools.wraps(hook, assigned=("__name__", "__doc__"), updated=())
            def counted(*given: Any, **named: Any) -> Any:
                is_root = isinstance(module, DistributedDataParallel) or any(m is module for m in self._models)
                if torch.is_grad_enabled() or in_backward():
                    self._fired["model" if is_root else "below"] += 1
                return hook(*given, **named)

            return register(module, counted, *args, **kwargs)

        return register_counted

    # ---- optimizer steps -------------------------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._tell("begin", state=self._state())
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._before[id(parameter)] = digest_tensor(parameter.detach())

    def _after_step(self, optimizer: Optimizer) -> None:
        assert self._collector is not None
        record = self._collector.take()
        own, _ = sum_backwards(record)
        computed = {column.parameter for column in record.columns if column.backward >= 0}
        used = {row for row, state in enumerate(record.states) if state == PRESENT}
        parameters = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if (before := self._before.pop(id(parameter), None)) is None:
                    continue
                nowhere = _Tracked(parameter, f"(not wrapped) {tuple(parameter.shape)}")
                tracked, row = self._tracked.get(id(parameter), nowhere), self._rows.get(id(parameter))
                armed, unarmed = tracked.arrivals
                tracked.arrivals = [0, 0]
                parameters.append({
                    "name": tracked.name,
                    "own": own[row].tolist() if row in computed else None,
                    "used": record.used[row].tolist() if row in used else None,
                    "armed": armed,
                    "unarmed": unarmed,
                    "lr": float(group["lr"]) if "lr" in group else None,
                    "before": before,
                    "after": digest_tensor(parameter.detach()),
                })  # fmt: skip
        modules = [(name, module) for model in self._models[-1:] for name, module in model.named_modules()]
        self._tell(
            "step",
            world_size=dist.get_world_size() if dist.is_initialized() else 1,
            parameters=parameters,
            evaluating=[name for name, module in modules if not module.training],
            fired=dict(self._fired),
        )
        self._fired.clear()

    def report_end(self, code: Any, error: str | None) -> None:
        """Tell how the script ended and what the model has become.

        Args:
            code: What it left with, as for `sys.exit`.
            error: The exception that ended it, in a line.
        """
        now = list_functions()
        changed = [name for name, value in self._functions.items() if now.get(name) is not value]
        code = code if isinstance(code, int) else int(code is not None)
        self._tell("end", code=code, error=error, tampered=sorted(changed), state=self._state())

    def _state(self) -> list[dict[str, Any]]:
        """Return every wrapped model's parameters and buffers by name, as lists of numbers."""
        return [
            {name: tensor.detach().cpu().float().tolist() for name, tensor in model.state_dict().items()}
            for model in self._models
        ]


def digest_rows(batch: Tensor) -> list[int]:
    """Return a digest of each sample of a batch of shape (batch, *features)."""
    return [digest_bytes(row.float().numpy()) for row in batch.detach().cpu().contiguous()[:MOST_ROWS]]


def list_functions() -> dict[str, Any]:
    """Return the functions and classes of every ddpcall module loaded now, methods included."""
    found: dict[str, Any] = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "ddpcall":
            for key, value in list(vars(module).items()):
                if isinstance(value, FunctionType | type):
                    found[f"{name}.{key}"] = value
                if isinstance(value, type) and value.__module__.startswith("ddpcall"):
                    methods = {k: v for k, v in vars(value).items() if isinstance(v, FunctionType)}
                    found |= {f"{name}.{key}.{method}": function for method, function in methods.items()}
    return found
