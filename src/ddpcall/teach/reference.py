"""An exercise as it was handed out: its model, data and checkpoint, by the grader's own copy of the script."""

from __future__ import annotations

import runpy
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ddpcall.teach.witness import digest_rows, project


class Reference:
    """What a solution is compared with. The script is imported, not run: it defines `make_model`, `make_data`."""

    def __init__(self, script: Path) -> None:
        """Import the script as handed out."""
        self._names: dict[str, Any] = runpy.run_path(str(script), run_name="ddpcall_exercise")

    def call(self, name: str, *args: Any) -> Any:
        """Call one of the script's functions."""
        return self._names[name](*args)

    @cached_property
    def _model(self) -> nn.Module:
        return self.call("make_model")

    @property
    def model_text(self) -> str:
        """The model's repr: layers, sizes, dropout's rate."""
        return repr(self._model)

    @property
    def parameters(self) -> list[str]:
        """The names of the model's parameters."""
        return [name for name, _ in self._model.named_parameters()]

    @property
    def state_names(self) -> list[str]:
        """The names of its parameters and buffers."""
        return list(self._model.state_dict())

    @cached_property
    def training_rows(self) -> set[str]:
        """A digest of every training sample."""
        inputs = self.call("make_data", "train").tensors[0]
        return {row for part in inputs.split(512) for row in digest_rows(part)}

    @cached_property
    def _places(self) -> dict[str, int]:
        inputs = self.call("make_data", "train").tensors[0]
        rows = [row for part in inputs.split(512) for row in digest_rows(part)]
        return {row: place for place, row in enumerate(rows)}

    def train_alone(
        self, state: dict[str, np.ndarray], steps: Iterable[tuple[Sequence[str], float]]
    ) -> Iterator[dict[str, list[float]]]:
        """Train in one process, by cross entropy and plain SGD; yield each step's gradient, projected, by name.

        Args:
            state: Parameters and buffers to begin with.
            steps: For each step the samples of all ranks, by digest, and the learning rate.

        Raises:
            KeyError: A sample is not in the training data.
        """
        model = self.call("make_model")
        model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in state.items()})
        inputs, targets = self.call("make_data", "train").tensors
        for rows, rate in steps:
            places = [self._places[row] for row in rows]
            model.zero_grad()
            nn.functional.cross_entropy(model(inputs[places]), targets[places]).backward()
            yield {name: project(parameter.grad) or [] for name, parameter in model.named_parameters()}
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= rate * parameter.grad

    def accuracy(self, state: dict[str, np.ndarray]) -> float:
        """Return the share of the test set that the model with these parameters and buffers gets right.

        Raises:
            ValueError: They do not fit the model.
        """
        shapes = {name: tuple(value.shape) for name, value in self._model.state_dict().items()}
        if any(shapes[name] != value.shape for name, value in state.items()):
            raise ValueError("parameters of other shapes")
        model = self.call("make_model")
        model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in state.items()})
        model.eval()
        inputs, targets = self.call("make_data", "test").tensors
        with torch.no_grad():
            return (model(inputs).argmax(1) == targets).float().mean().item()
