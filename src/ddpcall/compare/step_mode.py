"""What stands around the user's step: it counts targets and leaves dropout out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ddpcall.targets import LOSSES, count_targets

_DROPOUTS = (
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout,
)  # fmt: skip
# Where their arguments have dropout_p.
_ATTENTIONS = {F.scaled_dot_product_attention: 4, F.multi_head_attention_forward: 10}


class StepMode(TorchFunctionMode):
    """While it is on, dropout does nothing, and the targets of losses that take a mean are counted.

    Attributes:
        num_targets: By call: targets of `cross_entropy`, `nll_loss` and `binary_cross_entropy` with
            `reduction="mean"`; those that `ignore_index` names are left out.
        num_dropouts: Dropouts that were left out.

    Blind to: dropout inside recurrent layers; losses in compiled code.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_targets: list[int] = []
        self.num_dropouts = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            self.num_dropouts += _drops(func, args, kwargs)
            return args[0] if args else kwargs["input"]
        if func in _ATTENTIONS:
            place = _ATTENTIONS[func]
            probability = args[place] if len(args) > place else kwargs.get("dropout_p", 0.0)
            self.num_dropouts += probability > 0
            if len(args) > place:
                args = (*args[:place], 0.0, *args[place + 1 :])
            else:
                kwargs = {**kwargs, "dropout_p": 0.0}
        elif func in LOSSES:
            count = count_targets(func, args, kwargs)
            self.num_targets += [] if count is None else [int(count)]
        return func(*args, **kwargs)


def _drops(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Say whether a call of dropout would have left anything out."""
    probability = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
    by_default = func not in (F.alpha_dropout, F.feature_alpha_dropout)
    training = args[2] if len(args) > 2 else kwargs.get("training", kwargs.get("train", by_default))
    return training and probability > 0
