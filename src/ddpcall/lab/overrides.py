"""Keys that nothing reads are refused, with what was meant.

Hydra refuses `stepz=3` and advises `+stepz=3`, which it then accepts though nothing reads it. So the command line
is looked at before Hydra composes it. Any key may stand beside a user's `_target_`; whether there is one is known
when the configuration is composed.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.metadata
from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from ddpcall.lab.errors import WrongUse
from ddpcall.lab.schema import OPEN_NODES, TrainConfig

# Launchers that are packages of their own: first word of the option's name to package.
LAUNCHERS = {"joblib": "joblib", "submitit": "submitit", "ray": "ray", "rq": "rq"}


def check_overrides(arguments: Sequence[str]) -> None:
    """Refuse overrides of keys that the configuration does not have, and launchers that are not installed.

    Args:
        arguments: The command line; options and what cannot be parsed are left to Hydra.

    Raises:
        WrongUse: With the line to write instead.
    """
    parser = OverridesParser.create()
    for argument in arguments:
        if argument.startswith("-") or "=" not in argument:
            continue
        try:
            override = parser.parse_override(argument)
        except HydraException:
            continue
        _check_launcher(override.key_or_group, override.value())
        for key in [] if override.is_delete() else _flatten(override.key_or_group, override.value()):
            if not _is_known(key):
                raise WrongUse(_explain(argument, key))


def check_composed(config: TrainConfig) -> None:
    """Refuse keys of the user's own where no `_target_` takes them.

    Raises:
        WrongUse: With what was meant.
    """
    for name in OPEN_NODES:
        node = getattr(config, name)
        for key in vars(node).keys() - node.__dataclass_fields__.keys() if not node._target_ else ():
            raise WrongUse(_explain(f"{name}.{key}={getattr(node, key)}", f"{name}.{key}"))


def _flatten(key: str, value: Any) -> Iterator[str]:
    """Yield the keys that an override sets; a dictionary sets those in it."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _flatten(f"{key}.{name}", item)
    else:
        yield key


def _is_known(key: str) -> bool:
    first, *rest = key.split(".")
    if "/" in first or "@" in first or first in ("", "hydra", "experiment"):
        return True  # groups, and what is Hydra's
    node: Any = TrainConfig
    for name in [first, *rest]:
        if not dataclasses.is_dataclass(node):
            return True  # a dictionary: free keys
        known = {field.name: field for field in dataclasses.fields(node)}
        if name not in known:
            return first in OPEN_NODES and len(rest) > 0
        node = _type_below(known[name])
    return True


def _type_below(field: dataclasses.Field[Any]) -> Any:
    factory = field.default_factory
    return factory if dataclasses.is_dataclass(factory) else None


def _explain(written: str, key: str) -> str:
    value = "=" + written.partition("=")[2] if written.lstrip("+").startswith(f"{key}=") else ""
    known = list(_list_keys(TrainConfig))
    parent, _, leaf = key.rpartition(".")
    siblings = [name for name in known if name.rpartition(".")[0] == parent]
    close = difflib.get_close_matches(key, siblings, 1, 0.7)
    close = close or [name for name in known if name.rpartition(".")[2] == leaf]
    close = close or difflib.get_close_matches(key, known, 1, 0.7)
    meant = f" Did you mean {' or '.join(name + value for name in close[:3])}?" if close else ""
    if parent in OPEN_NODES:
        meant += f" Arguments of your own code stand beside {parent}._target_=my.module.name."
    return f"{written}: there is no key {key}, and nothing would read it.{meant} `--cfg job` prints all keys."


def _list_keys(node: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(node):
        below = _type_below(field)
        if below is None:
            yield prefix + field.name
        else:
            yield from _list_keys(below, f"{prefix}{field.name}.")


def _check_launcher(group: str, value: Any) -> None:
    if group != "hydra/launcher" or not isinstance(value, str):
        return
    name = LAUNCHERS.get(value.split("_")[0])
    if name is None:
        return
    try:
        importlib.metadata.distribution(f"hydra-{name}-launcher")
    except importlib.metadata.PackageNotFoundError:
        raise WrongUse(
            f"hydra/launcher={value} is a plugin that is not installed. Write: pip install hydra-{name}-launcher"
        ) from None
