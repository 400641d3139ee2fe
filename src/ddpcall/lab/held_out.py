"""How good a model is: loss and accuracy on the test set, by a copy of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddpcall.accelerator import fork_rng
from ddpcall.paths import Batch, LossFunction


@dataclass(frozen=True)
class Score:
    """Mean loss on the test set, and the share classified correctly; None for regression."""

    loss: float
    accuracy: float | None


class Examiner:
    """Tests states of one model on a copy, so that the model that trains is never called.

    (Calling that one would run its wrapper's hooks, which may change it: `replicate` broadcasts rank 0's
    parameters in its first call, whenever that is.)
    """

    def __init__(
        self, build: Callable[[], nn.Module], test: Batch, device: torch.device, loss: LossFunction
    ) -> None:
        """Build the copy; this draws random numbers, so seed after it.

        Args:
            build: Returns a new model like the one that trains, not wrapped.
            test: Inputs and targets on the CPU.
            device: Where to test.
            loss: `loss(outputs, targets)`, the mean over the test set.
        """
        self._copy = build().to(device).eval()
        self._inputs = test.inputs.to(device)
        self._targets = test.targets
        self._device = device
        self._loss = loss

    def examine(self, state: Mapping[str, Tensor]) -> Score:
        """Test a state, in eval mode, and leave torch's random numbers where they were.

        Args:
            state: Whole parameters and buffers by name, at least the model's own.
        """
        with _kept_random_state(self._device), torch.no_grad():
            self._copy.load_state_dict({name: state[name] for name in self._copy.state_dict()})
            self._copy.to(self._device).eval()
            outputs = self._copy(self._inputs).cpu()
        accuracy = None
        if not self._targets.is_floating_point():
            accuracy = (outputs.argmax(dim=1) == self._targets).float().mean().item()
        return Score(self._loss(outputs, self._targets).item(), accuracy)


def _kept_random_state(device: torch.device) -> AbstractContextManager[None]:
    return fork_rng(device)
