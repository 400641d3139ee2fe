from typing import Any

import pytest
import torch
from torch import nn

from ddpcall.lab.models import Mlp
from ddpcall.probes.hooks import observe_hooks
from ddpcall.taps import (
    ReducerLog,
    SpanLog,
    SpanPlace,
    count_forwards,
    requires_gradient,
    tap_gradient_arrivals,
    time_hooks,
    wrap_method,
)


def counter() -> torch.Tensor:
    return torch.zeros((), dtype=torch.int64)


def snapshot(model: nn.Module) -> list[tuple]:
    """Return everything a tap could leave behind: every module's own `__dict__`, and every parameter's hooks."""
    modules = [
        (
            name,
            {key: repr(value) for key, value in module.__dict__.items() if key not in ("_parameters", "_buffers")},
        )
        for name, module in model.named_modules()
    ]
    parameters = [(name, parameter._post_accumulate_grad_hooks) for name, parameter in model.named_parameters()]
    return modules + parameters


def test_wrapping_a_method_is_undone_to_the_letter():
    module = nn.Linear(2, 2)
    undo = wrap_method(module, "forward", lambda original: lambda x: original(x) + 1)
    assert torch.equal(module(torch.zeros(1, 2)), module.bias[None] + 1)
    undo()
    assert "forward" not in module.__dict__


def test_a_method_the_instance_already_had_is_put_back():
    module = nn.Linear(2, 2)
    own = module.__dict__["forward"] = lambda x: x
    wrap_method(module, "forward", lambda original: lambda x: original(x) + 1)()
    assert module.__dict__["forward"] is own


def test_forwards_are_counted_whichever_way_they_are_reached():
    module, runs, differentiable = nn.Linear(2, 2), counter(), counter()
    undo = count_forwards(module, runs, differentiable)
    module(torch.zeros(1, 2))
    module.forward(torch.zeros(1, 2))
    with torch.no_grad():
        module(torch.zeros(1, 2))
    undo()
    module(torch.zeros(1, 2))
    assert (runs.item(), differentiable.item()) == (3, 2)


def test_gradients_are_found_in_nested_outputs():
    wanting = torch.ones(1, requires_grad=True)
    assert requires_gradient({"loss": [torch.ones(1), (wanting,)]})
    assert not requires_gradient((torch.ones(1), "text", None))


@pytest.mark.parametrize("fails", [False, True])
def test_the_hooks_probe_leaves_nothing_behind_also_after_an_exception(fails):
    model = Mlp()
    before = snapshot(model)
    try:
        with observe_hooks(model, model, device=torch.device("cpu"), global_hooks=True) as observer:
            observer.register()
            model(torch.zeros(2, 8, 8)).sum().backward()
            assert snapshot(model) != before
            if fails:
                raise KeyError("user code")
    except KeyError:
        assert fails
    assert snapshot(model) == before
    hooks = nn.modules.module
    assert not hooks._global_forward_hooks
    assert not hooks._global_forward_pre_hooks
    assert not hooks._global_backward_hooks
    assert hooks._global_is_full_backward_hook is None


def test_the_hooks_probe_leaves_nothing_on_a_compiled_module():
    compiled: Any = torch.compile(Mlp(), backend="eager")
    before = snapshot(compiled)
    with observe_hooks(compiled, compiled._orig_mod, device=torch.device("cpu")) as observer:
        observer.register()
    assert snapshot(compiled) == before


def test_gradient_arrivals_are_unarmed_without_a_reducer_and_armed_until_the_backward_ends():
    model, log = Mlp(), ReducerLog()
    undo = tap_gradient_arrivals(list(model.parameters()), log)
    model(torch.zeros(2, 8, 8)).sum().backward()
    assert log.take() == (0, 0, 6)
    log.arm()
    model(torch.zeros(2, 8, 8)).sum().backward()
    assert not log.armed
    model(torch.zeros(2, 8, 8)).sum().backward()
    assert log.take() == (1, 6, 6)
    undo()
    assert all(parameter._post_accumulate_grad_hooks is None for parameter in model.parameters())


def test_hooks_fire_on_call_and_not_on_forward():
    model = Mlp()
    with observe_hooks(model, model, device=torch.device("cpu"), global_hooks=True) as observer:
        observer.register()
        model(torch.zeros(2, 8, 8)).sum().backward()
        model.forward(torch.zeros(2, 8, 8)).sum().backward()
    root = {count.kind: (count.fired, count.forwards) for count in observer.evidence() if count.role == "inner"}
    assert root == {
        "forward_pre": (1, 2),
        "forward": (1, 2),
        "full_backward": (1, 2),
        "global_forward_pre": (1, 2),
        "global_forward": (1, 2),
        "global_full_backward": (1, 2),
    }
    head = {count.kind: count.fired for count in observer.evidence() if count.module == "head"}
    assert set(head.values()) == {2}


def spans_of(log):
    return [(span.kind, span.name, span.detail, span.raised) for span in log.spans]


def test_a_span_is_logged_while_the_log_records_also_when_its_body_raises():
    log = SpanLog()
    with log.span("forward", "before"):
        pass
    log.recording = True
    with pytest.raises(KeyError), log.span("forward", "outer"), log.span("forward", "inner", detail="x"):
        raise KeyError
    assert spans_of(log) == [("forward", "inner", "x", "KeyError"), ("forward", "outer", None, "KeyError")]
    inner, outer = log.spans
    assert outer.begin_ns <= inner.begin_ns <= inner.end_ns <= outer.end_ns


def test_hooks_are_timed_in_their_places_once_and_are_put_back():
    model, log, calls = nn.Linear(2, 2), SpanLog(recording=True), []
    handles = [model.register_forward_hook(lambda *_, name=name: calls.append(name)) for name in ("a", "b")]
    model.register_forward_hook(lambda *_, **__: calls.append("kwargs"), with_kwargs=True, prepend=True)
    hooks = dict(model._forward_hooks)
    place = SpanPlace(log, "hooks", "inner")
    undo, undo_again = time_hooks(model, "forward", place), time_hooks(model, "forward", place)
    model(torch.zeros(1, 2))
    assert calls == ["kwargs", "a", "b"]
    assert [span.kind for span in log.spans] == ["hook"] * 3
    handles[0].remove()
    model(torch.zeros(1, 2))
    assert calls[3:] == ["kwargs", "b"]
    undo()
    undo_again()
    model(torch.zeros(1, 2))
    assert len(log.spans) == 5
    assert list(model._forward_hooks.values()) == [hooks[key] for key in model._forward_hooks]
    handles[1].remove()
    assert len(model._forward_hooks) == 1


def test_a_forward_logs_spans_only_while_recording_and_not_in_compiled_code():
    model, log = nn.Linear(2, 2), SpanLog()
    counter = torch.zeros((), dtype=torch.int64)
    undo = count_forwards(model, counter, torch.zeros(()), SpanPlace(log, "Linear", "inner"))
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    model(torch.zeros(1, 2))
    log.recording = True
    compiled(torch.zeros(1, 2))
    assert (int(counter), spans_of(log)) == (2, [])
    model.forward(torch.zeros(1, 2))
    assert (int(counter), spans_of(log)) == (3, [("forward", "Linear", None, None)])
    undo()
    torch.compiler.reset()
