"""Every part of the vitals changes with what it stands for, and with nothing else."""

import collections
import copy
import dataclasses
import random

import numpy as np
import pytest
import torch
from torch import nn

from ddpcall.watch.compare.vitals import MAX_COPIED_BYTES, PARTS, REPLICATED_PARTS, Vitals, VitalsTaker


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 2, bias=False)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def optimizer(model: Model) -> torch.optim.Optimizer:
    groups = [{"params": model.encoder.parameters()}, {"params": model.head.parameters(), "lr": 0.1}]
    return torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99))


@pytest.fixture
def batch() -> dict:
    return {"x": torch.randn(3, 4), "y": [torch.tensor([1, 2]), "text"]}


def swap_parameters(model, optimizer, batch):
    first, second = model.encoder.weight.data[0].clone(), model.encoder.weight.data[1].clone()
    model.encoder.weight.data[0], model.encoder.weight.data[1] = second, first


def flip_a_bit(model, optimizer, batch):
    model.head.weight.data.view(torch.int32)[1, 5] ^= 1


def replace_a_parameter(model, optimizer, batch):
    model.head.weight = nn.Parameter(model.head.weight.detach() + 1)


def replace_a_module(model, optimizer, batch):
    model.head = nn.Linear(8, 2, bias=False)


def add_a_parameter(model, optimizer, batch):
    model.extra = nn.Parameter(torch.zeros(1))


def set_data(model, optimizer, batch):
    model.head.weight.data = torch.zeros(2, 8)


def change_a_buffer(model, optimizer, batch):
    model.norm.running_var[0] += 1


def replace_a_buffer(model, optimizer, batch):
    model.norm.running_mean = torch.ones(8)


def count_a_batch(model, optimizer, batch):
    model.norm.num_batches_tracked += 1


def add_a_buffer(model, optimizer, batch):
    model.register_buffer("mask", torch.ones(2))


def evaluate_dropout(model, optimizer, batch):
    model.dropout.eval()


def evaluate_all(model, optimizer, batch):
    model.eval()


def evaluate_the_root_alone(model, optimizer, batch):
    model.training = False


def change_learning_rate(model, optimizer, batch):
    optimizer.param_groups[1]["lr"] = 0.1 + 2**-50


def change_betas(model, optimizer, batch):
    optimizer.param_groups[0]["betas"] = (0.9, 0.98)


def change_weight_decay(model, optimizer, batch):
    optimizer.param_groups[0]["weight_decay"] = 0


def use_a_tensor_as_learning_rate(model, optimizer, batch):
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)


def add_a_group(model, optimizer, batch):
    optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)]})


def draw(model, optimizer, batch):
    torch.rand(1)


def reseed(model, optimizer, batch):
    torch.manual_seed(123)


def change_the_batch(model, optimizer, batch):
    batch["x"][2, 3] += 1


def change_a_nested_label(model, optimizer, batch):
    batch["y"][0] = torch.tensor([2, 1])


def change_a_text(model, optimizer, batch):
    batch["y"][1] = "texts"


def rename_an_input(model, optimizer, batch):
    batch["z"] = batch.pop("y")


CHANGES = {
    "parameters": [swap_parameters, flip_a_bit, replace_a_parameter, add_a_parameter, set_data],
    "buffers": [change_a_buffer, replace_a_buffer, count_a_batch, add_a_buffer],
    "modes": [evaluate_dropout, evaluate_all, evaluate_the_root_alone],
    "optimizer": [
        change_learning_rate,
        change_betas,
        change_weight_decay,
        use_a_tensor_as_learning_rate,
        add_a_group,
    ],
    "rng": [draw, reseed],
    "batch": [change_the_batch, change_a_nested_label, change_a_text, rename_an_input],
}
CASES = [(part, change) for part, changes in CHANGES.items() for change in changes]


@pytest.mark.parametrize(("part", "change"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_a_change_shows_in_its_part_and_in_no_other(model, optimizer, batch, part, change):
    taker = VitalsTaker(model, optimizer)
    before, details = taker.take(1, batch), {part: taker.details(part) for part in REPLICATED_PARTS}
    change(model, optimizer, batch)
    after = taker.take(2, batch)
    assert set(before.parts) == set(PARTS)
    assert [name for name in PARTS if before.parts[name] != after.parts[name]] == [part]
    assert after.parts == VitalsTaker(model, optimizer).take(2, batch).parts
    shown = [name for name in REPLICATED_PARTS if details[name] != taker.details(name)]
    assert shown == [part] * (part in REPLICATED_PARTS)


def test_non_persistent_buffers_are_a_ranks_own(model, optimizer, batch):
    taker = VitalsTaker(model, optimizer)
    before = taker.take(1, batch)
    model.register_buffer("cache", torch.ones(2), persistent=False)
    assert taker.take(2, batch).parts == before.parts


def test_a_new_module_with_new_weights_shows_in_parameters(model, optimizer, batch):
    taker = VitalsTaker(model, optimizer)
    before = taker.take(1, batch)
    replace_a_module(model, optimizer, batch)
    changed = {part for part in PARTS if before.parts[part] != taker.take(2, batch).parts[part]}
    assert changed == {"parameters", "rng"}


def test_taking_twice_gives_the_same(model, optimizer, batch):
    taker = VitalsTaker(model, optimizer)
    assert taker.take(1, batch).parts == taker.take(2, batch).parts


def test_copies_of_model_and_optimizer_have_the_same_vitals(model, optimizer, batch):
    other, other_optimizer = copy.deepcopy((model, optimizer))
    assert VitalsTaker(model, optimizer).take(1, batch) == VitalsTaker(other, other_optimizer).take(1, batch)


def test_taking_touches_neither_model_nor_generators(model, optimizer, batch):
    state = torch.get_rng_state(), random.getstate(), repr(np.random.get_state(legacy=False))
    before = {id(module): dict(module.__dict__) for module in model.modules()}
    versions = [tensor._version for tensor in model.state_dict(keep_vars=True).values()]
    taker = VitalsTaker(model, optimizer)
    taker.take(1, batch)
    for part in REPLICATED_PARTS:
        taker.details(part)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert repr(np.random.get_state(legacy=False)) == state[2]
    assert {id(module): dict(module.__dict__) for module in model.modules()} == before
    assert [tensor._version for tensor in model.state_dict(keep_vars=True).values()] == versions


def test_parts_that_cannot_be_told_are_absent():
    vitals = VitalsTaker(nn.Dropout(), None).take(7)
    assert vitals == Vitals(7, {part: vitals.parts[part] for part in ("modes", "rng")})


def test_an_optimizer_may_come_later(model, optimizer):
    taker = VitalsTaker(model, None)
    assert "optimizer" not in taker.take(1).parts
    taker.optimizer = optimizer
    assert "optimizer" in taker.take(2).parts


def test_the_optimizers_class_counts(model):
    parameters = list(model.parameters())
    taker = VitalsTaker(model, torch.optim.Adam(parameters, lr=0.1))
    adam = taker.take(1)
    taker.optimizer = torch.optim.NAdam(parameters, lr=0.1)
    assert adam.parts["optimizer"] != taker.take(2).parts["optimizer"]
    assert taker.details("optimizer")["class"] == "NAdam"


def test_a_setting_that_is_an_object_does_not_make_ranks_differ(model):
    taker = VitalsTaker(model, torch.optim.SGD(model.parameters(), lr=0.1))
    digests = set()
    for _ in range(3):
        assert taker.optimizer
        taker.optimizer.param_groups[0]["schedule"] = type("Schedule", (), {})()
        digests.add(taker.take(1).parts["optimizer"])
    assert len(digests) == 1


def test_details_name_what_differs(model, optimizer):
    taker = VitalsTaker(model, optimizer)
    model.dropout.eval()
    assert list(taker.details("parameters")) == [
        "encoder.weight",
        "encoder.bias",
        "norm.weight",
        "norm.bias",
        "head.weight",
    ]
    assert list(taker.details("buffers")) == ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    assert taker.details("modes")["(root)"] == "train"
    assert taker.details("modes")["dropout"] == "eval"
    settings = taker.details("optimizer")
    assert (settings["class"], settings["group 0 lr"], settings["group 1 lr"]) == ("AdamW", 0.01, 0.1)
    assert settings["group 0 betas"] == "(0.9, 0.99)"


def test_other_generators_are_a_ranks_own(model):
    taker = VitalsTaker(model, None)
    before = taker.take(1)
    random.random()
    np.random.rand()
    assert taker.take(2).parts == before.parts


def test_what_ddp_was_told_to_ignore_is_left_out(model):
    model._ddp_params_and_buffers_to_ignore = ["head.weight", "norm.running_mean"]
    outer = nn.ModuleDict({"module": model})
    for taker, prefix in ((VitalsTaker(model, None), ""), (VitalsTaker(outer, None), "module.")):
        assert f"{prefix}head.weight" not in taker.details("parameters")
        before = taker.take(1).parts
        with torch.no_grad():
            model.head.weight += 1
            model.norm.running_mean += 1
        assert taker.take(2).parts == before
        with torch.no_grad():
            model.encoder.bias += 1
        assert taker.take(3).parts["parameters"] != before["parameters"]


def test_tied_weights_are_named_once(model):
    model.tied = nn.Linear(8, 2, bias=False)
    model.tied.weight = model.head.weight
    assert "tied.weight" not in VitalsTaker(model, None).details("parameters")


@dataclasses.dataclass
class Sample:
    image: torch.Tensor
    label: int


class Record:
    def __init__(self, value):
        self.value = value


Point = collections.namedtuple("Point", "x y")
BATCHES = {
    "tensor": (torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])),
    "shape": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "tuple": ((torch.ones(2), 1), (torch.ones(2), 2)),
    "dataclass": (Sample(torch.ones(2), 1), Sample(torch.ones(2), 2)),
    "object": (Record(torch.ones(2)), Record(torch.zeros(2))),
    "namedtuple": (Point(1, 2), Point(2, 1)),
    "mapping": (collections.UserDict(a=torch.ones(1)), collections.UserDict(a=torch.zeros(1))),
    "array": (np.array([1, 2]), np.array([2, 1])),
    "array_of_texts": (np.array(["a", "b"], dtype=object), np.array(["b", "a"], dtype=object)),
    "texts": (["a", "b"], ["ab"]),
    "bytes": (b"a", b"b"),
    "packed": tuple(nn.utils.rnn.pack_sequence([torch.full((2, 1), value)]) for value in (1.0, 2.0)),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_of_all_kinds_are_told_apart(model, kind):
    taker = VitalsTaker(model, None)
    one, two = BATCHES[kind]
    digest = taker.take(1, one).parts["batch"]
    assert digest == taker.take(2, copy.deepcopy(one)).parts["batch"]
    assert digest != taker.take(3, two).parts["batch"]


def test_a_batch_that_cannot_be_read_is_absent_and_one_that_holds_itself_ends(model):
    taker = VitalsTaker(model, None)
    assert "batch" not in taker.take(1, object()).parts
    circle: list = [1]
    circle.append(circle)
    assert "batch" in taker.take(2, circle).parts


def test_the_batch_is_not_kept(model):
    import gc
    import weakref

    batch = torch.randn(10)
    taker = VitalsTaker(model, None)
    taker.take(1, {"x": batch})
    reference = weakref.ref(batch)
    del batch
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("closely", [True, False])
def test_what_vitals_are_made_of_stays_that_of_their_step(model, optimizer, batch, closely):
    taker = VitalsTaker(model, optimizer)
    kept = taker.take(1, batch, closely)
    then = {part: taker.details(part) for part in kept.details}
    assert set(then) == {"optimizer", "modes", "buffers"} | ({"parameters"} if closely else set())
    for change in (swap_parameters, change_a_buffer, count_a_batch, evaluate_all, change_learning_rate):
        change(model, optimizer, batch)
    assert {part: tell() for part, tell in kept.details.items()} == then
    assert all(taker.details(part) != then[part] for part in then)
    assert set(kept.measures) == {"buffers"} | ({"parameters"} if closely else set())
    assert set(kept.measures["buffers"]()) == set(then["buffers"])


def test_large_buffers_are_not_kept(model, optimizer, batch):
    model.register_buffer("table", torch.zeros(MAX_COPIED_BYTES // 4))
    assert "buffers" not in VitalsTaker(model, optimizer).take(1, batch).details
