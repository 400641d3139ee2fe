"""Reversible instrumentation: the only room that touches a subject.

Every tap returns its undo, a callable that puts back exactly what was there, in any order and also after an
exception. Probes and watch are built on these and nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from types import CodeType, FrameType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import _recursive  # pyright: ignore[reportAttributeAccessIssue]
from torch.nn.parameter import UninitializedTensorMixin  # pyright: ignore[reportAttributeAccessIssue]

Undo = Callable[[], None]

HOOK_DICTS = {
    "forward_pre": "_forward_pre_hooks",
    "forward": "_forward_hooks",
    "full_backward": "_backward_hooks",
}


def wrap_method(owner: Any, name: str, wrapping: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Undo:
    """Replace a method on one instance by `wrapping(original)`.

    Args:
        owner: The instance; its class is left alone.
        name: The method's name.
        wrapping: Gets the bound original, returns the callable to put in its place.

    Returns:
        The undo: restores the instance's `__dict__` entry, or its absence.

    Blind to: calls through the class, such as `type(m).forward(m, x)`.
    """
    had_own = name in owner.__dict__
    original = owner.__dict__[name] if had_own else partial(_call_class_method, owner, name)
    owner.__dict__[name] = wrapping(original)

    def undo() -> None:
        if had_own:
            owner.__dict__[name] = original
        else:
            owner.__dict__.pop(name, None)

    return undo


def _call_class_method(owner: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """Look the method up when it is called: lazy modules change their class in their first forward."""
    try:
        method = getattr(type(owner), name)
    except AttributeError:  # TorchScript's modules have their methods in __getattr__
        return owner.__getattr__(name)(*args, **kwargs)
    return method(owner, *args, **kwargs)


TIMED = "_ddpcall_timed"


@dataclass(frozen=True)
class Span:
    """Something that began and ended, in nanoseconds of `time.perf_counter_ns`.

    Attributes:
        raised: The class of the exception it ended in; None where it returned.
    """

    kind: str
    name: str
    owner: str | None
    begin_ns: int
    end_ns: int
    detail: str | None = None
    raised: str | None = None


@dataclass
class SpanLog:
    """Collects spans while `recording` is set, and costs a test of that flag while it is not."""

    recording: bool = False
    spans: list[Span] = field(default_factory=list)

    @contextlib.contextmanager
    def span(self, kind: str, name: str, owner: str | None = None, detail: str | None = None) -> Iterator[None]:
        """Note when the body began and ended, also when it raises."""
        if not self.recording:
            yield
            return
        raised = None
        began = time.perf_counter_ns()
        try:
            yield
        except BaseException as error:
            raised = type(error).__name__
            raise
        finally:
            self.spans.append(Span(kind, name, owner, began, time.perf_counter_ns(), detail, raised))


@dataclass(frozen=True)
class SpanPlace:
    """A log, and what the spans of one module are called in it."""

    log: SpanLog
    name: str
    owner: str
    detail: str | None = None

    def span(self, kind: str, detail: str | None = None) -> contextlib.AbstractContextManager[None]:
        """Return the context to log; `detail` wins over the place's own."""
        return self.log.span(kind, self.name, self.owner, detail or self.detail)


def count_forwards(
    module: nn.Module, counter: Tensor, differentiable: Tensor, place: SpanPlace | None = None
) -> Undo:
    """Count the runs of a module's forward, however it was reached, and those a gradient can flow back through.

    The counters are tensors, so that compiled code counts too: dynamo traces the addition into the graph
    instead of guarding on a Python number, and nothing is recompiled. Compiled code logs no spans: dynamo folds
    `is_compiling()` and never reads whether the log records, so that nothing is recompiled when it begins to.
    One wrapper does both, since a second one would make dynamo compile more frames where a graph breaks.

    Args:
        module: The module to observe.
        counter: Shape (), integer, on any device: one more for every run.
        differentiable: The same, for runs whose output requires a gradient: only those have a backward.
        place: Where and by what name a span is logged for each run, while that log records; None: nowhere.

    Blind to: `type(module).forward(module, x)` and the functional form on the module's weights.
    """

    def counting(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or place is None or not place.log.recording:
                outputs = original(*args, **kwargs)
            else:
                with place.span("forward"):
                    outputs = original(*args, **kwargs)
            counter.add_(1)
            if requires_gradient(outputs):
                differentiable.add_(1)
            return outputs

        return forward

    return wrap_method(module, "forward", counting)


def requires_gradient(outputs: Any) -> bool:
    """Say whether any tensor in nested tuples, lists and dicts requires a gradient."""
    if isinstance(outputs, Tensor):
        return outputs.requires_grad
    if isinstance(outputs, dict):
        outputs = tuple(outputs.values())
    return isinstance(outputs, tuple | list) and any(requires_gradient(output) for output in outputs)


def count_hook(module: nn.Module, kind: str, counter: Tensor) -> Undo:
    """Register a witness hook that adds one to `counter` each time it fires.

    Args:
        module: Where to register.
        kind: forward_pre, forward or full_backward.
        counter: Shape (), integer.
    """

    def witness(*_: Any) -> None:
        counter.add_(1)

    register = {
        "forward_pre": module.register_forward_pre_hook,
        "forward": module.register_forward_hook,
        "full_backward": module.register_full_backward_hook,
    }[kind]
    # A compiled module writes this flag through to the module it holds, and keeps its own.
    flag_owner = getattr(module, "_orig_mod", module)
    had_full = flag_owner._is_full_backward_hook
    handle: Any = register(witness)

    def undo() -> None:
        handle.remove()
        flag_owner._is_full_backward_hook = had_full

    return undo


def count_global_hook(kind: str, counters: dict[int, Tensor]) -> Undo:
    """Register a witness hook for every module, counting those in `counters`, keyed by `id(module)`."""

    def witness(module: nn.Module, *_: Any) -> None:
        counter = counters.get(id(module))
        if counter is not None:
            counter.add_(1)

    hooks = nn.modules.module
    register: Any = {
        "forward_pre": hooks.register_module_forward_pre_hook,
        "forward": hooks.register_module_forward_hook,
        "full_backward": hooks.register_module_full_backward_hook,
    }[kind]
    had_full = hooks._global_is_full_backward_hook
    handle = register(witness)

    def undo() -> None:
        handle.remove()
        hooks._global_is_full_backward_hook = had_full

    return undo


def time_hooks(module: nn.Module, kind: str, place: SpanPlace) -> Undo:
    """Log a span for each run of the hooks of one kind that a module now carries, whoever registered them.

    Hooks that are timed already are left alone, so it can be called again after more were registered.

    Args:
        module: The module; its hooks keep their places, keys and flags, and stay removable by their handles.
        kind: forward_pre, forward or full_backward.
        place: Where and by what name the spans are logged, while that log records.

    Blind to: hooks registered later, global ones, and hooks inside compiled code.
    """
    hooks = getattr(module, HOOK_DICTS[kind])
    originals = {key: hook for key, hook in hooks.items() if not hasattr(hook, TIMED)}
    timed = {key: _timed_hook(hook, kind, place) for key, hook in originals.items()}
    hooks.update(timed)

    def undo() -> None:
        for key, hook in originals.items():
            if hooks.get(key) is timed[key]:
                hooks[key] = hook

    return undo


def _timed_hook(hook: Callable[..., Any], kind: str, place: SpanPlace) -> Callable[..., Any]:
    span_kind, detail = ("pre_hook" if kind == "forward_pre" else "hook"), name_function(hook)

    def timed(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not place.log.recording:
            return hook(*args, **kwargs)
        with place.span(span_kind, detail):
            return hook(*args, **kwargs)

    setattr(timed, TIMED, hook)
    return timed


def name_hooks(module: nn.Module, kind: str) -> tuple[str, ...]:
    """Return the names of the functions that a module carries as hooks of one kind, in the order they run in."""
    return tuple(name_function(getattr(hook, TIMED, hook)) for hook in getattr(module, HOOK_DICTS[kind]).values())


def name_function(function: Callable[..., Any]) -> str:
    """Return a function's qualified name without its local scopes; of any other callable, its class."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return name.rpartition("<locals>.")[2]


def count_registered_hooks(module: nn.Module, kind: str) -> int:
    """Return how many hooks of one kind a module carries."""
    return len(getattr(module, HOOK_DICTS[kind]))


@dataclass
class ReducerLog:
    """What the reducer tap saw since the last `take`.

    Attributes:
        armed: Whether a reducer now expects gradients.
        armings: Grad-enabled forwards that prepared the reducer.
        arrivals_armed: Gradients that arrived while it was armed.
        arrivals_unarmed: Gradients that arrived while it was not.
    """

    armed: bool = False
    armings: int = 0
    arrivals_armed: int = 0
    arrivals_unarmed: int = 0
    _disarm_queued: bool = field(default=False, repr=False)

    def take(self) -> tuple[int, int, int]:
        """Return (armings, arrivals armed, arrivals unarmed) and start counting anew; `armed` stays."""
        seen = (self.armings, self.arrivals_armed, self.arrivals_unarmed)
        self.armings = self.arrivals_armed = self.arrivals_unarmed = 0
        return seen

    def arm(self) -> None:
        """Note that a forward prepared the reducer."""
        self.armed = True
        self.armings += 1

    def arrive(self) -> None:
        """Note one gradient; the first armed one queues the disarming at the end of this backward."""
        if not self.armed:
            self.arrivals_unarmed += 1
            return
        self.arrivals_armed += 1
        if not self._disarm_queued:
            self._disarm_queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._disarm)

    def _disarm(self) -> None:
        self.armed = self._disarm_queued = False


def tap_reducer(ddp: nn.Module, log: ReducerLog) -> Undo:
    """Arm `log` whenever this DDP prepares its reducer for a backward.

    Source: `torch/nn/parallel/distributed.py`, `_post_forward`: the reducer is prepared when gradients are
    enabled and `require_backward_grad_sync` is set.

    Blind to: DDP's python reducer and delayed all-reduce, which take other paths.
    """

    def arming(original: Callable[..., Any]) -> Callable[..., Any]:
        def _post_forward(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled() and ddp.require_backward_grad_sync:
                log.arm()
            return original(*args, **kwargs)

        return torch.compiler.disable(_post_forward)

    return wrap_method(ddp, "_post_forward", arming)


def tap_lazy_reducer(replicate_state: Any, log: ReducerLog) -> Undo:
    """Put `tap_reducer` on the DDP that `replicate` creates in its first forward, as soon as it is there."""
    with ExitStack() as stack:
        undos = stack.pop_all()

    def tapping(original: Callable[..., Any]) -> Callable[..., Any]:
        def init(*args: Any, **kwargs: Any) -> None:
            original(*args, **kwargs)
            undos.callback(tap_reducer(replicate_state._ddp, log))

        return init

    undos.callback(wrap_method(replicate_state, "init", tapping))
    return undos.close


def is_lazy(tensor: Tensor) -> bool:
    """Say whether a tensor belongs to a lazy module and has no values yet."""
    return isinstance(tensor, UninitializedTensorMixin)


def tap_gradient_arrivals(parameters: Iterable[nn.Parameter], log: ReducerLog) -> Undo:
    """Tell `log` whenever a parameter's gradient was accumulated.

    Blind to: `torch.autograd.grad`, which accumulates nothing, parameters that do not require a gradient, and
    lazy ones that have no values yet.
    """

    def arrived(_: Tensor) -> None:
        log.arrive()

    tapped = [parameter for parameter in parameters if parameter.requires_grad and not is_lazy(parameter)]
    handles = [parameter.register_post_accumulate_grad_hook(arrived) for parameter in tapped]

    def undo() -> None:
        for handle in handles:
            handle.remove()
        for parameter in tapped:
            if not parameter._post_accumulate_grad_hooks:
                setattr(parameter, "_post_accumulate_grad_hooks", None)  # noqa: B010 (typed as a dict, None at first)

    return undo


@dataclass(frozen=True, order=True)
class CallSite:
    """A line of the user's code.

    Attributes:
        file: Path as Python knows it.
        line: From 1; 0 when unknown.
        function: Name of the function the line stands in; `<module>` at the top level.
    """

    file: str
    line: int
    function: str


NOWHERE = CallSite("", 0, "")
_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep
_STANDARD_LIBRARY = os.path.dirname(os.__file__) + os.sep
_INFRASTRUCTURE = ("/accelerate/", "/lightning/fabric/", "/pytorch_lightning/")


@functools.lru_cache(maxsize=4096)
def is_user_file(file: str) -> bool:
    """Say whether a file is the user's: not torch's, ours, the standard library's or a wrapper library's."""
    if file.startswith((_TORCH, _OURS, "<frozen", "<eval_with_key>")):  # the last: code that torch.fx wrote
        return False
    in_packages = "/site-packages/" in file or "/dist-packages/" in file
    if file.startswith(_STANDARD_LIBRARY) and not in_packages:
        return False
    return not (in_packages and any(part in file for part in _INFRASTRUCTURE))


def find_call_site(inside: Callable[[Any], bool] | None = None) -> CallSite:
    """Return the line of the user's code that is running.

    Args:
        inside: Says of an object whether it belongs to the model. With it, the site is where the model was
            entered from: the caller of the outermost frame whose first argument belongs to the model.

    Returns:
        The innermost user frame outside the model; on an autograd worker thread, the main thread's.

    Blind to: frames of static methods and free functions of the model below its outermost method.
    """
    frame: FrameType | None = sys._getframe(1)
    if threading.current_thread() is not threading.main_thread() and not _has_user_frame(frame):
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return find_call_site_among(_outward(frame), inside)


def find_call_site_among(frames: Iterable[FrameType], inside: Callable[[Any], bool] | None = None) -> CallSite:
    """Return the user's line among frames, innermost first; see `find_call_site`."""
    found: CallSite | None = None
    for frame in frames:
        if inside is not None and inside(_bound_object(frame)):
            found = None
        elif found is None and is_user_file(frame.f_code.co_filename):
            found = site_of(frame)
            if inside is None:
                break
    return NOWHERE if found is None else found


def _outward(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _bound_object(frame: FrameType) -> Any:
    """Return the object whose method a frame runs; None for a function, though it may take the model first."""
    code = frame.f_code
    if not code.co_argcount:
        return None
    first = frame.f_locals.get(code.co_varnames[0])
    if code.co_varnames[0] == "self":
        return first
    method = inspect.unwrap(getattr(type(first), code.co_name, None) or len)
    return first if getattr(method, "__code__", None) is code else None


def site_of(frame: FrameType) -> CallSite:
    """Return the line a frame is at."""
    return CallSite(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)


def _has_user_frame(frame: FrameType | None) -> bool:
    return any(is_user_file(outer.f_code.co_filename) for outer in _outward(frame))


def replace_attribute(owner: Any, name: str, value: Any) -> Undo:
    """Put a value in an owner's own `__dict__` (class, module or instance) and return the undo.

    The undo leaves alone what somebody else has put in its place since.
    """
    had_own = name in vars(owner)
    original = vars(owner).get(name)
    setattr(owner, name, value)

    def undo() -> None:
        if vars(owner).get(name) is not value:
            return
        if had_own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)

    return undo


def remove_handles(*handles: Any) -> Undo:
    """Return the undo of torch's own registrations."""

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def outside_dynamo(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function so that dynamo leaves it, and all it calls, alone.

    What runs eagerly between two compiled graphs is compiled by dynamo too; a script under the watch must not have
    more compiled frames than without it.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return torch._disable_dynamo(call)


ForwardObserver = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
_CALL_CODES = frozenset(
    {nn.Module._call_impl.__code__, nn.Module._slow_forward.__code__}
    | {code for code in nn.Module._call_impl.__code__.co_consts if isinstance(code, CodeType)}
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
        if getattr(getattr(function, "__code__", None), "co_filename", "").startswith(_TORCH):
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
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is not None:
        dynamo.skip_code(code)


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
def suspend_forward_taps(root: nn.Module) -> Iterator[None]:
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
    get_state, replicate = nn.Module.__getstate__, nn.Module._replicate_for_data_parallel
    script = _recursive.create_script_module

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

    with ExitStack() as stack:
        stack.callback(replace_attribute(nn.Module, "__getstate__", __getstate__))
        stack.callback(replace_attribute(nn.Module, "_replicate_for_data_parallel", _replicate_for_data_parallel))
        stack.callback(replace_attribute(_recursive, "create_script_module", create_script_module))
        return stack.pop_all().close


def in_backward() -> bool:
    """Say whether this thread is running a backward."""
    return torch._C._current_graph_task_id() != -1  # pyright: ignore[reportAttributeAccessIssue]


def find_tensors(values: Any, depth: int = 4) -> list[Tensor]:
    """Return the tensors in nested tuples, lists, dicts and plain objects, at most `depth` levels down."""
    if isinstance(values, Tensor):
        return [values]
    if depth == 0 or isinstance(values, nn.Module | str | bytes | int | float | None):
        return []
    if isinstance(values, dict):
        values = tuple(values.values())
    elif not isinstance(values, tuple | list | set):
        values = tuple(getattr(values, "__dict__", {}).values())
    return [tensor for value in values for tensor in find_tensors(value, depth - 1)]
