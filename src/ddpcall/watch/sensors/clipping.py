"""Gradients as they are clipped: which parameters', to what limit, and by what total norm."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import utils
from torch.nn.utils import clip_grad

from ddpcall import torch_internals as internals
from ddpcall.taps import Undo, replace_attribute, undo_all
from ddpcall.watch.run import Run

ROUNDING = 1e-6


@dataclass(frozen=True)
class Clipping:
    """Gradients that are about to be clipped.

    Attributes:
        parameters: Whose gradients; those without one and DTensors, which are reduced already, are left out.
        limit: The largest norm, or the largest value.
        norm: The total norm that the gradients are scaled by; None where values are clipped.
        is_given: Whether the script hands over that norm, which it may have agreed on with other ranks.
    """

    parameters: list[Tensor]
    limit: float
    norm: Tensor | None = None
    is_given: bool = False

    def coefficient(self) -> float:
        """Return what the gradients are scaled by; waits for the device. Values are clipped by none: 1.0."""
        return 1.0 if self.norm is None else min(1.0, self.limit / (float(self.norm) + 1e-6))

    def cuts(self, parameters: list[Tensor]) -> bool:
        """Say whether these parameters' gradients are changed; waits for the device."""
        if self.norm is not None:
            return self.coefficient() < 1.0 - ROUNDING
        gradients = (parameter.grad for parameter in parameters)
        return any(bool((each.abs() > self.limit).any()) for each in gradients if each is not None)


class ClippingSensor:
    """Tells the rules what `clip_grad_norm_`, `clip_grads_with_norm_` and `clip_grad_value_` are about to change.

    Source: torch/nn/utils/clip_grad.py; `clip_grad_norm_` scales through the function that
    `clip_grads_with_norm_` is.

    Blind to: gradients that are clipped by hand; `clip_grad_value_` where a script imported it by name before
    the watch began.
    """

    def __init__(self, run: Run) -> None:
        self._run = run

    def attach(self) -> Undo:
        """Hear of every clipping; returns the undo."""
        by_norm, by_value = internals.CLIP_WITH_NORM.get(), clip_grad.clip_grad_value_

        def by_norm_of(is_given: bool) -> Callable[..., None]:
            @functools.wraps(by_norm)
            def clip_grads_with_norm_(
                parameters: Any, max_norm: float, total_norm: Any, foreach: Any = None
            ) -> None:
                parameters = _listed(parameters)
                self._tell(parameters, max_norm, total_norm, is_given)
                by_norm(parameters, max_norm, total_norm, foreach)

            return clip_grads_with_norm_

        @functools.wraps(by_value)
        def clip_grad_value_(parameters: Any, clip_value: float, foreach: Any = None) -> None:
            parameters = _listed(parameters)
            self._tell(parameters, clip_value, None)
            by_value(parameters, clip_value, foreach)

        patches = (
            (clip_grad, internals.CLIP_WITH_NORM.name, by_norm_of(is_given=False)),
            (utils, "clip_grads_with_norm_", by_norm_of(is_given=True)),
            (clip_grad, "clip_grad_value_", clip_grad_value_),
            (utils, "clip_grad_value_", clip_grad_value_),
        )
        return undo_all(replace_attribute(*patch) for patch in patches)

    def _tell(self, parameters: list[Tensor], limit: float, norm: Any, is_given: bool = False) -> None:
        if torch.compiler.is_compiling():
            return
        clipped = [each for each in parameters if each.grad is not None and type(each).__name__ != "DTensor"]
        if clipped:
            self._run.contain(self._tell_rules, Clipping(clipped, float(limit), norm, is_given))

    def _tell_rules(self, clipping: Clipping) -> None:
        for rule in self._run.rules:
            rule.clipping(clipping)


def _listed(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)
