"""What one process can show: skipped hooks, stale weights, compiled code and precision bypassed."""

import inspect
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune, spectral_norm, weight_norm

import ddpcall
from ddpcall.watch.sensors import earlier


@pytest.fixture
def session(tmp_path):
    with ddpcall.watch(on_finding="record", json=tmp_path / "f.json") as session:
        yield session


def lines(test, text="here"):
    source, first = inspect.getsourcelines(test)
    return [first + offset for offset, line in enumerate(source) if line.rstrip().endswith(f"# {text}")]


def found(session):
    return [(finding.code, finding.line) for finding in session.findings]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.act = nn.ReLU()
        self.second = nn.Linear(8, 2)

    def forward(self, x):
        return self.second(self.act(self.first(x)))

    def features(self, x):
        return self.act(self.first(x))


# ---- hooks ------------------------------------------------------------------------------------------------------

REGISTER = ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]


@pytest.mark.parametrize("register", REGISTER)
def test_forward_past_hooks_is_found(session, register):
    net = Net()
    getattr(net.first, register)(lambda *_: None)
    net(torch.ones(1, 4))
    assert found(session) == []
    net.first.forward(torch.ones(1, 4, requires_grad=True))  # here
    assert found(session) == [("DC301", *lines(test_forward_past_hooks_is_found))]


def test_forward_without_hooks_or_after_their_removal_is_silent(session):
    net = Net()
    net.forward(torch.ones(1, 4))
    net.first.register_forward_hook(lambda *_: None).remove()
    net.first.forward(torch.ones(1, 4))
    assert found(session) == []


def test_forward_that_something_stands_around_is_silent(session):
    """A forward replaced by a function that calls the old one, as adapters and accelerate do."""
    net = Net()
    net.register_forward_hook(lambda *_: None)
    original = net.forward
    net.forward = lambda x: 2 * original(x)
    net(torch.ones(1, 4))
    assert found(session) == []


class Derived(Net):
    def forward(self, x):
        return 2 * super().forward(x)


def test_super_forward_is_silent(session):
    net = Derived()
    net.register_forward_hook(lambda *_: None)
    net(torch.ones(1, 4))
    assert found(session) == []


def norm(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the legacy norms are deprecated, and say so
        if kind == "prune":
            return prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=0.5)
        return {"weight_norm": weight_norm, "spectral_norm": spectral_norm}[kind](nn.Linear(4, 4))


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "prune"])
def test_a_weight_that_a_hook_keeps_fresh_is_found_stale(session, kind):
    layer = norm(kind)
    layer(torch.ones(1, 4))
    assert found(session) == []
    layer.forward(torch.ones(1, 4))  # here
    assert found(session) == [("DC305", *lines(test_a_weight_that_a_hook_keeps_fresh_is_found_stale))]


@pytest.mark.parametrize(("kind", "moved"), [("weight_norm", "weight_g"), ("spectral_norm", "weight_orig")])
def test_under_no_grad_a_weight_is_stale_only_if_another_would_be_made(session, kind, moved):
    layer: Any = norm(kind)
    with torch.no_grad():
        layer(torch.ones(1, 4))
        layer.forward(torch.ones(1, 4))
        assert found(session) == []
        getattr(layer, moved)[0].mul_(2)
        layer.forward(torch.ones(1, 4))  # here
    assert found(session) == [
        ("DC305", *lines(test_under_no_grad_a_weight_is_stale_only_if_another_would_be_made))
    ]


def test_the_parametrization_is_silent(session):
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    layer.forward(torch.ones(1, 4))
    assert found(session) == []


# ---- compiled code ----------------------------------------------------------------------------------------------


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    net = Net()
    yield SimpleNamespace(net=net, call=torch.compile(net, backend="eager"))
    torch._dynamo.reset()


def test_calling_the_compiled_object_is_silent(session, compiled):
    for _ in range(2):
        compiled.call(torch.ones(2, 4)).sum().backward()
        compiled.call.forward(torch.ones(2, 4)).sum().backward()
    assert found(session) == []


def test_calling_the_original_is_found(session, compiled):
    compiled.call(torch.ones(2, 4))
    compiled.net(torch.ones(2, 4))  # here
    compiled.call._orig_mod(torch.ones(2, 4))  # here
    compiled.call.features(torch.ones(2, 4))  # here
    assert found(session) == [("DC302", line) for line in lines(test_calling_the_original_is_found)]


def test_evaluating_the_original_is_silent_when_the_compiled_object_is_used(session, compiled):
    compiled.call(torch.ones(2, 4))
    with torch.no_grad():
        compiled.net(torch.ones(2, 4))
    session.close()
    assert found(session) == []


def test_evaluating_the_original_is_found_when_nothing_is_compiled(session, compiled):
    with torch.no_grad():
        compiled.net(torch.ones(2, 4))  # here
    session.close()
    (line,) = lines(test_evaluating_the_original_is_found_when_nothing_is_compiled)
    assert found(session) == [("DC302", line)]


def test_forward_of_a_module_compiled_in_place_is_found(session):
    torch._dynamo.reset()
    net = Net()
    net.compile(backend="eager")
    net(torch.ones(2, 4))
    assert found(session) == []
    net.forward(torch.ones(2, 4))  # here
    assert found(session) == [("DC302", *lines(test_forward_of_a_module_compiled_in_place_is_found))]


@pytest.mark.parametrize("recompiled", [False, True])
def test_a_hook_that_compiled_code_ignores_is_found_and_one_that_fires_is_not(session, compiled, recompiled):
    fired = []
    compiled.call(torch.ones(2, 4))
    compiled.net.act.register_forward_hook(lambda *_: fired.append("late"))  # here
    if recompiled:
        torch._dynamo.reset()
    for _ in range(2):
        compiled.call(torch.ones(2, 4))
    assert bool(fired) is recompiled, "with the watch as without it"
    session.close()
    (line,) = lines(test_a_hook_that_compiled_code_ignores_is_found_and_one_that_fires_is_not)
    assert found(session) == ([] if recompiled else [("DC303", line)])


# ---- crashes of sharded models ---------------------------------------------------------------------------------


class Sharded(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        raise RuntimeError("aten.mm.default: got mixed torch.Tensor and DTensor, need to convert all")


def pre_forward(*_):
    """Stands for the hook that gathers the parameters."""


pre_forward.__module__ = "torch.distributed.fsdp._fully_shard._fsdp_state"


@pytest.mark.parametrize(("enter", "explained"), [("forward", True), ("call", False)])
def test_a_crash_is_a_bypasss_only_if_the_gathering_hook_was_passed(session, enter, explained):
    model = Sharded()
    model.register_forward_pre_hook(pre_forward)
    with pytest.raises(RuntimeError, match="mixed") as caught:
        model.forward(torch.ones(1, 2)) if enter == "forward" else model(torch.ones(1, 2))
    session.explain_crash(ValueError("another"))
    assert found(session) == []
    session.explain_crash(caught.value)
    assert [code for code, _ in found(session)] == ["DC306"] * explained


# ---- sessions ------------------------------------------------------------------------------------------------


def test_two_watches_in_one_process_are_refused(session):
    with pytest.raises(RuntimeError, match="Another ddpcall watch is running"):
        ddpcall.watch()


def test_a_closed_session_can_be_closed_again_and_another_started(tmp_path):
    first = ddpcall.watch(on_finding="record")
    first.close()
    first.close()
    with ddpcall.watch(on_finding="record") as second:
        assert second.findings == []


def test_an_error_of_the_watchs_own_does_not_reach_the_script(session, capsys, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(type(session._attachment._steps), "_judge", fail)
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters())
    for _ in range(2):
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    error = capsys.readouterr().err
    assert error.count("an error of its own") == 1
    assert "ZeroDivisionError: ours" in error


# ---- made before the watch began --------------------------------------------------------------------------------


def begin(tmp_path):
    return ddpcall.watch(on_finding="record", json=tmp_path / "f.json", every=0)


def test_hooks_registered_before_the_watch_began_count(tmp_path):
    net = Net()
    net.first.register_forward_hook(lambda *_: None)
    with begin(tmp_path) as session:
        net(torch.ones(1, 4))
        assert found(session) == []
        net.first.forward(torch.ones(1, 4))  # here
    assert found(session) == [("DC301", *lines(test_hooks_registered_before_the_watch_began_count))]
    assert "forward" not in vars(net.first)


@pytest.mark.parametrize(
    "keep", [weight_norm, spectral_norm, lambda layer: prune.random_unstructured(layer, "weight", 0.5)]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_norms_and_pruning_set_up_before_the_watch_began_count(tmp_path, keep):
    net = Net()
    keep(net.first)
    with begin(tmp_path) as session:
        net(torch.ones(1, 4))
        assert found(session) == []
        net.first.forward(torch.ones(1, 4))  # here
    assert found(session) == [("DC305", *lines(test_norms_and_pruning_set_up_before_the_watch_began_count))]


@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_compiled_before_the_watch_began_is_followed(tmp_path, in_place):
    net = Net()
    if in_place:
        net.compile(backend="eager")
    compiled = net if in_place else torch.compile(net, backend="eager")
    expected = compiled(torch.ones(1, 4))
    with begin(tmp_path) as session:
        assert torch.equal(compiled(torch.ones(1, 4)), expected)
        assert found(session) == []
        net.forward(torch.ones(1, 4))  # here
    assert found(session) == [("DC302", *lines(test_a_model_compiled_before_the_watch_began_is_followed))]
    assert torch.equal(compiled(torch.ones(1, 4)), expected)


def test_a_model_that_accelerate_prepared_before_the_watch_began_is_followed(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    net = Net()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    accelerator.prepare(net)
    with begin(tmp_path) as session:
        net(torch.ones(1, 4))
        assert found(session) == []
        net.first(torch.ones(1, 4))  # here
    this = test_a_model_that_accelerate_prepared_before_the_watch_began_is_followed
    assert found(session) == [("DC304", *lines(this))]
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_to_hand_a_watched_model_over_again_changes_nothing(tmp_path):
    net = Net()
    with begin(tmp_path) as session:
        compiled = torch.compile(net, backend="eager")
        net.first.register_forward_hook(lambda *_: None)
        compiled(torch.ones(1, 4))
        session.adopt(compiled)  # pyright: ignore[reportArgumentType]
        compiled(torch.ones(1, 4))
        assert found(session) == []
        net.first.forward(torch.ones(1, 4))  # here
    this = test_to_hand_a_watched_model_over_again_changes_nothing
    assert sorted(found(session)) == [("DC301", *lines(this)), ("DC302", *lines(this))]


def test_a_search_that_takes_too_long_is_given_up_and_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(earlier, "SCAN_S", -1.0)
    net = Net()
    net.first.register_forward_hook(lambda *_: None)
    with begin(tmp_path) as session:
        net.first.forward(torch.ones(1, 4))
        assert list(session.not_attached) == ["models made before the watch began"]
    assert "too many objects" in capsys.readouterr().err
    with ddpcall.watch(net, on_finding="record", every=0) as session:
        net.first.forward(torch.ones(1, 4))
        assert [code for code, _ in found(session)] == ["DC301"]


def test_objects_of_strangers_are_not_touched(tmp_path):
    class Proxy:
        @property
        def __class__(self):
            raise AssertionError("looked at")

        def __getattr__(self, name):
            raise AssertionError("looked at")

    proxies = [Proxy()]
    unfinished = Net.__new__(Net)
    with begin(tmp_path) as session:
        assert session.not_attached == {}
    del proxies, unfinished
