"""The models of the lab. Each runs its children in order, so that every call path computes the same function."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddpcall.lab.errors import WrongUse
from ddpcall.lab.user_code import load_target


def default_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return cross entropy for integer targets, mean squared error for real ones; shape ()."""
    if targets.is_floating_point():
        return F.mse_loss(outputs, targets)
    return F.cross_entropy(outputs, targets)


class Chain(nn.Module):
    """A model whose forward calls its children one after the other.

    `compute_loss` is the custom method of the `inner_method` path: the kind of helper that trainers reach
    through `.module`.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs of shape (batch, *features) to outputs of shape (batch, out_features)."""
        for child in self.children():
            inputs = child(inputs)
        return inputs

    def compute_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of one batch, shape ()."""
        return default_loss(self(inputs), targets)


class Mlp(Chain):
    """Two hidden layers of `width` units."""

    def __init__(self, in_features: int = 64, out_features: int = 10, width: int = 64) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.enter = nn.Linear(in_features, width)
        self.activate = nn.ReLU()
        self.hidden = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, out_features)


class ConvNet(Chain):
    """Two convolutions with BatchNorm and Dropout, for images of shape (batch, 8, 8)."""

    def __init__(self, out_features: int = 10, channels: int = 16, dropout: float = 0.2) -> None:
        super().__init__()
        self.add_channel = nn.Unflatten(1, (1, 8))
        self.enter = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        self.hidden = nn.Sequential(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1), nn.BatchNorm2d(channels), nn.ReLU()
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(channels * 16, out_features))


def cumulative_convnet(out_features: int = 10) -> nn.Module:
    """A `ConvNet` whose running statistics are plain averages over all batches (`momentum=None`)."""
    model = ConvNet(out_features)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    return model


def sync_batchnorm_convnet(out_features: int = 10) -> nn.Module:
    """A `ConvNet` whose batch norms compute their statistics over all ranks."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(ConvNet(out_features))


class CheckpointedMlp(Chain):
    """An MLP whose hidden block is recomputed in the backward instead of kept."""

    def __init__(
        self, in_features: int = 64, out_features: int = 10, width: int = 64, reentrant: bool = False
    ) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.enter = nn.Linear(in_features, width)
        self.hidden = Recomputed(nn.Linear(width, width), nn.ReLU(), reentrant=reentrant)
        self.head = nn.Linear(width, out_features)


class Recomputed(nn.Sequential):
    """A sequence of layers under `torch.utils.checkpoint`."""

    def __init__(self, *layers: nn.Module, reentrant: bool) -> None:
        super().__init__(*layers)
        self.reentrant = reentrant

    def forward(self, input: Tensor) -> Tensor:
        """Run the layers; again in the backward, if there will be one."""
        if not torch.is_grad_enabled():
            return super().forward(input)
        outputs: Any = checkpoint(super().forward, input, use_reentrant=self.reentrant)
        return outputs


def reentrant_mlp(in_features: int = 64, out_features: int = 10) -> nn.Module:
    """A `CheckpointedMlp` with the reentrant implementation, which runs a backward inside the backward."""
    return CheckpointedMlp(in_features, out_features, reentrant=True)


class Positions(nn.Module):
    """Adds a learned vector to each position: (batch, length, width) to the same shape."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(length, width) * 0.02)

    def forward(self, inputs: Tensor) -> Tensor:
        """Add the table to every sequence of the batch."""
        return inputs + self.table


class MeanOverPositions(nn.Module):
    """Averages over positions: (batch, length, width) to (batch, width)."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Average over dim 1."""
        return inputs.mean(dim=1)


class RowTransformer(Chain):
    """A one-layer transformer that reads an 8×8 digit as a sequence of eight rows."""

    def __init__(self, out_features: int = 10, width: int = 32, num_heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.positions = Positions(8, width)
        self.block = nn.TransformerEncoderLayer(width, num_heads, 2 * width, dropout, batch_first=True)
        self.pool = MeanOverPositions()
        self.head = nn.Linear(width, out_features)


class FlatLinear(nn.Linear):
    """A single linear layer over flattened inputs: a root module that can carry a legacy norm itself."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (batch, *features) to (batch, out_features)."""
        return super().forward(input.flatten(1))

    def compute_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of one batch, shape ()."""
        return default_loss(self(inputs), targets)


class LazyFlatLinear(nn.LazyLinear):
    """A `FlatLinear` whose input size is inferred by a forward-pre hook, in its first call."""

    cls_to_become = FlatLinear  # pyright: ignore[reportAssignmentType]

    def __init__(self, out_features: int = 10) -> None:
        super().__init__(out_features)

    def forward(self, input: Tensor) -> Tensor:
        """Map (batch, *features) to (batch, out_features). No `super()`: the class changes during the call."""
        return F.linear(input.flatten(1), self.weight, self.bias)

    def initialize_parameters(self, input: Tensor) -> None:
        """Infer the input size from flattened inputs."""
        super().initialize_parameters(input.flatten(1))


def spectral_norm_linear(in_features: int = 64, out_features: int = 10) -> nn.Module:
    """A linear layer whose weight is recomputed by legacy `spectral_norm`'s forward-pre hook."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the legacy form is the point
        return torch.nn.utils.spectral_norm(FlatLinear(in_features, out_features))


def weight_norm_linear(in_features: int = 64, out_features: int = 10) -> nn.Module:
    """A linear layer whose weight is recomputed by legacy `weight_norm`'s forward-pre hook."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the legacy form is the point
        return torch.nn.utils.weight_norm(FlatLinear(in_features, out_features))


def pruned_linear(in_features: int = 64, out_features: int = 10, amount: float = 0.3) -> nn.Module:
    """A linear layer whose weight is masked by `prune`'s forward-pre hook."""
    from torch.nn.utils import prune

    return prune.random_unstructured(FlatLinear(in_features, out_features), "weight", amount)


def build_model(config: dict[str, Any], in_features: int, out_features: int) -> nn.Module:
    """Build the model that `model._target_` names.

    Args:
        config: `_target_`, the import path of a class or function, and its keyword arguments.
        in_features: Filled in where the target takes an argument of that name that the config leaves out.
        out_features: Likewise.

    Raises:
        WrongUse: The target cannot be imported, is no model, or does not take these arguments.
    """
    build = load_target("model", config, ("in_features", "out_features"))
    model = build(in_features=in_features, out_features=out_features)
    if not isinstance(model, nn.Module):
        raise WrongUse(
            f"model._target_={config['_target_']} returned {type(model).__name__}, not a torch.nn.Module"
        )
    return model
