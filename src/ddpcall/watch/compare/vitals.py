"""Vitals: the small record of digests that a rank's training state is compared by."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from operator import attrgetter, is_, methodcaller
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from ddpcall import torch_internals as internals
from ddpcall.accelerator import CPU, DEVICE_TYPES, get_rng_state
from ddpcall.replicas import StateDigester, digest_bytes, digest_tensor, is_unreadable
from ddpcall.taps import NOWHERE, CallSite, read_site
from ddpcall.watch.compare.drift import measure, sketch_tensor

REPLICATED_PARTS = ("parameters", "buffers", "modes", "optimizer")
TARGETS = "targets"
OWN_PARTS = ("rng", "batch", TARGETS)
"""Replicated parts should be equal on all ranks; own ones should not (batch), or need not."""
PARTS = (*REPLICATED_PARTS, "rng", "batch")
"""Of replicas, not of measured gradients."""

REPLICAS, GRADIENTS = "replicas", "gradients"
"""Kinds of vitals, each with step numbers of its own: of the leading optimizer's steps; of measured gradients."""

Details = dict[str, int | str | float]
LOSS_SCALE = "loss scale"
AT_THE_END = sys.maxsize - 1
"""In place of a step: what a rank says of itself when it leaves."""
MAX_COPIED_BYTES = 2**19
_MAX_DEPTH = 8


@dataclass(frozen=True)
class Facts:
    """What this rank did that explains a difference.

    Attributes:
        loads: How often `load_state_dict` was called after wrapping, and the last line that did.
        scaler_loads: The same of a GradScaler's.
        written: Digest of the gradients that the script wrote in place of a backward's; 0 where there are none.
        started: Digest of the parameters that the step began with, where the script may have sent them before.
        switched: The last line that switched to eval.
        has_evaluated: Whether the model was evaluated past its wrapper.
    """

    loads: tuple[int, CallSite] = (0, NOWHERE)
    scaler_loads: tuple[int, CallSite] = (0, NOWHERE)
    written: int = 0
    started: int | None = None
    switched: CallSite | None = None
    has_evaluated: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> Facts:
        """Return what `to_json` was called on."""
        loads, scaler_loads = (
            (times, read_site(site)) for times, site in (values["loads"], values["scaler_loads"])
        )
        switched = None if values["switched"] is None else read_site(values["switched"])
        return Facts(**dict[str, Any](values, loads=loads, scaler_loads=scaler_loads, switched=switched))


@dataclass(frozen=True)
class Vitals:
    """What one rank publishes about one optimizer step, and can tell of it when it is asked.

    Attributes:
        step: Optimizer steps done, the same count on every rank.
        parts: One digest, an int in [-2**63, 2**63), by part: of `OWN_PARTS`, or of what should be equal on all
            ranks; a part that cannot be told is absent.
        details: By part, what it is made of in this step; a part that was not kept is absent.
        measures: By part, what tells how far apart its tensors are between ranks, by name.
        facts: What this rank did until then.
        kind: `REPLICAS` or `GRADIENTS`.
        sums: Numbers, as many on every rank, that are added up over the ranks; or None.
        record: What this rank tells of gradients when it is asked.
        choose: Called in the comparing rank's thread with the comparison: the ranks to ask for their records.
        judge: Called there with the comparison and the records that came: makes of them what is handed back.
    """

    step: int
    parts: dict[str, int]
    details: Mapping[str, Callable[[], Details]] = field(default_factory=dict, compare=False, repr=False)
    measures: Mapping[str, Callable[[], dict[str, str]]] = field(default_factory=dict, compare=False, repr=False)
    facts: Callable[[], Facts] = field(default=Facts, compare=False, repr=False)
    kind: str = REPLICAS
    sums: np.ndarray | None = field(default=None, compare=False, repr=False)
    record: Callable[[], bytes] = field(default=bytes, compare=False, repr=False)
    choose: Callable[[Any], Sequence[int]] = field(default=lambda comparison: (), compare=False, repr=False)
    judge: Callable[[Any, Mapping[int, bytes]], Any] = field(default=lambda *_: None, compare=False, repr=False)


class VitalsTaker:
    """Takes the vitals of one model and its optimizer, again and again.

    Each tensor is read once and none is copied (see `ddpcall.replicas.StateDigester`); the model's structure is
    looked at anew when a module, parameter or buffer was added, removed or replaced. Changes nothing, and runs no
    collective.

    Args:
        model: The wrapped or the inner module, the same choice on every rank. Parameters and buffers that DDP was
            told to ignore are left out (`_ddp_params_and_buffers_to_ignore`), and so are non-persistent buffers:
            they differ between ranks by design.
        optimizer: Absent vitals part `optimizer` when None; may be set later, as the attribute `optimizer`.
            Its settings include the loss scale where the attribute `scaler` is set.

    The part `rng` is torch's default generator on the model's device, from which dropout draws; few scripts seed
    Python's and numpy's.

    Blind to: shards of DTensors (FSDP2, tensor parallel: each rank holds other values by design; names, dtypes and
    global shapes are compared, and replicated DTensors whole); the optimizer's state tensors (momenta); values of
    unknown types in the batch and in the optimizer's settings, of which only the type counts; renamed parameters
    that are otherwise the same objects in the same places.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        self.optimizer = optimizer
        self.scaler: GradScaler | None = None
        self._structure = _Structure(model)
        self._origin: dict[str, list[float]] | None = None

    def take(
        self, step: int, batch: Any = None, closely: bool = False, facts: Callable[[], Facts] = Facts
    ) -> Vitals:
        """Digest everything now; waits for the device where tensors are on one.

        Args:
            step: Optimizer steps done.
            batch: What this rank's step was computed from: tensors and plain values, nested. Not kept.
            closely: Whether parameters are digested one by one and measured too, so that it can be told which are
                apart in this step, and how far.
            facts: What this rank did until now.
        """
        leaves: Details = {} if batch is None else dict(_digest_leaves(batch, "batch"))
        structure = self._current_structure()
        if self._origin is None:
            self._origin = {name: sketch_tensor(p, name) for name, p in structure.named_parameters.items()}
        settings, flags = self._settings(structure), structure.read_modes()
        details: dict[str, Callable[[], Details]] = {
            "optimizer": lambda: settings,
            "modes": lambda: structure.modes(flags),
        }
        measures: dict[str, Callable[[], dict[str, str]]] = {}
        if closely:
            digests, measured = self.details("parameters"), self.measure_parameters()
            details["parameters"], measures["parameters"] = lambda: digests, lambda: measured
        copies = structure.copy_buffers()
        if copies is not None:
            details["buffers"] = lambda: {name: digest_tensor(copy) for name, copy in copies().items()}
            measures["buffers"] = lambda: {name: measure(copy, name, None) for name, copy in copies().items()}
        parts = {
            "parameters": structure.parameters.digest() if structure.num_parameters else None,
            "buffers": structure.buffers.digest() if structure.num_buffers else None,
            "modes": structure.digest_modes(flags),
            "optimizer": _digest_details(settings) if self.optimizer else None,
            "rng": self._digest_generator(),
            "batch": _digest_details(leaves) if leaves else None,
        }
        known = {part: digest for part, digest in parts.items() if digest is not None}
        return Vitals(step, known, details, measures, facts)

    def take_last(self, num_steps: int, facts: Callable[[], Facts] = Facts) -> Vitals:
        """Return what this rank says when it leaves: numbers of steps and loads, and the parameters it ends with.

        What they are made of is read when somebody asks, from any thread: until then nobody may change the model.
        """
        parts = {"optimizer": num_steps, "modes": facts().loads[0], "parameters": self.digest_parameters()}
        details = {part: partial(self.details, part) for part in REPLICATED_PARTS}
        return Vitals(AT_THE_END, parts, details, {"parameters": self.measure_parameters}, facts)

    def has_parameter(self, name: str) -> bool:
        """Say whether the model has a parameter of this name."""
        known = self._current_structure().named_parameters  # of several models: behind their number
        return name in known or any(each.partition(".")[2] == name for each in known)

    def numel(self) -> int:
        """Return how many numbers the parameters are."""
        return sum(parameter.numel() for parameter in self._current_structure().named_parameters.values())

    def digest_parameters(self) -> int:
        """Return one digest of all parameters, as they are now."""
        return self._current_structure().parameters.digest()

    def measure_parameters(self) -> dict[str, str]:
        """Return, by name, what tells how far a parameter is from other ranks' and from where training began."""
        origin = self._origin or {}
        parameters = self._current_structure().named_parameters
        return {name: measure(parameter, name, origin.get(name)) for name, parameter in parameters.items()}

    def details(self, part: str) -> Details:
        """Return what one part is made of, as it is now.

        Args:
            part: One of `REPLICATED_PARTS`.

        Returns:
            By name of parameter or buffer: its digest; by name of module: train or eval; by optimizer setting: its
            value.
        """
        structure = self._current_structure()
        match part:
            case "parameters":
                return {name: digest_tensor(tensor) for name, tensor in structure.named_parameters.items()}
            case "buffers":
                return {name: digest_tensor(tensor) for name, tensor in structure.named_buffers.items()}
            case "modes":
                return structure.modes(structure.read_modes())
            case "optimizer":
                return self._settings(structure)
            case _:
                raise ValueError(f"vitals have no part {part!r}")

    def parameter_shapes(self) -> set[tuple[int, ...]]:
        """Return the shapes of all parameters."""
        return {tuple(each.shape) for each in self._current_structure().named_parameters.values()}

    def device_type(self) -> str:
        """Return the type of the device whose generator is looked at."""
        types = (parameter.device.type for parameter in self._current_structure().first_parameters)
        return next((kind for kind in types if kind in DEVICE_TYPES and kind != CPU), CPU)

    def _digest_generator(self) -> int:
        return digest_tensor(get_rng_state(self.device_type()))

    def _settings(self, structure: _Structure) -> Details:
        if self.optimizer is None:
            return {}
        scale: Details = {} if self.scaler is None else {LOSS_SCALE: self.scaler.get_scale()}
        return _optimizer_settings(self.optimizer, structure.ignored) | scale

    def _current_structure(self) -> _Structure:
        if not self._structure.is_current():
            self._structure = _Structure(self._structure.model)
        return self._structure


class _Structure:
    """The modules, parameters and buffers a model had when it was looked at."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        named_modules = dict(model.named_modules())
        self._modules = list(named_modules.values())
        self._names = list(named_modules)
        self._tables = [entry.of(module) for module in self._modules for entry in internals.MODULE_TABLES.values()]
        self._entries = self._read_entries()
        ignored = set(_names_in(named_modules, internals.IGNORED_BY_DDP))
        self.named_parameters = {n: p for n, p in model.named_parameters() if n not in ignored}
        self.ignored = frozenset(id(p) for n, p in model.named_parameters() if n in ignored)
        # In no checkpoint are caches and hidden states, a rank's own.
        ignored.update(_names_in(named_modules, internals.NON_PERSISTENT_BUFFERS))
        self.named_buffers = {n: b for n, b in model.named_buffers() if n not in ignored}
        self.first_parameters = list(self.named_parameters.values())[:1]
        self.num_parameters, self.num_buffers = len(self.named_parameters), len(self.named_buffers)
        self.parameters = StateDigester(self.named_parameters)
        self.buffers = StateDigester(self.named_buffers)
        self._header = digest_bytes("\n".join(self._names).encode())
        self._copied_buffers = _group_small(self.named_buffers)

    def _read_entries(self) -> list[Any]:
        return list(chain.from_iterable(map(methodcaller("values"), self._tables)))  # no dicts where scripted

    def is_current(self) -> bool:
        """Say whether the model still consists of the same objects, in the same places."""
        entries = self._read_entries()
        return len(entries) == len(self._entries) and all(map(is_, entries, self._entries))

    def copy_buffers(self) -> Callable[[], dict[str, Tensor]] | None:
        """Return what gives copies of the buffers as they are now, flat; None where they are too large to keep."""
        flat = []
        for buffers in self._copied_buffers:
            sizes = [buffer.numel() for buffer in buffers.values()]
            flat.append((buffers, sizes, torch.cat([buffer.detach().reshape(-1) for buffer in buffers.values()])))

        def split() -> dict[str, Tensor]:
            return {
                name: copy
                for names, sizes, all_ in flat
                for name, copy in zip(names, all_.split(sizes), strict=True)
            }

        return split if flat else None

    def read_modes(self) -> bytes:
        """Return every module's train/eval flag."""
        return bytes(map(bool, map(attrgetter("training"), self._modules)))

    def digest_modes(self, flags: bytes) -> int:
        """Return the digest of every module's train/eval flag."""
        return digest_bytes(flags + self._header.to_bytes(8, "little", signed=True))

    def modes(self, flags: bytes) -> Details:
        """Return train or eval by module name; the model itself is called (root)."""
        named = zip(self._names, flags, strict=True)
        return {name or "(root)": "train" if is_training else "eval" for name, is_training in named}


def _group_small(buffers: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return the buffers to copy, by dtype and device: one copy each is cheaper than one a buffer."""
    readable = {name: buffer for name, buffer in buffers.items() if not is_unreadable(buffer)}
    if sum(buffer.numel() * buffer.element_size() for buffer in readable.values()) > MAX_COPIED_BYTES:
        return []
    groups: dict[tuple[torch.dtype, torch.device], dict[str, Tensor]] = {}
    for name, buffer in readable.items():
        groups.setdefault((buffer.dtype, buffer.device), {})[name] = buffer
    return list(groups.values())


def _names_in(named_modules: Mapping[str, nn.Module], attribute: Any) -> Iterator[str]:
    """Yield the names that modules list in one of torch's own attributes, named from the root of the model."""
    for prefix, module in named_modules.items():
        for name in attribute.of(module, ()):
            yield f"{prefix}.{name}" if prefix else name


def _digest_details(details: Details) -> int:
    """Return one digest over names and values; those of numbers are exact."""
    return digest_bytes(repr(list(details.items())).encode())


def _optimizer_settings(optimizer: Optimizer, ignored: frozenset[int]) -> Details:
    """Return the class and every hyper-parameter of every group (learning rates, betas, weight decay, …).

    Groups of parameters that DDP was told to ignore, by id, are a rank's own.
    """
    settings: Details = {"class": type(optimizer).__name__}
    for index, group in enumerate(optimizer.param_groups):
        if group["params"] and all(id(parameter) in ignored for parameter in group["params"]):
            continue
        for key, value in sorted(group.items()):  # a loaded state has its own order
            if key == "params":
                settings[f"group {index} parameters"] = len(value)
            else:
                settings[f"group {index} {key}"] = _plain_value(value)
    return settings


def _plain_value(value: Any) -> int | str | float:
    """Return a setting as a number or text that is the same on every rank exactly when the setting is."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else f"tensor {digest_tensor(value):016x}"
    if isinstance(value, int | float | str):
        return value
    if isinstance(value, list | tuple):
        return f"({', '.join(str(_plain_value(item)) for item in value)})"
    # The text of any other object may hold its address.
    return repr(value) if value is None or isinstance(value, torch.dtype | torch.device) else type(value).__name__


def _digest_leaves(value: Any, where: str, depth: int = 0) -> Iterator[tuple[str, int]]:
    """Yield (place, digest) for every tensor, array and plain value in a batch, however nested."""
    if isinstance(value, Tensor):
        yield where, digest_bytes(f"{value.dtype} {tuple(value.shape)} {digest_tensor(value)}".encode())
    elif isinstance(value, str | bytes | int | float | complex):
        yield where, digest_bytes(repr(value).encode())
    elif hasattr(value, "__array_interface__"):
        yield where, digest_bytes(f"{value.dtype} {value.shape} {_digest_array(value)}".encode())
    elif depth < _MAX_DEPTH:
        for key, item in _items(value):
            yield from _digest_leaves(item, f"{where}[{key!r}]", depth + 1)


def _digest_array(array_like: Any) -> int:
    data = np.ascontiguousarray(array_like)
    if data.dtype.hasobject:
        return digest_bytes(repr(data.tolist()).encode())
    return digest_bytes(data)


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return value.items()
    if isinstance(value, list | tuple):
        return enumerate(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    own = getattr(value, "__dict__", None)
    return own.items() if isinstance(own, dict) and not isinstance(value, type | nn.Module) else ()
