"""How many targets a loss takes the mean of."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOSSES = (F.cross_entropy, F.nll_loss, F.binary_cross_entropy, F.binary_cross_entropy_with_logits)


def count_targets(loss: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | int | None:
    """Return how many targets a call of one of `LOSSES` takes the mean of; None where it takes no mean.

    Those that `ignore_index` names, or whose class weighs nothing, are left out. They are counted where the
    targets are, and nobody waits for it.
    """
    given = inspect.signature(loss).bind(*args, **kwargs)
    given.apply_defaults()
    target: Tensor = given.arguments["target"]
    if given.arguments["reduction"] != "mean":
        return None
    if target.is_floating_point():  # cross_entropy divides probabilities by the number of their rows
        num_classes = target.size(1 if target.dim() > 1 else 0) if loss.__name__ == F.cross_entropy.__name__ else 1
        return target.numel() // num_classes
    counted = target != given.arguments["ignore_index"]
    weight = given.arguments["weight"]
    return counted.sum() if weight is None else (counted & (weight[target * counted] != 0)).sum()


def wrap_loss(original: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
    """Return what can stand in the place of one of `LOSSES`.

    Args:
        original: The loss.
        call: Gets it and its arguments, and calls it. Not asked in compiled code.
    """

    @wraps(original)
    def loss(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(*args, **kwargs)
        return call(original, args, kwargs)

    # TorchScript compiles the source of what stands there, with the names that its module has.
    loss.__prepare_scriptable__ = lambda: original  # pyright: ignore[reportAttributeAccessIssue]
    return loss
