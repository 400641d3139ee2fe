"""What a user brings by `_target_`: a model, data, an optimizer, a loss, a wrapper or a call path."""

from __future__ import annotations

import functools
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddpcall.lab.errors import WrongUse
from ddpcall.lab.schema import PathConfig, WrapperConfig
from ddpcall.paths import Batch, LossFunction


def load_target(node: str, settings: Mapping[str, Any], offers: Sequence[str] = ()) -> Callable[..., Any]:
    """Import what `_target_` names, and check that it can be called before anything starts.

    Args:
        node: The configuration's node, for messages.
        settings: `_target_`, an import path, and keyword arguments for it.
        offers: Names of arguments that the lab can give. The target is given those that it takes, unless the
            settings have them.

    Returns:
        A function of the offered arguments, by keyword; it ignores those that the target does not take.

    Raises:
        WrongUse: The target is missing, cannot be imported, or does not take these arguments.
    """
    arguments = dict(settings)
    path = arguments.pop("_target_", None)
    if not path:
        raise WrongUse(f"{node}._target_ is missing. Write {node}._target_=my.module.name")
    target = _import_target(node, path)
    try:
        signature = inspect.signature(target)
        given = [name for name in offers if name in signature.parameters and name not in arguments]
        signature.bind(**arguments, **dict.fromkeys(given))
    except (TypeError, ValueError) as error:
        offered = f" and {', '.join(offers)}" if offers else ""
        raise WrongUse(f"{node}._target_={path} cannot be called with {arguments}{offered}: {error}") from error
    return lambda **values: target(**arguments, **{name: values[name] for name in given})


def load_loss(settings: Mapping[str, Any]) -> Callable[..., Any]:
    """Import the loss that `loss._target_` names: a function of outputs and targets, or a class of such.

    Raises:
        WrongUse: It cannot be imported, or its class does not take these arguments.
    """
    arguments = {name: value for name, value in settings.items() if name != "_target_"}
    target = _import_target("loss", str(settings["_target_"]))
    if inspect.isclass(target):
        return load_target("loss", settings)()
    return functools.partial(target, **arguments)


def load_path(config: PathConfig) -> Callable[[nn.Module, nn.Module, Batch, LossFunction], Tensor]:
    """Import the call path that `path._target_` names, as `ddpcall.paths.invoke` is called.

    Raises:
        WrongUse: It cannot be imported or called.
    """
    step = load_target("path", own_arguments(config), ("wrapped", "inner", "inputs", "targets", "loss"))
    return lambda wrapped, inner, batch, loss: step(
        wrapped=wrapped, inner=inner, inputs=batch.inputs, targets=batch.targets, loss=loss
    )


def wrap_by_target(config: WrapperConfig, model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a model by the function that `wrapper._target_` names.

    Raises:
        WrongUse: It cannot be imported or called, or returns no module.
    """
    wrapped = load_target("wrapper", own_arguments(config), ("model", "device"))(model=model, device=device)
    if not isinstance(wrapped, nn.Module):
        raise WrongUse(
            f"wrapper._target_={config._target_} returned {type(wrapped).__name__}, not a torch.nn.Module"  # pyright: ignore[reportPrivateUsage]
        )
    return wrapped


def _import_target(node: str, path: str) -> Any:
    try:
        target = pkgutil.resolve_name(path)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise WrongUse(f"{node}._target_={path} cannot be imported: {error}") from error
    if not callable(target):
        raise WrongUse(f"{node}._target_={path} is {type(target).__name__}, which cannot be called")
    return target


def own_arguments(config: Any) -> dict[str, Any]:
    """Return `_target_` and the keys of a typed node that are not its own: the target's arguments."""
    known = set(config.__dataclass_fields__) - {"_target_"}
    return {name: value for name, value in vars(config).items() if name not in known}
