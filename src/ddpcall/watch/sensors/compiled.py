"""Compiled models: calls that run eager, and hooks registered too late to be compiled in."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ddpcall import torch_internals as internals
from ddpcall.taps import (
    CallSite,
    ForwardTap,
    Undo,
    count_hook,
    find_call_site,
    hear_calls,
    in_backward,
    is_user_file,
    replace_attribute,
    suspend_forward_taps,
    undo_all,
)
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.hooks import can_be_tapped, is_users


@dataclass(eq=False)
class CompiledRoot:
    """One compiled module.

    Attributes:
        module: The user's own module.
        in_place: Whether `module.compile()` was used: then there is no other object to call.
        calls: Times the compiled call was entered.
        inside: Compiled calls that are running.
        entries: Eager entries, in all.
        methods: Lines that took one of the module's own methods from the compiled object, since the last step.
        waiting: Eager entries under no_grad: harm only if the compiled call is never used.
        seen: (calls, entries) at the last optimizer step.
    """

    module: weakref.ref[nn.Module]
    in_place: bool
    calls: int = 0
    inside: int = 0
    entries: int = 0
    methods: list[CallSite] = field(default_factory=list)
    waiting: list[CallSite] = field(default_factory=list)
    seen: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        """The module's class."""
        module = self.module()
        return "The model" if module is None else type(module).__name__


@dataclass(eq=False)
class LateHook:
    """A hook registered after the first compiled call, with a counting hook of the same kind beside it."""

    root: CompiledRoot
    module: str
    site: CallSite
    calls: int
    counter: Tensor
    undo: Undo


class CompiledSensor:
    """Follows torch.compile(module) and module.compile().

    Attributes:
        roots: What was compiled.
        late: Hooks that were registered after the first compiled call, and are not judged yet.
        is_used: Whether anything was compiled, functions too.

    Blind to: eager parts after a graph break; compiled functions that are no modules.
    """

    def __init__(
        self,
        run: Run,
        adopted: Callable[[nn.Module], None],
        ran_eagerly: Callable[[CompiledRoot, CallSite, bool], None],
    ) -> None:
        """Take the run.

        Args:
            run: Keeps the undos.
            adopted: Hears of all modules of compiled ones.
            ran_eagerly: Hears of a module that runs outside every compiled call: its root, the line, and whether
                it is the compiled module itself.
        """
        self._keep = run.keep
        self._adopted = adopted
        self._ran_eagerly = ran_eagerly
        self.roots: list[CompiledRoot] = []
        self.late: list[LateHook] = []
        self.is_used = False
        self._of_module: weakref.WeakKeyDictionary[nn.Module, CompiledRoot] = weakref.WeakKeyDictionary()
        self._busy = False
        self._tap = ForwardTap(self._observe, lambda: self._busy)
        self._getattr_patched = False

    def attach(self) -> Undo:
        """Hear of models as they are compiled; returns the undo."""
        internals.require(internals.COMPILED_CALL_IMPL, internals.CURRENT_GRAPH_TASK)
        compile_ = torch.compile

        @functools.wraps(compile_)
        def compiling(model: Any = None, **kwargs: Any) -> Any:
            self.is_used = True
            if not isinstance(model, nn.Module):
                return compile_(model, **kwargs) if model is not None else compile_(**kwargs)
            with suspend_forward_taps(model):  # torch looks at where forward is defined
                compiled: Any = compile_(model, **kwargs)
            if isinstance(compiled, nn.Module) and compiled is not model:
                self._adopt_object(model, compiled)
            return compiled

        def compiled_in_place(_: None, module: nn.Module, *args: Any, **kwargs: Any) -> None:
            self.is_used = True
            self._adopt_in_place(module)

        in_place = hear_calls(nn.Module, "compile", after=compiled_in_place)
        return undo_all((in_place, replace_attribute(torch, "compile", compiling)))

    def adopt(self, module: nn.Module) -> None:
        """Follow a module that was compiled before the watch began. Whether it was called since is not known."""
        is_object = isinstance(module, internals.OPTIMIZED_MODULE.if_imported() or ())
        model = internals.ORIG_MOD.of(module) if is_object else module
        if any(root.module() is model and root.in_place is not is_object for root in self.roots):
            return
        if is_object:
            root = self._adopt_object(model, module)
        elif internals.COMPILED_CALL_IMPL.of(module) is not None:
            root = self._adopt_in_place(module)
        else:
            return
        root.calls, root.seen = 1, (1, 0)

    def _adopt_in_place(self, module: nn.Module) -> CompiledRoot:
        root = self._adopt(module, in_place=True)
        call = internals.COMPILED_CALL_IMPL.of(module)
        counting = self._counting(call, root)
        setattr(module, internals.COMPILED_CALL_IMPL.name, counting)
        reference = weakref.ref(module)
        self._keep(lambda: _restore_call(reference, counting, call))
        return root

    def _adopt_object(self, model: nn.Module, compiled: nn.Module) -> CompiledRoot:
        root = self._adopt(model, in_place=False)
        forward = compiled.__dict__.get("forward")
        if forward is not None:
            self._keep(replace_attribute(compiled, "forward", self._counting(forward, root)))
        if not self._getattr_patched:
            self._getattr_patched = True
            self._keep(hear_calls(type(compiled), "__getattr__", after=self._note_method))
        return root

    def _adopt(self, module: nn.Module, in_place: bool) -> CompiledRoot:
        root = CompiledRoot(weakref.ref(module), in_place)
        self.roots.append(root)
        for child in module.modules():
            if can_be_tapped(child) and child not in self._of_module:
                self._of_module[child] = root
                self._adopted(child)
                self._keep(self._tap.put(child))
        return root

    def _counting(self, call: Callable[..., Any], root: CompiledRoot) -> Callable[..., Any]:
        is_compiling = torch.compiler.is_compiling

        @functools.wraps(call)
        def counting(*args: Any, **kwargs: Any) -> Any:
            if is_compiling():
                return call(*args, **kwargs)
            root.calls += 1
            root.inside += 1
            busy, self._busy = self._busy, True
            try:
                return call(*args, **kwargs)
            finally:
                self._busy = busy
                root.inside -= 1

        return counting

    def _note_method(self, value: Any, compiled: nn.Module, name: str) -> None:
        if isinstance(value, MethodType) and torch.is_grad_enabled():
            root = self._of_module.get(internals.ORIG_MOD.of(compiled))
            if root is not None and is_user_file(value.__func__.__code__.co_filename):
                root.methods = [*root.methods[-15:], find_call_site()]

    def _observe(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A module of a compiled model runs outside every compiled call."""
        root = self._of_module.get(module)
        if root is None or in_backward():
            return original(*args, **kwargs)
        root.entries += 1
        is_whole = root.in_place and module is root.module()
        site = find_call_site() if is_whole else find_call_site(lambda candidate: self._belongs(candidate, root))
        self._ran_eagerly(root, site, is_whole)
        self._busy = True
        try:
            return original(*args, **kwargs)
        finally:
            self._busy = False

    def _belongs(self, candidate: Any, root: CompiledRoot) -> bool:
        return isinstance(candidate, nn.Module) and self._of_module.get(candidate) is root

    # ---- hooks ----------------------------------------------------------------------------------------------

    def hook_registered(self, module: nn.Module, kind: str, hook: Any) -> None:
        """Put a counting hook beside a hook that is registered after the first compiled call."""
        root = self._of_module.get(module)
        if root is None or not root.calls or kind not in ("forward", "forward_pre") or not is_users(hook):
            return
        counter = torch.zeros((), dtype=torch.int64)
        undo = count_hook(module, kind, counter)
        self.late.append(LateHook(root, type(module).__name__, find_call_site(), root.calls, counter, undo))


def _restore_call(reference: weakref.ref[nn.Module], counting: Any, call: Any) -> None:
    module = reference()
    if module is not None and internals.COMPILED_CALL_IMPL.of(module) is counting:
        setattr(module, internals.COMPILED_CALL_IMPL.name, call)
