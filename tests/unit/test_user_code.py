"""What a user brings by `_target_`, and what they did wrong with it."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from ddpcall.lab.data import load_split
from ddpcall.lab.errors import WrongUse
from ddpcall.lab.grid import expand_grid
from ddpcall.lab.models import Mlp
from ddpcall.lab.schema import DataConfig, OptimizerConfig, PathConfig, TrainConfig, WrapperConfig
from ddpcall.lab.trial import build_optimizer
from ddpcall.lab.user_code import load_loss, load_target

HERE = "tests.unit.test_user_code"


def make_pair(num_samples: int, seed: int, width: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(num_samples, width, generator=torch.Generator().manual_seed(seed))
    return inputs, (inputs.sum(dim=1) > 0).long()


def make_dataset() -> TensorDataset:
    return TensorDataset(torch.randn(20, 4, 4), torch.randn(20, 2))


def make_nothing() -> str:
    return "nothing"


def with_arguments(config, **arguments):
    for name, value in arguments.items():
        setattr(config, name, value)  # as OmegaConf does with keys that are not the class's own
    return config


def test_data_is_a_pair_of_tensors_or_a_dataset_of_pairs():
    pair = with_arguments(DataConfig(_target_=f"{HERE}.make_pair", num_samples=50), width=5)
    split = load_split(pair, seed=1)
    assert (len(split.train), split.in_features, split.out_features) == (40, 5, 2)
    split = load_split(DataConfig(_target_=f"{HERE}.make_dataset"), seed=1)
    assert (len(split.train), split.in_features, split.out_features) == (16, 16, 2)


def test_what_is_no_data_is_refused():
    with pytest.raises(WrongUse, match=r"make_nothing returned neither a pair of tensors"):
        load_split(DataConfig(_target_=f"{HERE}.make_nothing"), seed=1)


def test_an_optimizer_is_given_what_is_set_and_its_own_arguments():
    config = with_arguments(OptimizerConfig(_target_="torch.optim.Adagrad", lr=0.3), lr_decay=0.5)
    optimizer = build_optimizer(Mlp().parameters(), config)
    assert isinstance(optimizer, torch.optim.Adagrad)
    assert (optimizer.defaults["lr"], optimizer.defaults["lr_decay"]) == (0.3, 0.5)
    assert build_optimizer(Mlp().parameters(), OptimizerConfig(name="adamw")).defaults["weight_decay"] == 0.01


@pytest.mark.parametrize(
    ("target", "arguments", "message"),
    [
        ("torch.optim.Nothing", {}, r"optimizer\._target_=torch\.optim\.Nothing cannot be imported"),
        ("torch.optim.SGD", {"lrr": 1}, r"cannot be called with .*lrr.*unexpected keyword argument 'lrr'"),
        ("torch.pi", {}, "is float, which cannot be called"),
        (None, {}, r"optimizer\._target_ is missing. Write optimizer\._target_=my\.module\.name"),
    ],
)
def test_a_target_that_cannot_be_used_is_wrong_use_before_it_is_called(target, arguments, message):
    with pytest.raises(WrongUse, match=message):
        load_target("optimizer", {"_target_": target, **arguments}, ("params",))


def test_a_loss_is_a_function_or_a_class():
    outputs, targets = torch.randn(4, 3), torch.randn(4, 3)
    function = load_loss({"_target_": "torch.nn.functional.smooth_l1_loss", "beta": 0.5})
    module = load_loss({"_target_": "torch.nn.SmoothL1Loss", "beta": 0.5})
    assert isinstance(module, nn.SmoothL1Loss)
    assert torch.equal(function(outputs, targets), module(outputs, targets))


def test_a_target_chooses_the_custom_wrapper_and_path_and_a_grid_has_them_beside_others():
    config = TrainConfig(wrapper=WrapperConfig(_target_="a.b", name="ddp"), path=PathConfig(name="call"))
    assert [cell.label() for cell in expand_grid(config).cells] == ["custom × call"]
    config.grid.wrapper, config.path._target_ = ["ddp", "custom"], "a.c"
    assert [cell.label() for cell in expand_grid(config).cells] == ["ddp × custom", "custom × custom"]
    config.wrapper._target_ = None
    with pytest.raises(WrongUse, match=r"wrapper custom is your own function. Write wrapper\._target_="):
        expand_grid(config)
