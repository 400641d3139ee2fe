"""Put a function before the forwards of single modules, so that neither copies, pickles nor dynamo notice."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Generator
from types import CodeType, FrameType, MethodType
from typing import Any

import torch
from torch import nn

from ddpcall import torch_internals as internals
from ddpcall.taps.call_site import TORCH
from ddpcall.taps.undo import Undo, replace_attribute, undo_all


def outside_dynamo(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function so that dynamo leaves it, and all it calls, alone.

    What runs eagerly between two compiled graphs is compiled by dynamo too; a script under the watch must not have
    more compiled frames than without it.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return internals.disable_dynamo(call)


ForwardObserver = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
_CALL_CODES = frozenset(
    code
    for entry in internals.CALLS.values()
    if (method := entry.get(None)) is not None
    for code in (method.__code__, *method.__code__.co_consts)
    if isinstance(code, CodeType)
)
_CALL_NAMES = frozenset(code.co_name for code in _CALL_CODES)


def came_through_call(frame: FrameType) -> bool:
    """Say whether a frame is `Module.__call__`'s, which runs the hooks around forward."""
    return frame.f_code.co_name in _CALL_NAMES and frame.f_code in _CALL_CODES


class ForwardTap:
    """Puts a function before the forwards of single modules, as a bound method in the instance's `__dict__`.

    A bound method is copied with the module and pickles by name, so copies use their own parameters; modules that
    are copied or pickled the usual way do not carry it at all (`strip_forward_taps`). Compiled code never sees
    the observer: dynamo folds `is_compiling()` and traces the original.
    """

    MARK = "_ddpcall_original"

    def __init__(self, observer: ForwardObserver, quiet: Callable[[], bool]) -> None:
        """Take the observer, which gets (module, original, args, kwargs) and returns the outputs.

        Args:
            observer: Called in place of the original when `quiet()` is false.
            quiet: A cheap test; true means nothing is to be observed.
        """
        self._observer = observer
        self._quiet = quiet
        self._by_class: dict[Any, Callable[..., Any]] = {}

    def put(self, *modules: nn.Module) -> Undo:
        """Tap modules; the undo restores their `__dict__`s, and keeps none of them alive."""
        for module in modules:
            own = vars(module).get("forward")
            function = self._tapped(own) if own is not None else self._tapped_class(type(module))
            module.__dict__["forward"] = MethodType(function, module)
        references = [weakref.ref(module) for module in modules]

        def undo() -> None:
            for reference in references:
                tapped = reference()
                if tapped is not None:
                    _restore_forward(tapped.__dict__)

        return undo

    def _tapped_class(self, cls: type[nn.Module]) -> Callable[..., Any]:
        if cls not in self._by_class:
            self._by_class[cls] = self._tapped(None, cls.forward)
        return self._by_class[cls]

    def _tapped(self, own: Any, function: Any = None) -> Callable[..., Any]:
        observer, quiet, is_compiling = self._observer, self._quiet, torch.compiler.is_compiling
        if own is None:

            def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
                if is_compiling() or quiet():
                    return type(self).forward(self, *args, **kwargs)
                return observer(self, MethodType(type(self).forward, self), args, kwargs)

        else:

            def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
                if is_compiling() or quiet():
                    return own(*args, **kwargs)
                return observer(self, own, args, kwargs)

        with contextlib.suppress(AttributeError, TypeError):  # a partial has no name
            functools.update_wrapper(forward, function if own is None else own)
        forward.__name__ = "forward"  # pickle finds a bound method by its name
        if getattr(getattr(function, "__code__", None), "co_filename", "").startswith(TORCH):
            # As torch's own forwards; a copy, since those of users' modules are compiled.
            forward.__code__ = forward.__code__.replace()
            _skip_in_dynamo(forward.__code__)
            _skip_in_dynamo(getattr(quiet, "__func__", quiet).__code__)
        setattr(forward, ForwardTap.MARK, own)
        return forward


def _skip_in_dynamo(code: CodeType) -> None:
    """Let dynamo not compile this when it comes upon it between two graphs; what it calls is none of this.

    Blind to: dynamo imported later; DDP and torch.compile import it.
    """
    skip_code = internals.SKIP_CODE.if_imported()
    if skip_code is not None:
        skip_code(code)


def _is_tap(value: Any) -> bool:
    return isinstance(value, MethodType) and ForwardTap.MARK in value.__func__.__dict__


def _restore_forward(attributes: dict[str, Any]) -> None:
    """Take one tap off; `strip_forward_taps` has the loop."""
    if not _is_tap(attributes.get("forward")):
        return
    original = getattr(attributes["forward"].__func__, ForwardTap.MARK)
    if original is None:
        del attributes["forward"]
    else:
        attributes["forward"] = original


def _strip(attributes: dict[str, Any]) -> None:
    while _is_tap(attributes.get("forward")):
        _restore_forward(attributes)


@contextlib.contextmanager
def suspend_forward_taps(root: nn.Module) -> Generator[None]:
    """Take the taps off a module tree for a while."""
    taken = {}
    for module in root.modules():
        if _is_tap(module.__dict__.get("forward")):
            taken[module] = module.__dict__["forward"]
            _strip(module.__dict__)
    try:
        yield
    finally:
        for module, tap in taken.items():
            module.__dict__["forward"] = tap


def strip_forward_taps() -> Undo:
    """Make what is made of tapped modules come out untapped: copies, pickles, DataParallel replicas, scripts.

    Source: `torch/nn/modules/module.py`, `__getstate__` and `_replicate_for_data_parallel`;
    `torch/jit/_recursive.py`, which compiles forward's source with the globals of the function that stands there.

    Blind to: subclasses whose own `__getstate__` takes `self.__dict__`; their copies carry an idle tap.
    """
    get_state, replicate = nn.Module.__getstate__, internals.REPLICATE_FOR_DATA_PARALLEL.get()
    script, recursive = internals.CREATE_SCRIPT_MODULE.get(), internals.CREATE_SCRIPT_MODULE.owner()

    def __getstate__(self: nn.Module) -> Any:
        state = get_state(self)
        _strip(state)
        return state

    def _replicate_for_data_parallel(self: nn.Module) -> Any:
        replica = replicate(self)
        _strip(replica.__dict__)
        return replica

    @functools.wraps(script)
    def create_script_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with suspend_forward_taps(module):
            return script(module, *args, **kwargs)

    patches = (
        (nn.Module, "__getstate__", __getstate__),
        (nn.Module, replicate.__name__, _replicate_for_data_parallel),
        (recursive, script.__name__, create_script_module),
    )
    return undo_all(replace_attribute(*patch) for patch in patches)
