"""Claims about what a `forward` may be, and about tools that look on: the profiler, compilers, devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddpcall.teach.claims.claim import claim, require, true_if, true_in_parts
from ddpcall.teach.question import DEPENDS, FALSE, TRUE, Answer


class SignBranch(nn.Module):
    """A `forward` whose branch depends on the data: doubles what sums to more than zero, negates the rest."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x * 2
        return -x


def run_data_dependent_forward(module_class: type[nn.Module] = SignBranch) -> dict[str, Any]:
    """Prepare a forward in every way, those that need an example with a positive one; run it on both signs."""
    positive, negative = torch.ones(1, 2), -torch.ones(1, 2)
    trace: Any = getattr(torch.jit, "trace", None)
    preparations: dict[str, Callable[[nn.Module], Any]] = {
        "eager": lambda model: model,
        "torch.compile": lambda model: torch.compile(model, backend="eager"),
        "torch.compile(fullgraph=True)": lambda model: torch.compile(model, backend="eager", fullgraph=True),
        "torch.export": lambda model: torch.export.export(model, (positive,)).module(),
        "torch.jit.trace": lambda model: trace(model, positive),
    }
    if trace is None:
        del preparations["torch.jit.trace"]
    errors, raised, right = {}, {}, module_class()
    for name, prepare in preparations.items():
        torch.compiler.reset()  # or fullgraph would be given the code compiled without it
        try:
            prepared = prepare(module_class())
            errors[name] = max((prepared(x) - right(x)).abs().max().item() for x in (positive, negative))
        except Exception as error:
            raised[name] = type(error).__name__
    return {"errors": errors, "raised": raised}


@claim("FM-4", "`forward` may hold any Python, branches on the data included", DEPENDS, run_data_dependent_forward)
def judge_any_python(errors: dict[str, float], raised: dict[str, str]) -> Answer:
    """True if every way is right, false if eager is not, depends otherwise."""
    right = [name for name, error in errors.items() if error == 0]
    wrong = [f"{name} off by {error:.3g}" for name, error in errors.items() if error != 0]
    wrong += [f"{name} raises {error}" for name, error in raised.items()]
    return Answer(
        true_in_parts(["eager" in right, not wrong]) if "eager" in right else FALSE,
        f"a branch on the data is right in {len(right)} of {len(right) + len(wrong)} ways to run it "
        f"({', '.join(right)}); {'; '.join(wrong) or 'none fails'}",
    )


def split_across_devices(moves: bool = True) -> dict[str, Any]:
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
    seen: dict[str, Any] = {"devices": (first, second), "output": "", "shape": (), "gradients": (), "raised": ""}
    try:
        output = model(torch.ones(1, 2, device=first))
    except RuntimeError as error:
        return {**seen, "raised": str(error).splitlines()[0]}
    if second != "meta":  # a meta tensor has no values to send back
        output.sum().backward()
    gradients = [half.weight.grad for half in (model.first, model.second)]
    places = tuple(str(gradient.device) for gradient in gradients if gradient is not None)
    return {**seen, "output": str(output.device), "shape": tuple(output.shape), "gradients": places}


@claim("FM-7", "`forward` can spread a model over several devices", TRUE, split_across_devices)
def judge_can_split(
    devices: tuple[str, str], output: str, shape: tuple[int, ...], gradients: tuple[str, ...], raised: str
) -> Answer:
    """True if the output is on the second device, and so are its gradients where it holds values."""
    holds = not raised and output == devices[1] and (gradients == devices or "meta" in devices)
    backward = f"gradients on {', '.join(gradients)}" if gradients else "shapes only, so no backward"
    outcome = f"raised “{raised}”" if raised else f"gave {shape} on {output}, {backward}"
    return Answer(true_if(holds), f"with halves on {devices[0]} and {devices[1]} the forward {outcome}")


def profile_both_paths(paths: tuple[str, ...] = ("call", "forward")) -> dict[str, Any]:
    """Profile a module reached by call and by forward, and count its operations."""
    model, x = nn.Sequential(nn.Linear(4, 2)), torch.ones(3, 4)
    operators, scopes, flops = {}, {}, {}
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
    return {"operators": operators, "scopes": scopes, "flops": flops}


@claim("CF-6", "the profiler relies on `__call__`", DEPENDS, profile_both_paths)
def judge_profiler_relies_on_call(
    operators: dict[str, int], scopes: dict[str, tuple[str, ...]], flops: dict[str, int]
) -> Answer:
    """True if operators are lost, depends if only module scopes are, false if nothing is."""
    require(operators["call"] > 0 and bool(scopes["call"]), "by call operators and modules are recorded")
    loses_scopes = len(scopes["forward"]) < len(scopes["call"])
    return Answer(
        TRUE if operators["forward"] < operators["call"] else true_in_parts((False, loses_scopes)),
        f"by call and by forward the profiler recorded {operators['call']} and {operators['forward']} matrix "
        f"product(s) and named the modules {', '.join(scopes['call'])} and "
        f"{', '.join(scopes['forward']) or 'none'}; FlopCounterMode counted {flops['call']} and "
        f"{flops['forward']} operations",
    )
