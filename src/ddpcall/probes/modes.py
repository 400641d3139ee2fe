"""The modes probe: train and eval flags, dropout masks, batch norm statistics and precision, on every rank."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddpcall import torch_internals as internals
from ddpcall.evidence import ModesEvidence
from ddpcall.probes.probe import Observer, Probe, Setting
from ddpcall.replicas import gather_over_ranks
from ddpcall.shards import local_part
from ddpcall.taps import wrap_method
from ddpcall.wrappers import Subject

_LAYERS = (nn.Linear, internals.CONV_ND.get(nn.Conv2d))  # what autocast runs in lower precision
# What a position of a dropout's input came to. Where the input was zero, the output does not tell.
ZERO_BEFORE, DROPPED, KEPT = 0, 1, 2
BY_STEP = (
    "dropout_kept",
    "masks_identical",
    "statistics_difference",
    "batches_tracked",
    "running_mean_norm",
    "running_var_norm",
)


class ModesObserver(Observer):
    """Notes each step on its own rank; compares the ranks at the end."""

    kept = (
        "_masks", "_kept", "_flags", "_statistics", "_tracked", "_mean_norms", "_var_norms", "_dtypes",
        "_result_dtype",
    )  # fmt: skip

    def __init__(self, subject: Subject, group: dist.ProcessGroup | None, example: Tensor | None) -> None:
        self._subject = subject
        self._group = group
        self._example = example
        self._masks_of_step: list[Tensor] = []
        self._masks: list[Tensor] = []
        self._kept: list[float | None] = []
        self._flags: list[Tensor] = []
        self._statistics: list[Tensor] = []
        self._tracked: list[int | None] = []
        self._mean_norms: list[float | None] = []
        self._var_norms: list[float | None] = []
        self._dtypes: set[str] = set()
        self._result_dtype = ""

    def note_layer(self, outputs: Any) -> None:
        """Note the dtype that a linear layer or convolution returned."""
        if isinstance(outputs, Tensor):
            self._dtypes.add(_name(outputs.dtype))

    def note_dropout(self, inputs: Tensor, outputs: Tensor) -> None:
        """Note what a dropout layer did to each position."""
        codes = torch.where(inputs == 0, ZERO_BEFORE, torch.where(outputs == 0, DROPPED, KEPT))
        self._masks_of_step.append(codes.detach().reshape(-1).to("cpu", torch.uint8))

    def note_result(self, outputs: Tensor) -> None:
        """Note the dtype of what the call path handed to the loss."""
        self._result_dtype = _name(outputs.dtype)

    def end_step(self, step: int) -> None:
        """Close the step."""
        modules = list(self._subject.inner.modules())
        self._flags.append(torch.tensor([module.training for module in modules], dtype=torch.uint8))
        codes = torch.cat(self._masks_of_step) if self._masks_of_step else torch.zeros(0, dtype=torch.uint8)
        self._masks_of_step = []
        self._masks.append(codes)
        told = int((codes != ZERO_BEFORE).sum())
        self._kept.append(int((codes == KEPT).sum()) / told if told else None)
        norms: list[Any] = [module for module in modules if isinstance(module, internals.NORM_BASE.get())]
        self._mean_norms.append(_joint_norm([norm.running_mean for norm in norms]))
        self._var_norms.append(_joint_norm([norm.running_var for norm in norms]))
        buffers = [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]
        self._statistics.append(
            torch.cat([local_part(b).detach().float().cpu().reshape(-1) for b in buffers or [_NONE]])
        )
        tracked = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
        self._tracked.append(int(tracked[0]) if tracked else None)

    def evaluate(self, inputs: Tensor) -> tuple[float | None, float | None]:
        """Compare the ranks' outputs in eval mode, through the inner and then through the wrapped. A collective.

        Args:
            inputs: The same on every rank, shape (batch, *features).

        Returns:
            The largest absolute differences; None without running statistics, where only parameters can differ.

        Changes: DDP may send rank 0's buffers in the second of the two; both leave the model in eval mode.
        """
        subject = self._subject
        if not self._statistics or not self._statistics[-1].numel():
            return None, None
        noted = set(self._dtypes)
        subject.inner.eval()
        through_inner = None if subject.inner is subject.wrapped else self._spread(subject.inner, inputs)
        through_wrapped = self._spread(subject.wrapped, inputs)
        self._dtypes = noted
        return through_inner, through_wrapped

    def _spread(self, model: Callable[..., Any], inputs: Tensor) -> float | None:
        try:
            with torch.no_grad():
                outputs = model(inputs).float().cpu()
            ok = torch.ones(1)
        except Exception:
            outputs, ok = torch.zeros(0), torch.zeros(1)
        if not bool(gather_over_ranks(ok, self._group).all()):
            return None
        return _largest_difference(gather_over_ranks(outputs, self._group))

    def evidence(self) -> ModesEvidence:
        """Compare the ranks, and last their outputs by the live model. A collective: every rank must call it."""
        inner, wrapped = (None, None) if self._example is None else self.evaluate(self._example)
        flags = gather_over_ranks(torch.stack(self._flags), self._group)
        differing = (flags != flags[0]).any(dim=0).any(dim=0).tolist()
        names = [name or "(root)" for name, _ in self._subject.inner.named_modules()]
        return ModesEvidence(
            training_modules=tuple(int(count) for count in flags[:, -1].sum(dim=1)),
            num_modules=len(names),
            flags_differ=tuple(name for name, differs in zip(names, differing, strict=True) if differs),
            dropout_kept=tuple(self._kept),
            masks_identical=tuple(self._compare_masks(codes) for codes in self._masks),
            statistics_difference=tuple(self._compare_statistics(values) for values in self._statistics),
            batches_tracked=tuple(self._tracked),
            running_mean_norm=tuple(self._mean_norms),
            running_var_norm=tuple(self._var_norms),
            compute_dtypes=tuple(sorted(self._dtypes)),
            result_dtype=self._result_dtype,
            evaluation_inner=inner,
            evaluation_wrapped=wrapped,
        )

    def columns(self, evidence: ModesEvidence) -> dict[str, Sequence[float | None]]:
        """Return what was compared by step, and this rank's modules in train mode, the same in every step."""
        columns: dict[str, Sequence[float | None]] = {name: getattr(evidence, name) for name in BY_STEP}
        return columns | {"training_modules": [int(self._flags[-1].sum())] * len(self._flags)}

    def _compare_masks(self, codes: Tensor) -> bool | None:
        sizes = gather_over_ranks(torch.tensor([codes.numel()]), self._group)
        if not bool((sizes == sizes[0]).all()):
            return False
        if codes.numel() == 0:
            return None
        gathered = gather_over_ranks(codes, self._group)
        if not bool((gathered == DROPPED).any()):
            return None
        dropped, kept = (gathered == DROPPED).any(dim=0), (gathered == KEPT).any(dim=0)
        return not bool((dropped & kept).any())

    def _compare_statistics(self, values: Tensor) -> float | None:
        if values.numel() == 0:
            return None
        return _largest_difference(gather_over_ranks(values, self._group))


_NONE = torch.zeros(0)


def _largest_difference(gathered: Tensor) -> float:
    return (gathered - gathered[0]).abs().max().item()


def _joint_norm(tensors: Sequence[Tensor | None]) -> float | None:
    """Return the L2 norm of all tensors taken together; None where there is none."""
    parts = [local_part(tensor).detach().float().reshape(-1) for tensor in tensors if tensor is not None]
    return torch.cat(parts).norm().item() if parts else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def observe_modes(
    subject: Subject, group: dist.ProcessGroup | None, example: Tensor | None = None
) -> Generator[ModesObserver]:
    """Watch training flags, dropout, batch norm's running statistics and the precision of layers.

    Args:
        subject: The wrapped model, not compiled: the taps sit on the forwards of its leaves.
        group: A gloo process group of the probe's own; None for a world of one rank.
        example: Inputs for the comparison of outputs in eval mode, the same on every rank; None: none is made.

    Yields:
        The observer.

    Blind to: functional forms (`F.dropout`), layers inside scripted or exported code, and what happens between
    two steps.

    Source: `torch/nn/modules/dropout.py`, `torch/nn/modules/batchnorm.py`; both read `self.training` in forward.
    """
    observer = ModesObserver(subject, group, example)
    with ExitStack() as stack:
        for module in subject.inner.modules():
            if isinstance(module, internals.DROPOUT_ND.get()):
                stack.callback(wrap_method(module, "forward", _noting_dropout(observer)))
            elif isinstance(module, _LAYERS):
                stack.callback(wrap_method(module, "forward", _noting_layer(observer)))
        yield observer


def _noting_dropout(observer: ModesObserver) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def wrapping(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(inputs: Tensor) -> Tensor:
            before = inputs.detach().clone()  # dropout may work in place
            outputs = original(inputs)
            observer.note_dropout(before, outputs)
            return outputs

        return forward

    return wrapping


def _noting_layer(observer: ModesObserver) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def wrapping(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            outputs = original(*args, **kwargs)
            observer.note_layer(outputs)
            return outputs

        return forward

    return wrapping


def _observe(setting: Setting) -> AbstractContextManager[ModesObserver] | None:
    # Compiled layers would be compiled again for the taps.
    return None if setting.spec.compiles else observe_modes(setting.subject, setting.group, setting.example)


PROBE = Probe(name="modes", observe=_observe)
