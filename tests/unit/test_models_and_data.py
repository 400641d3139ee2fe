import pytest
import torch
from torch import nn

from ddpcall.lab.data import check_batch_size, iterate_batches, load_split
from ddpcall.lab.errors import WrongUse
from ddpcall.lab.models import ConvNet, LazyFlatLinear, Mlp, RowTransformer, build_model, default_loss
from ddpcall.lab.schema import DataConfig, OptimizerConfig
from ddpcall.lab.trial import build_optimizer, check_runs_children_in_order
from ddpcall.paths import Batch, CallPath, invoke

DIGITS = DataConfig(name="digits")


@pytest.mark.parametrize("model", [Mlp(), ConvNet(dropout=0.0), RowTransformer()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("path", [path for path in CallPath if path is not CallPath.CUSTOM])
def test_on_one_process_every_path_computes_the_same_loss(model, path):
    model.train()
    batch = Batch(torch.rand(4, 8, 8), torch.tensor([0, 1, 2, 3]))
    expected = default_loss(model(batch.inputs), batch.targets)
    assert torch.equal(invoke(path, model, model, batch, default_loss), expected)


def test_a_model_that_is_no_chain_is_refused_the_submodules_path():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, inputs):
            return inputs + self.layer(inputs)

    check_runs_children_in_order(Mlp(), torch.zeros(2, 8, 8))
    with pytest.raises(WrongUse, match=r"not what Residual\.forward computes"):
        check_runs_children_in_order(Residual(), torch.ones(2, 8))


def test_sizes_are_filled_in_from_the_data_where_the_model_takes_them():
    model = build_model({"_target_": "ddpcall.lab.models.Mlp", "width": 8}, in_features=16, out_features=1)
    assert isinstance(model, Mlp)
    assert (model.enter.in_features, model.head.out_features, model.enter.out_features) == (16, 1, 8)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "model._target_ is missing"),
        ({"_target_": "no.such.module.Net"}, "no.such.module.Net cannot be imported"),
        ({"_target_": "ddpcall.lab.models.Nope"}, "cannot be imported"),
        ({"_target_": "ddpcall.lab.models.Mlp", "widht": 3}, "cannot be called with .*widht"),
        ({"_target_": "pathlib.PurePosixPath"}, "returned PurePosixPath, not a torch.nn.Module"),
    ],
)
def test_models_that_cannot_be_built_are_wrong_use(config, message):
    with pytest.raises(WrongUse, match=message):
        build_model(config, 64, 10)


def test_a_lazy_model_runs_called_and_raises_through_forward():
    with pytest.raises(ValueError, match="uninitialized parameter"):
        LazyFlatLinear().forward(torch.zeros(2, 8, 8))
    assert LazyFlatLinear()(torch.zeros(2, 8, 8)).shape == (2, 10)


def take(rank: int, steps: int, world_size: int = 2) -> list[torch.Tensor]:
    split = load_split(DIGITS, seed=0)
    batches = iterate_batches(
        split, batch_size=32, steps=steps, rank=rank, world_size=world_size, seed=0, device=torch.device("cpu")
    )
    return [batch.inputs for batch in batches]


def test_ranks_see_disjoint_shares_in_an_order_that_changes_with_the_epoch():
    first, second = (torch.cat(take(rank, 22)).flatten(1) for rank in (0, 1))
    distances = torch.cdist(first, second)
    assert (distances == 0).sum() <= 2  # the digits hold a few identical scans
    epochs = take(0, 44)
    assert not torch.equal(epochs[0], epochs[22])
    assert all(torch.equal(a, b) for a, b in zip(epochs, take(0, 44), strict=True))


def test_batches_that_the_data_cannot_fill_are_refused():
    split = load_split(DIGITS, seed=0)
    check_batch_size(split, 719, 2)
    with pytest.raises(WrongUse, match="value from 1 to 719"):
        check_batch_size(split, 720, 2)
    with pytest.raises(WrongUse, match=r"data\.batch_size=0"):
        check_batch_size(split, 0, 2)


def test_the_test_set_is_kept_apart():
    split = load_split(DataConfig(name="regression", num_samples=100, test_fraction=0.25), seed=1)
    assert (len(split.train), len(split.test.inputs), split.in_features, split.out_features) == (75, 25, 16, 1)


@pytest.mark.parametrize("config", [DataConfig(name="cifar"), DataConfig(name="digits", test_fraction=1.0)])
def test_unknown_data_and_empty_splits_are_wrong_use(config):
    with pytest.raises(WrongUse, match="data"):
        load_split(config, seed=0)


def test_an_unknown_optimizer_is_wrong_use():
    with pytest.raises(WrongUse, match="write one of: sgd, adamw"):
        build_optimizer(Mlp().parameters(), OptimizerConfig(name="adam", lr=0.1))
