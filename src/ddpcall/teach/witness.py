"""What a grader wants to know of one rank, seen while a student's script runs in it, and told as it happens.

The witness sits on torch, not on the script: on DDP's constructor, on gradients before they are accumulated, on
optimizer steps, on forwards of wrapped models and on hooks as they are registered. Each fact goes at once to the
grading process, so that a rank that leaves early has said what it did, and nothing more.

Blind to: updates without a torch optimizer, gradients taken with `torch.autograd.grad`, `type(m).forward(m, x)`,
and code that means to deceive it from inside the same process (docs/teaching.md).
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import socket
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ddpcall.replicas import digest_tensor
from ddpcall.taps import ForwardTap, ReducerLog, find_tensors, in_backward, replace_attribute, tap_reducer
from ddpcall.teach.testimony import GO

PROJECTIONS = 8  # numbers kept of a gradient
MOST_ROWS = 1024  # samples of a batch that are told apart
SOCKET, FINDINGS = "DDPCALL_GRADE_SOCKET", "DDPCALL_GRADE_FINDINGS"
_HOOKS = ("register_forward_pre_hook", "register_forward_hook", "register_full_backward_hook")


class Line:
    """The way to the grading process: one JSON object a line over a Unix socket."""

    def __init__(self, path: str) -> None:
        """Connect.

        Raises:
            OSError: Nobody listens there.
        """
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(path)

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def wait_for_go(self) -> None:
        """Wait until all ranks have connected, or the grader is gone."""
        self._socket.recv(len(GO))

    def say(self, kind: str, **facts: Any) -> None:
        """Send one fact; where nobody listens any more, nothing happens."""
        with contextlib.suppress(OSError):
            self._socket.sendall(json.dumps({"kind": kind, **facts}).encode() + b"\n")


@dataclass
class _Tracked:
    """One parameter of a wrapped model.

    Attributes:
        parameter: Kept, so that its id stays its own.
        name: As in the wrapped module.
        reducers: One log for each DDP that owns it.
        hooked: Whether its gradients are seen.
        local: The sum of this rank's gradients since `.grad` was last empty.
        arrivals: Gradients since the last step, `[while armed, while not]`.
    """

    parameter: nn.Parameter
    name: str
    reducers: list[ReducerLog] = field(default_factory=list)
    hooked: bool = False
    local: Tensor | None = None
    arrivals: list[int] = field(default_factory=lambda: [0, 0])


class Witness:
    """Watches this process from `put_on` to `testify`."""

    def __init__(self, say: Callable[..., None]) -> None:
        """Take the function that facts are told to: `say(kind, **facts)`."""
        self._say = say
        self._tracked: dict[int, _Tracked] = {}
        self._models: list[nn.Module] = []
        self._fired: Counter[str] = Counter()
        self._before: dict[int, list[dict[str, Any]]] = {}
        self._begun = False
        self._forwards = ForwardTap(self._see_forward, lambda: False)
        self._functions = snapshot_functions()

    def put_on(self) -> None:
        """Start watching; nothing takes it off but the end of the process."""
        construct = DistributedDataParallel.__init__

        @functools.wraps(construct)
        def see_wrapping(ddp: Any, *args: Any, **kwargs: Any) -> None:
            construct(ddp, *args, **kwargs)
            self._see_wrapping(ddp)

        replace_attribute(DistributedDataParallel, "__init__", see_wrapping)
        for name in _HOOKS:
            replace_attribute(nn.Module, name, self._counting(getattr(nn.Module, name)))
        register_optimizer_step_pre_hook(lambda optimizer, *_: self._before_step(optimizer))
        register_optimizer_step_post_hook(lambda optimizer, *_: self._after_step(optimizer))

    # ---- what is wrapped, and what runs through it -----------------------------------------------------------

    def _see_wrapping(self, ddp: DistributedDataParallel) -> None:
        inner, log = ddp.module, ReducerLog()
        tap_reducer(ddp, log)
        if all(inner is not model for model in self._models):
            self._models.append(inner)
            self._forwards.put(inner)
        for name, parameter in inner.named_parameters():
            tracked = self._tracked.setdefault(id(parameter), _Tracked(parameter, name))
            if parameter.requires_grad and not tracked.hooked:
                tracked.hooked = True
                parameter.register_hook(functools.partial(self._see_gradient, tracked))
            if parameter.requires_grad and name not in ddp.parameters_to_ignore:
                tracked.reducers.append(log)
        modules = [[name, repr(module)] for name, module in inner.named_modules()]
        self._say("wrap", modules=modules, ranks=dist.get_world_size(ddp.process_group))

    def _see_forward(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        tensors = [tensor for tensor in find_tensors([args, kwargs]) if tensor.dim() > 0]
        rows = digest_rows(tensors[0]) if tensors else []
        self._say("forward", gradients=torch.is_grad_enabled(), training=module.training, rows=rows)
        return original(*args, **kwargs)

    def _see_gradient(self, tracked: _Tracked, gradient: Tensor) -> None:
        """Note this rank's own gradient, before it is added to `.grad` and before anything is reduced."""
        parameter = tracked.parameter
        armed = [log for log in tracked.reducers if log.armed]
        for log in armed:
            log.arrive()
        tracked.arrivals[0 if armed else 1] += 1
        own = gradient.detach().cpu().double()
        is_first = parameter.grad is None or not parameter.grad.any()
        tracked.local = own.clone() if is_first or tracked.local is None else tracked.local + own

    def _counting(self, register: Callable[..., Any]) -> Callable[..., Any]:
        """Count what fires of the hooks registered from now on, by the module's role."""

        @functools.wraps(register)
        def register_counted(module: nn.Module, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            @functools.wraps(hook, assigned=("__name__", "__doc__"), updated=())
            def counted(*given: Any, **named: Any) -> Any:
                if torch.is_grad_enabled() or in_backward():
                    self._fired[self._role(module)] += 1
                return hook(*given, **named)

            return register(module, counted, *args, **kwargs)

        return register_counted

    def _role(self, module: nn.Module) -> str:
        if isinstance(module, DistributedDataParallel):
            return "wrapped"
        return "inner" if any(module is model for model in self._models) else "below"

    # ---- optimizer steps -------------------------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer) -> None:
        if not self._begun:
            self._begun = True
            self._say("begin", state=self._state())
        self._before[id(optimizer)] = [
            self._describe(parameter, group)
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]

    def _describe(self, parameter: nn.Parameter, group: dict[str, Any]) -> dict[str, Any]:
        tracked = self._tracked.get(id(parameter))
        if tracked is None:
            tracked = _Tracked(parameter, f"(not wrapped) {tuple(parameter.shape)}")
        armed, unarmed = tracked.arrivals
        tracked.arrivals = [0, 0]
        return {
            "name": tracked.name,
            "used": project(parameter.grad),
            "local": project(tracked.local),
            "armed": armed,
            "unarmed": unarmed,
            "lr": float(group["lr"]) if "lr" in group else None,
            "before": digest_tensor(parameter.detach()),
        }

    def _after_step(self, optimizer: Optimizer) -> None:
        described = self._before.pop(id(optimizer), [])
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        for record, parameter in zip(described, parameters, strict=False):
            record["after"] = digest_tensor(parameter.detach())
        modules = [(name, module) for model in self._models[-1:] for name, module in model.named_modules()]
        self._say(
            "step",
            world_size=dist.get_world_size() if dist.is_initialized() else 1,
            parameters=described,
            evaluating=[name for name, module in modules if not module.training],
            fired=dict(self._fired),
        )
        self._fired.clear()

    # ---- the end ---------------------------------------------------------------------------------------------

    def testify(self, code: Any, error: str | None) -> None:
        """Tell how the script ended and what the model has become.

        Args:
            code: What it left with, as for `sys.exit`.
            error: The exception that ended it, in a line.
        """
        tampered = changed_functions(self._functions)
        self._say("end", code=code if isinstance(code, int) else int(code is not None), error=error,
                  tampered=tampered, state=self._state())  # fmt: skip

    def _state(self) -> list[dict[str, Any]]:
        """Return every wrapped model's parameters and buffers: by name, float32 values in base64, and shape."""
        return [{name: pack(tensor) for name, tensor in model.state_dict().items()} for model in self._models]


def pack(tensor: Tensor) -> dict[str, Any]:
    """Return a tensor as JSON: shape, and values as float32 in base64."""
    values = tensor.detach().cpu().float().contiguous()
    return {"shape": list(values.shape), "values": base64.b64encode(values.numpy().tobytes()).decode()}


def project(tensor: Tensor | None) -> list[float] | None:
    """Return a gradient as `PROJECTIONS` numbers, linear in it: the mean of projections is the mean's projection.

    Args:
        tensor: Any shape; None for no gradient.
    """
    if tensor is None:
        return None
    values = tensor.detach().cpu().double().flatten()
    return (_signs(values.numel()) @ values).tolist()


@functools.lru_cache(maxsize=64)
def _signs(length: int) -> Tensor:
    """Return random signs of shape (PROJECTIONS, length), the same on every rank."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, 2, (PROJECTIONS, length), generator=generator).double() * 2 - 1


def digest_rows(batch: Tensor) -> list[str]:
    """Return a digest of each sample of a batch of shape (batch, *features)."""
    rows = batch.detach().cpu().contiguous()[:MOST_ROWS]
    return [xxhash.xxh3_64_hexdigest(row.float().numpy().tobytes()) for row in rows]


def snapshot_functions() -> dict[tuple[str, str], Any]:
    """Return the functions and classes of every ddpcall module loaded now, methods included."""
    found: dict[tuple[str, str], Any] = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != "ddpcall":
            continue
        for key, value in list(vars(module).items()):
            if isinstance(value, FunctionType | type):
                found[name, key] = value
            if isinstance(value, type) and value.__module__.startswith("ddpcall"):
                methods = {k: v for k, v in vars(value).items() if isinstance(v, FunctionType)}
                found |= {(name, f"{key}.{method}"): function for method, function in methods.items()}
    return found


def changed_functions(before: dict[tuple[str, str], Any]) -> list[str]:
    """Return the names of what is no longer what it was."""
    now = snapshot_functions()
    return sorted(
        f"{module}.{name}" for (module, name), value in before.items() if now.get((module, name)) is not value
    )
