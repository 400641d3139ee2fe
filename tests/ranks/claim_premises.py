"""Altered premises for claims: under each the experiment comes to another verdict than under the claim's."""

import torch.nn.functional as F
from torch import Tensor, nn


class HooksOnForward(nn.Sequential):
    """A module whose forward enters through `__call__` itself, so that a direct forward fires its hooks too."""

    inside = False

    def forward(self, input: Tensor) -> Tensor:
        if self.inside:
            return super().forward(input)
        self.inside = True
        try:
            return self(input)
        finally:
            self.inside = False


class DropoutInCall(nn.Module):
    """A dropout that does what CF-3 claims: the mode is seen to in `__call__`."""

    def __call__(self, input: Tensor) -> Tensor:
        return F.dropout(input, training=self.training)

    def forward(self, input: Tensor) -> Tensor:
        return input


def call_child(child: nn.Module, x: Tensor) -> Tensor:
    """Reach the child by a call, not by its forward."""
    return child(x)


def raise_error() -> None:
    """An experiment that cannot be carried through."""
    raise OSError("no disk")
