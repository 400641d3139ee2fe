"""An exercise as it was handed out: its model, data and checkpoint, by the grader's own copy of the script."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from ddpcall.sketch import sketch
from ddpcall.teach.grade.observe import digest_rows


class Reference:
    """What a solution is compared with: the functions of the script that was handed out."""

    def __init__(self, script: str) -> None:
        """Run the script's definitions, and nothing else of it."""
        self._names: dict[str, Any] = {"__name__": "ddpcall_exercise"}
        exec(compile(script, "exercise", "exec"), self._names)
        self._model: nn.Module = self.call("make_model")
        self.model_text = repr(self._model)  # layers, sizes, dropout's rate
        self.parameters = [name for name, _ in self._model.named_parameters()]
        self.state_names = list(self._model.state_dict())

    def call(self, name: str, *args: Any) -> Any:
        """Call one of the script's functions."""
        return self._names[name](*args)

    @cached_property
    def places(self) -> dict[int, int]:
        """The place of every training sample by its digest."""
        inputs = self.call("make_data", "train").tensors[0]
        rows = [row for part in inputs.split(512) for row in digest_rows(part)]
        return {row: place for place, row in enumerate(rows)}

    def _load(self, state: dict[str, np.ndarray]) -> nn.Module:
        model = self.call("make_model")
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        if any(shapes[name] != value.shape for name, value in state.items()):
            raise ValueError("parameters of other shapes")
        model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
        return model

    def train_alone(
        self, state: dict[str, np.ndarray], steps: Iterable[tuple[Sequence[int], float]], prefix: str
    ) -> Iterator[dict[str, np.ndarray]]:
        """Train in one process, by cross entropy and plain SGD; yield the sketch of each step's gradient by name.

        Args:
            state: Parameters and buffers to begin with.
            steps: For each step the samples of all ranks, by digest, and the learning rate.
            prefix: What the solution's wrapper puts before the names, which seed the sketches.

        Raises:
            KeyError: A sample is not in the training data.
        """
        model = self._load(state)
        inputs, targets = self.call("make_data", "train").tensors
        for rows, rate in steps:
            places = [self.places[row] for row in rows]
            model.zero_grad()
            nn.functional.cross_entropy(model(inputs[places]), targets[places]).backward()
            gradients: dict[str, Any] = {name: one.grad for name, one in model.named_parameters()}
            yield {name: sketch(value, f"{prefix}{name}").numpy() for name, value in gradients.items()}
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter -= rate * gradients[name]

    def accuracy(self, state: dict[str, np.ndarray]) -> float:
        """Return the share of the test set that the model with these parameters and buffers gets right.

        Raises:
            ValueError: They do not fit the model.
        """
        inputs, targets = self.call("make_data", "test").tensors
        with torch.no_grad():
            return (self._load(state).eval()(inputs).argmax(1) == targets).float().mean().item()
