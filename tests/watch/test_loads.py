"""DC307: state whose names differ by a wrapper's prefix, loaded with `strict=False`; and what looks like it."""

import inspect

import pytest
import torch
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

import ddpcall


class Wrapped(nn.Module):
    """Names its parameters as DistributedDataParallel does."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def make():
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def load(model, state):
    return model.load_state_dict(state, strict=False)  # here


HERE = inspect.getsourcelines(load)[1] + 1


def found(use, steps=1):
    """Return the findings of a run that loads and then trains."""
    with ddpcall.watch(on_finding="record") as session:
        model = make()
        kept = use(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(steps):
            model(torch.ones(4, 2)).sum().backward()
            optimizer.step()
        del kept
    assert session.watched.faults == ()
    return [finding for finding in session.findings if finding.code == "DC307"]


def into_the_wrapper(model):
    wrapped = Wrapped(model)
    load(wrapped, make().state_dict())
    return wrapped


def into_the_plain_one(model):
    load(model, Wrapped(make()).state_dict())


def compiled(model):
    load(model, {f"_orig_mod.{name}": value for name, value in make().state_dict().items()})


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(
    ("use", "own", "given", "advice"),
    [
        (into_the_wrapper, "module.0.weight", "0.weight", "`model.module.load_state_dict(state)`"),
        (into_the_plain_one, "0.weight", "module.0.weight", '(state, "module.")`'),
        (compiled, "0.weight", "_orig_mod.0.weight", '(state, "_orig_mod.")`'),
    ],
)
def test_a_load_that_loads_nothing_is_an_error_on_its_line(use, own, given, advice, steps):
    (finding,) = found(use, steps)
    assert (finding.line, finding.severity) == (HERE, "error")
    assert "None of the 4 tensors that were to be loaded here matches a name of the model" in finding.message
    assert f"it has `{own}`, and the state `{given}`" in finding.message
    assert advice in finding.fix


def keep(model, state):
    load(model, state)
    return model


def mended(model):
    state = Wrapped(make()).state_dict()
    if load(model, state).missing_keys:
        consume_prefix_in_state_dict_if_present(state, "module.")
        model.load_state_dict(state)


def mended_from_outside(model):
    wrapped = into_the_wrapper(model)
    wrapped.load_state_dict(Wrapped(make()).state_dict())
    return wrapped


def put_in_by_hand(model):
    state, wrapped = make().state_dict(), Wrapped(model)
    if load(wrapped, state).missing_keys:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(state[name])
    return wrapped


def of_the_same_values(model):
    wrapped = Wrapped(model)
    load(wrapped, {name: value.clone() for name, value in model.state_dict().items()})
    return wrapped


def strictly(model):
    with pytest.raises(RuntimeError, match="Missing key"):
        Wrapped(model).load_state_dict(make().state_dict())


@pytest.mark.parametrize(
    "use",
    [
        lambda model: load(model, make().state_dict()),
        lambda model: keep(Wrapped(model), {"module.0.weight": torch.ones(3, 2), **make().state_dict()}),
        lambda model: load(
            model, {"module.encoder.weight": torch.ones(2, 2), "module.decoder.weight": torch.ones(3)}
        ),
        lambda model: load(model, {"module.0.weight": torch.ones(7, 2)}),
        lambda model: load(model, {}),
        mended,
        mended_from_outside,
        put_in_by_hand,
        of_the_same_values,
        strictly,
    ],
)
def test_a_load_that_loads_or_is_made_good_is_silent(use):
    assert found(use) == []
