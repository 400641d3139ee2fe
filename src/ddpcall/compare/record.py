"""The recorder: keeps sketches of chosen steps of a training script that runs unchanged.

A model is found when it is first called: the outermost module whose parameters an optimizer holds. A step begins
with the model's first forward after the last optimizer step, and its record is made when the next one begins,
or at the end. Nothing is exchanged: every rank writes what it knows.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ddpcall import torch_internals as internals
from ddpcall.compare.files import Writer
from ddpcall.compare.one_process import digest_random_state
from ddpcall.compare.samples import NUM_NUMBERS, SampleRecorder
from ddpcall.compare.steps import StepRecord, choose_named, measure_rounding
from ddpcall.mixing import MixingCollector
from ddpcall.mixing.shards import find_places
from ddpcall.sketch import NUM_BUCKETS
from ddpcall.taps import Undo, in_backward, replace_attribute
from ddpcall.targets import LOSSES, count_targets, wrap_loss

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_WRAPPERS = ("module", internals.ORIG_MOD.name, internals.FSDP1["fsdp_wrapped_module"].name)
_SKETCHES = 6  # of a parameter: own and used gradient, what lay in .grad, weights, update, rounding


class Recorder:
    """Records one model of this process.

    Args:
        writer: Where records go.
        wants: Says of a step's number whether it is recorded.

    Blind to: models beside the first that is trained; optimizers that are no `torch.optim.Optimizer`; modules
    within compiled models, of which the last output alone is kept.
    """

    def __init__(self, writer: Writer, wants: Callable[[int], bool]) -> None:
        self._writer, self._wants = writer, wants
        self._optimizers: WeakSet[Optimizer] = WeakSet()
        self._undos: list[Undo] = []
        self._root: nn.Module | None = None
        self._step = 0
        self._is_recording = self._has_stepped = self._is_over = False
        self._losses: list[float] = []
        self._targets: list[int] = []
        self._rates: list[float] = []
        self._loss_scale = 1.0

    # ---- on and off --------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Look for a model; before the script is run."""
        original = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self._root is None and torch.is_grad_enabled() and self._may_be_root(module):
                nn.Module.__call__ = original  # dynamo knows this one, and the model may be compiled
                self._guard(self._begin_with, module)
            return original(module, *args, **kwargs)

        nn.Module.__call__ = call
        self._undos.append(lambda: setattr(nn.Module, "__call__", original))
        self._undos.append(replace_attribute(Optimizer, "__init__", self._wrap_optimizer(Optimizer.__init__)))
        self._undos.append(
            replace_attribute(torch.autograd, "backward", self._wrap_backward(torch.autograd.backward))
        )
        self._undos.append(
            replace_attribute(torch.amp.GradScaler, "scale", self._wrap_scale(torch.amp.GradScaler.scale))
        )
        for loss in LOSSES:
            self._undos.append(replace_attribute(F, loss.__name__, wrap_loss(loss, self._call_loss)))
        self._undos.append(register_optimizer_step_post_hook(self._after_step).remove)

    def close(self) -> None:
        """Write what is left and take everything off."""
        if self._is_recording and self._has_stepped:
            self._guard(self._finish)
        self._writer.close()
        self._stop()
        for undo in reversed(self._undos):
            undo()
        self._undos.clear()

    @property
    def has_recorded(self) -> bool:
        """Some step was written."""
        return bool(self._writer.steps)

    def _stop(self) -> None:
        """End recording; hooks stay on until the end, as torch may be calling them."""
        self._is_over = True
        self._is_recording = False
        if self._root is not None:
            self._samples.is_on = False

    def _guard(self, act: Callable[..., None], *args: Any) -> None:
        """Do something of ours; what goes wrong in it is said, recording ends and the training goes on."""
        try:
            act(*args)
        except Exception as error:
            self._writer.meta["failure"] = f"{type(error).__name__}: {error}"
            print(f"ddpcall record: recording ended: {type(error).__name__}: {error}", file=sys.stderr)
            self._stop()

    # ---- what is heard -----------------------------------------------------------------------------------------

    def _wrap_optimizer(self, original: Callable[..., None]) -> Callable[..., None]:
        @wraps(original)
        def init(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
            original(optimizer, *args, **kwargs)
            self._optimizers.add(optimizer)

        return init

    def _wrap_backward(self, original: Callable[..., None]) -> Callable[..., None]:
        @wraps(original)
        def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
            is_loss = isinstance(tensors, Tensor) and tensors.numel() == 1 and not hasattr(tensors, "placements")
            if self._is_recording and is_loss and not in_backward():
                self._losses.append(float(tensors.detach()) / self._loss_scale)
            original(tensors, *args, **kwargs)

        return backward

    def _wrap_scale(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def scale(scaler: Any, outputs: Any) -> Any:
            scaled = original(scaler, outputs)
            if self._is_recording:
                self._loss_scale = float(scaler.get_scale())
            return scaled

        return scale

    def _call_loss(self, loss: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._is_recording:
            self._guard(self._count_targets, loss, args, kwargs)
        return loss(*args, **kwargs)

    def _count_targets(self, *call: Any) -> None:
        count = count_targets(*call)
        self._targets += [] if count is None else [int(count)]

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._root is not None and not self._is_over and optimizer in self._held:
            self._has_stepped = True
            self._rates = [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]

    # ---- steps -------------------------------------------------------------------------------------------------

    def _may_be_root(self, module: nn.Module) -> bool:
        held = {id(p) for o in self._optimizers for group in o.param_groups for p in group["params"]}
        return bool(held) and any(id(parameter) in held for parameter in module.parameters())

    def _begin_with(self, root: nn.Module) -> None:
        inner = unwrap(root)
        own = {id(parameter) for parameter in root.parameters()}
        self._held = [
            optimizer
            for optimizer in self._optimizers
            if any(id(p) in own for group in optimizer.param_groups for p in group["params"])
        ]
        is_compiled = any(
            internals.ORIG_MOD.of(m, None) is not None or internals.COMPILED_CALL_IMPL.of(m, None) is not None
            for m in root.modules()
        )
        self._named = choose_named(root, inner, self._held)
        self._undos.append(root.register_forward_pre_hook(self._before_forward).remove)
        self._samples = SampleRecorder(root if is_compiled else inner, max_modules=1 if is_compiled else 512)
        self._samples.is_on = False
        self._undos.append(self._samples.start())
        self._root = root
        self._writer.meta |= {
            "wrapper": type(root).__name__,
            "model": type(inner).__name__,
            "is_compiled": is_compiled,
            "num_held": sum(len(group["params"]) for o in self._held for group in o.param_groups),
            "num_recorded": sum(p.requires_grad for p in root.parameters()),
        }
        self._writer.say_size(self._estimate_bytes(root))

    def _estimate_bytes(self, root: nn.Module) -> int:
        num_parameters = sum(parameter.requires_grad for parameter in root.parameters())
        return 8 * (
            num_parameters * _SKETCHES * NUM_BUCKETS + min(512, len(list(root.modules()))) * 32 * NUM_NUMBERS
        )

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if self._is_over or in_backward() or torch.compiler.is_compiling():
            return
        if self._has_stepped:
            if self._is_recording:
                self._guard(self._finish)
            self._has_stepped = False
            self._step += 1
        if not self._is_recording and torch.is_grad_enabled() and self._wants(self._step) and not self._is_over:
            self._guard(self._begin)

    def _begin(self) -> None:
        self._places = find_places(self._named, self._held)
        self._collector = MixingCollector.of_model(self._named, self._held)
        self._weights = self._sketch_weights()
        self._random = digest_random_state()
        self._losses, self._targets, self._rates, self._loss_scale = [], [], [], 1.0
        self._samples.eps = 0.0
        self._collector.start()
        self._samples.is_on = self._is_recording = True

    def _sketch_weights(self) -> np.ndarray:
        return np.stack([place.sketch_used(place.stepped.detach()).cpu().numpy() for place in self._places])

    def _finish(self) -> None:
        self._is_recording = self._samples.is_on = False
        self._collector.stop()
        record = StepRecord(
            # Its process group may be gone: the rank is that of the launch.
            sketches=replace(self._collector.take(), rank=self._writer.meta["rank"]),
            updates=self._sketch_weights() - self._weights,
            rounding=np.array([measure_rounding(place.stepped.detach()) for place in self._places]),
            loss=math.fsum(self._losses) if self._losses else math.nan,
            outputs=self._samples.finish(),
            num_targets=self._targets,
            num_dropouts=sum(m.training and m.p > 0 for m in self._named.modules() if isinstance(m, _DROPOUTS)),
            eps=max([self._samples.eps, *[torch.finfo(place.stepped.dtype).eps for place in self._places]]),
        )
        if not self._writer.write(self._step, record, self._weights, self._rates, self._random):
            self._stop()


def unwrap(root: nn.Module) -> nn.Module:
    """Return the user's own module under wrappers of torch and their relatives."""
    while True:
        children = dict(root.named_children())
        inner = next((children[name] for name in _WRAPPERS if name in children), None)
        is_wrapper = type(root).__module__.startswith(("torch.", "accelerate.", "deepspeed.", "lightning."))
        if inner is None or not is_wrapper:
            return root
        root = inner
