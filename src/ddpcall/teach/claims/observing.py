"""Claims about what a `forward` may be, and about tools that look on: the profiler, compilers, devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddpcall.teach.claims.claim import Claim, Ruling, Verdict, require


class SignBranch(nn.Module):
    """A `forward` whose branch depends on the data: doubles what sums to more than zero, negates the rest."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x * 2
        return -x


@dataclass(frozen=True)
class ControlFlow:
    """What became of both branches, by way to run: the largest error, or what it raised."""

    errors: dict[str, float]
    raised: dict[str, str]


def run_data_dependent_forward(module_class: type[nn.Module] = SignBranch) -> ControlFlow:
    """Prepare a forward in every way, those that need an example with a positive one; run it on both signs."""
    positive, negative = torch.ones(1, 2), -torch.ones(1, 2)
    trace: Any = torch.jit.trace if hasattr(torch.jit, "trace") else None
    ways: dict[str, Callable[[nn.Module], Any]] = {
        "eager": lambda model: model,
        "torch.compile": lambda model: torch.compile(model, backend="eager"),
        "torch.compile(fullgraph=True)": lambda model: torch.compile(model, backend="eager", fullgraph=True),
        "torch.export": lambda model: torch.export.export(model, (positive,)).module(),
        "torch.jit.trace": lambda model: trace(model, positive),
    }
    if trace is None:
        del ways["torch.jit.trace"]
    errors, raised, right = {}, {}, module_class()
    for name, prepare in ways.items():
        torch.compiler.reset()  # or fullgraph would be given the code compiled without it
        try:
            prepared = prepare(module_class())
            errors[name] = max((prepared(x) - right(x)).abs().max().item() for x in (positive, negative))
        except Exception as error:
            raised[name] = type(error).__name__
    return ControlFlow(errors, raised)


def judge_any_python(seen: ControlFlow) -> Ruling:
    """True if every way is right, false if eager is not, depends otherwise."""
    right = [name for name, error in seen.errors.items() if error == 0]
    wrong = [f"{name} off by {error:.3g}" for name, error in seen.errors.items() if error != 0]
    refused = [f"{name} raises {error}" for name, error in seen.raised.items()]
    verdict = Verdict.FALSE if "eager" not in right else Verdict.DEPENDS if wrong or refused else Verdict.TRUE
    return Ruling(
        verdict,
        f"a branch on the data is right in {len(right)} of {len(seen.errors) + len(seen.raised)} ways to run it "
        f"({', '.join(right)}); {'; '.join(wrong + refused) or 'none fails'}",
    )


@dataclass(frozen=True)
class Split:
    """A model in two halves.

    Attributes:
        devices: Where the halves live.
        output: Where the output came out, or "".
        shape: The output's shape.
        gradients: Where the gradients of the two halves are; empty if one device holds no values.
        raised: What the forward raised, or "".
    """

    devices: tuple[str, str]
    output: str
    shape: tuple[int, ...]
    gradients: tuple[str, ...]
    raised: str


def split_across_devices(moves: bool = True) -> Split:
    """Put two layers on two devices, and let forward move what goes from one to the other (or not)."""
    gpus = [f"cuda:{index}" for index in range(min(2, torch.cuda.device_count()))]
    first, second = ["cpu", *gpus][-2:] if gpus else ("cpu", "meta")

    class TwoHalves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 2, device=first)
            self.second = nn.Linear(2, 2, device=second)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            return self.second(hidden.to(second) if moves else hidden)

    model = TwoHalves()
    try:
        output = model(torch.ones(1, 2, device=first))
    except RuntimeError as error:
        return Split((first, second), "", (), (), str(error).splitlines()[0])
    if second != "meta":  # a meta tensor has no values to send back
        output.sum().backward()
    gradients = [half.weight.grad for half in (model.first, model.second)]
    devices = tuple(str(gradient.device) for gradient in gradients if gradient is not None)
    return Split((first, second), str(output.device), tuple(output.shape), devices, "")


def judge_can_split(seen: Split) -> Ruling:
    """True if the output is on the second device, and so are its gradients where it holds values."""
    backward_right = seen.gradients == seen.devices or "meta" in seen.devices
    holds = not seen.raised and seen.output == seen.devices[1] and backward_right
    gradients = f"gradients on {', '.join(seen.gradients)}" if seen.gradients else "shapes only, so no backward"
    outcome = f"gave {seen.shape} on {seen.output}, {gradients}" if not seen.raised else f"raised “{seen.raised}”"
    return Ruling(
        Verdict.TRUE if holds else Verdict.FALSE,
        f"with halves on {seen.devices[0]} and {seen.devices[1]} the forward {outcome}",
    )


@dataclass(frozen=True)
class Profiled:
    """What tools saw of one parent and its child, by path to the parent.

    Attributes:
        operators: `aten::addmm` events in the profile.
        scopes: Modules that the profile names.
        flops: Floating point operations that FlopCounterMode counted in all.
        flop_scopes: Modules it attributes them to.
    """

    operators: dict[str, int]
    scopes: dict[str, tuple[str, ...]]
    flops: dict[str, int]
    flop_scopes: dict[str, tuple[str, ...]]


def profile_both_paths(paths: tuple[str, ...] = ("call", "forward")) -> Profiled:
    """Profile a module reached by call and by forward, and count its operations."""
    model, x = nn.Sequential(nn.Linear(4, 2)), torch.ones(3, 4)
    operators, scopes, flops, flop_scopes = {}, {}, {}, {}
    for path in paths:
        run = model if path == "call" else model.forward
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=cpu, with_stack=True) as profile:
            run(x)
        with FlopCounterMode(display=False) as counter:
            run(x)
        names = [event.name for event in profile.events() or ()]
        operators[path] = names.count("aten::addmm")
        scopes[path] = tuple(name.split(": ")[1] for name in names if name.startswith("nn.Module: "))
        flops[path] = counter.get_total_flops()
        flop_scopes[path] = tuple(sorted(name for name in counter.get_flop_counts() if name != "Global"))
    return Profiled(operators, scopes, flops, flop_scopes)


def judge_profiler_relies_on_call(seen: Profiled) -> Ruling:
    """True if operators are lost, depends if only module scopes are, false if nothing is."""
    require(seen.operators["call"] > 0 and bool(seen.scopes["call"]), "by call operators and modules are recorded")
    operators_lost = seen.operators["forward"] < seen.operators["call"]
    scopes_lost = len(seen.scopes["forward"]) < len(seen.scopes["call"])
    verdict = Verdict.TRUE if operators_lost else Verdict.DEPENDS if scopes_lost else Verdict.FALSE
    return Ruling(
        verdict,
        f"by call and by forward the profiler recorded {seen.operators['call']} and "
        f"{seen.operators['forward']} matrix "
        f"product(s) and named the modules {', '.join(seen.scopes['call'])} and "
        f"{', '.join(seen.scopes['forward']) or 'none'}; FlopCounterMode counted {seen.flops['call']} and "
        f"{seen.flops['forward']} operations",
    )


CLAIMS = (
    Claim(
        id="FM-4",
        text="`forward` may hold any Python, branches on the data included",
        first_look=Verdict.DEPENDS,
        experiment=run_data_dependent_forward,
        judge=judge_any_python,
    ),
    Claim(
        id="FM-7",
        text="`forward` can spread a model over several devices",
        first_look=Verdict.TRUE,
        experiment=split_across_devices,
        judge=judge_can_split,
    ),
    Claim(
        id="CF-6",
        text="the profiler relies on `__call__`",
        first_look=Verdict.DEPENDS,
        experiment=profile_both_paths,
        judge=judge_profiler_relies_on_call,
    ),
)
