"""Training steps that are the same on one process and on many, and the usual mistakes beside them.

Every case holds on any number of ranks: the batch grows with them. Everything is small and runs on the CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ddpcall.lab.errors import WrongUse
from ddpcall.wrappers import WrapperMissing, apply_wrapper

Step = Callable[[nn.Module, Any], Tensor]

_NONE = "none"
_CPU = torch.device("cpu")
_IGNORED = -100
_TEMPERATURE = 0.2
_MAX_NORM = 0.05


def make_model(norm: nn.Module | None = None) -> nn.Module:
    """Return a small classifier, with a norm behind its first layer where one is given."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 24), norm or nn.Identity(), nn.Tanh(), nn.Linear(24, 4))


def make_samples(num_ranks: int, per_rank: int = 4, more: int = 0) -> tuple[Tensor, Tensor]:
    """Return inputs of shape (samples, 8) and the classes to tell."""
    num_samples = num_ranks * per_rank + more
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(num_samples, 8, generator=generator),
        torch.randint(0, 4, (num_samples,), generator=generator),
    )


def make_tokens(num_ranks: int) -> tuple[Tensor, Tensor]:
    """Return sequences of 20 tokens; those of the first rank have 72 targets, all others 8 a rank."""
    num_samples = 4 * num_ranks
    inputs = torch.randn(num_samples, 20, 8, generator=torch.Generator().manual_seed(2))
    targets = (inputs.sum(dim=2) > 0).long() + 2 * (inputs[..., 0] > 0).long()
    targets[:4, 18:], targets[4:, 2:] = _IGNORED, _IGNORED
    return inputs, targets


def make_pairs(num_ranks: int) -> tuple[Tensor, Tensor]:
    """Return two views of every sample, each of shape (samples, 8)."""
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(4 * num_ranks, 8, generator=generator) for _ in range(2))  # pyright: ignore[reportReturnType]


def count_everywhere(targets: Tensor) -> Tensor:
    """Return how many targets all ranks have, those that are ignored aside."""
    count = (targets != _IGNORED).sum()
    dist.all_reduce(count)
    return count


# ---- losses ---------------------------------------------------------------------------------------------------


def take_mean(model: nn.Module, batch: Any) -> Tensor:
    """Take the mean over a rank's own targets."""
    inputs, targets = batch
    loss = F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
    loss.backward()
    return loss


def take_sum(model: nn.Module, batch: Any) -> Tensor:
    """Take the sum over the samples."""
    inputs, targets = batch
    loss = F.cross_entropy(model(inputs), targets, reduction="sum")
    loss.backward()
    return loss


def take_sum_times_ranks(model: nn.Module, batch: Any) -> Tensor:
    """Take the sum, times the number of ranks that DDP will divide by."""
    inputs, targets = batch
    loss = F.cross_entropy(model(inputs), targets, reduction="sum") * dist.get_world_size()
    loss.backward()
    return loss


def take_mean_of_all(model: nn.Module, batch: Any) -> Tensor:
    """Divide the sum by the number of targets on all ranks, times the number of ranks."""
    inputs, targets = batch
    loss = F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten(), reduction="sum")
    loss = loss * dist.get_world_size() / count_everywhere(targets)
    loss.backward()
    return loss


# ---- accumulation ---------------------------------------------------------------------------------------------


def accumulate(model: nn.Module, batch: Any, loss_of: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
    """Accumulate micro-batches of up to four samples; the last one may be smaller."""
    parts = list(zip(*(tensor.split(4) for tensor in batch), strict=True))
    total = torch.tensor(0.0)
    for index, (inputs, targets) in enumerate(parts):
        is_last = index == len(parts) - 1
        no_sync: Any = getattr(model, "no_sync", contextlib.nullcontext)
        with contextlib.nullcontext() if is_last else no_sync():
            loss = loss_of(model(inputs), targets, len(parts))
            loss.backward()
        total += loss.detach()
    return total


def accumulate_means(model: nn.Module, batch: Any) -> Tensor:
    """Accumulate the mean of every micro-batch, divided by their number."""
    return accumulate(model, batch, lambda logits, targets, parts: F.cross_entropy(logits, targets) / parts)


def accumulate_sums(model: nn.Module, batch: Any) -> Tensor:
    """Accumulate the sum of every micro-batch, divided by the number of targets on all ranks."""
    factor = dist.get_world_size() / count_everywhere(batch[1])
    return accumulate(
        model, batch, lambda logits, targets, _: F.cross_entropy(logits, targets, reduction="sum") * factor
    )


# ---- statistics of a batch ------------------------------------------------------------------------------------


class _SumOverRanks(torch.autograd.Function):
    """A sum over all ranks, whose gradient is a sum over all ranks too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class SyncNorm(nn.BatchNorm1d):
    """What SyncBatchNorm computes, on the CPU as well, where torch's own refuses to run."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize by mean and variance of the samples of all ranks."""
        sums = torch.cat([input.sum(dim=0), input.square().sum(dim=0), input.new_tensor([len(input)])])
        total = _SumOverRanks.apply(sums)
        mean, square = (total[:-1] / total[-1]).chunk(2)
        normal = (input - mean) / torch.sqrt(square - mean.square() + self.eps)
        return normal * self.weight + self.bias


# ---- contrast -------------------------------------------------------------------------------------------------


def gather_detached(tensor: Tensor) -> Tensor:
    """Gather the rows of all ranks; no gradient comes back, and none goes to this rank's own rows either."""
    parts = [torch.zeros_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    """The rows of all ranks; the gradients that all ranks have for a rank's rows come back to it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.num_rows = len(tensor)
        return gather_detached(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        first = dist.get_rank() * ctx.num_rows
        return total[first : first + ctx.num_rows]


class Encoder(nn.Module):
    """The classifier as an encoder of both views; a module of its own, since it is called twice in a step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_model()

    def forward(self, inputs: Tensor) -> Tensor:
        """Return embeddings of length one."""
        return F.normalize(self.net(inputs), dim=1)


def contrast(model: nn.Module, batch: Any, gather: Callable[[Tensor], Tensor]) -> Tensor:
    """Tell each sample's other view from those of all samples that were gathered."""
    here, there = model(batch[0]), model(batch[1])
    first = dist.get_rank() * len(here)
    everybody = gather(there)
    own = torch.arange(len(here)) + (first if len(everybody) > len(here) else 0)
    loss = F.cross_entropy(here @ everybody.T / _TEMPERATURE, own)
    loss.backward()
    return loss


def contrast_detached(model: nn.Module, batch: Any) -> Tensor:
    """Gather without a gradient; one process has nothing to gather."""
    is_alone = dist.get_world_size() == 1
    return contrast(model, batch, (lambda rows: rows) if is_alone else gather_detached)


# ---- clipping -------------------------------------------------------------------------------------------------


def average_gradients(model: nn.Module) -> None:
    """Average the gradients by hand."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def clip_then_average(model: nn.Module, batch: Any) -> Tensor:
    """Clip each rank's own gradient, then average."""
    loss = take_mean(model, batch)
    nn.utils.clip_grad_norm_(model.parameters(), _MAX_NORM)
    average_gradients(model)
    return loss


def average_then_clip(model: nn.Module, batch: Any) -> Tensor:
    """Average, then clip."""
    loss = take_mean(model, batch)
    average_gradients(model)
    nn.utils.clip_grad_norm_(model.parameters(), _MAX_NORM)
    return loss


def clip_by_summed_norm(model: nn.Module, batch: Any) -> Tensor:
    """Sum the squares of the gradients over the ranks, as is right for shards, and clip by the root."""
    loss = take_mean(model, batch)
    gradients = [_local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    square = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
    dist.all_reduce(square)
    for gradient in gradients:
        gradient.mul_(_MAX_NORM / square.sqrt())
    return loss


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient  # pyright: ignore[reportAttributeAccessIssue]


# ---- tensor parallelism ---------------------------------------------------------------------------------------


class SequenceBlock(nn.Module):
    """A norm before two linear layers. Under sequence parallelism every rank norms a part of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.norm = nn.Linear(8, 16), nn.LayerNorm(16)
        self.up, self.down, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map sequences of shape (samples, tokens, 8) to logits."""
        return self.head(torch.relu(self.down(torch.relu(self.up(self.norm(self.enter(inputs)))))))


def make_sequences(num_ranks: int) -> tuple[Tensor, Tensor]:
    """Return four sequences of four tokens a rank: every rank has all of them, and a part of each."""
    generator = torch.Generator().manual_seed(4)
    shape = (4, 4 * num_ranks)
    return torch.randn(*shape, 8, generator=generator), torch.randint(0, 4, shape, generator=generator)


def parallelize(model: nn.Module, *, plans_norm: bool) -> nn.Module:
    """Cut the linear layers over the ranks, and the tokens between them; the norm only where it is planned."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    scatter = PrepareModuleInput(
        input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=not plans_norm
    )
    plan: dict[str, Any] = {
        "norm": scatter,
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
        "head": PrepareModuleInput(
            input_layouts=Shard(1), desired_input_layouts=Replicate(), use_local_output=True
        ),
    }
    parallelize_module(model, mesh, plan)
    return parallelize_module(model, mesh, {"norm": SequenceParallel()}) if plans_norm else model


# ---- the cases ------------------------------------------------------------------------------------------------


def share_evenly(batch: Any, rank: int, num_ranks: int) -> Any:
    """Return a rank's samples; shares differ by one at most."""
    return tuple(tensor.tensor_split(num_ranks)[rank] for tensor in batch)


def share_nothing(batch: Any, rank: int, num_ranks: int) -> Any:
    """Return the whole batch: the ranks hold parts of one model."""
    return batch


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training step, and what is trained.

    Attributes:
        about: What the step does, for a table.
        step: Forward, backward and what else there is before the optimizer.
        make_model: Makes the plain model.
        make_batch: Makes the whole batch for a number of ranks.
        wrapper: What wraps the model where the configuration names nothing; with `wrap`, its name alone.
        wrap: Wraps the model itself.
        split: Returns a rank's share of the batch.
    """

    about: str
    step: Step = take_mean
    make_model: Callable[[], nn.Module] = make_model
    make_batch: Callable[[int], Any] = make_samples
    wrapper: str = "ddp"
    wrap: Callable[[nn.Module], nn.Module] | None = None
    split: Callable[[Any, int, int], Any] = share_evenly

    def choose_wrap(self, wrapper: str) -> Callable[[nn.Module], nn.Module]:
        """Return what wraps the model.

        Raises:
            WrongUse: while wrapping: what the wrapper needs is not installed.
        """
        return self.wrap or (lambda model: _apply(wrapper, model))


def _leave(model: nn.Module) -> nn.Module:
    """Leave the model as it is: the step reduces by hand."""
    return model


def _apply(wrapper: str, model: nn.Module) -> nn.Module:
    try:
        return apply_wrapper(wrapper, model, device=_CPU, example=make_samples(1)[0]).wrapped
    except WrapperMissing as error:
        raise WrongUse(f"one_process: wrapper {wrapper}: {error}") from None


CASES = {
    "mean": Case(about="a mean over equal shares"),
    "sum": Case(about="a sum over the samples", step=take_sum),
    "sum_times_ranks": Case(about="the sum times the number of ranks", step=take_sum_times_ranks),
    "token_means": Case(about="means of 72 and of 8 target tokens", make_batch=make_tokens),
    "token_mean_of_all": Case(
        about="sums divided by the target tokens of all ranks", step=take_mean_of_all, make_batch=make_tokens
    ),
    "uneven_batch": Case(
        about="means over shares of 5 and 4 samples", make_batch=lambda num_ranks: make_samples(num_ranks, more=1)
    ),
    "uneven_batch_counted": Case(
        about="the same shares, divided by the count of all",
        step=take_mean_of_all,
        make_batch=lambda num_ranks: make_samples(num_ranks, more=1),
    ),
    "unequal_micro_batches": Case(
        about="means of micro-batches of 4 and 2 samples",
        step=accumulate_means,
        make_batch=lambda num_ranks: make_samples(num_ranks, 6),
    ),
    "micro_batches_counted": Case(
        about="the same micro-batches, divided by the count of all",
        step=accumulate_sums,
        make_batch=lambda num_ranks: make_samples(num_ranks, 6),
    ),
    "equal_micro_batches": Case(
        about="means of micro-batches of 4 and 4 samples",
        step=accumulate_means,
        make_batch=lambda num_ranks: make_samples(num_ranks, 8),
    ),
    "batch_norm": Case(
        about="statistics of a rank's own samples", make_model=lambda: make_model(nn.BatchNorm1d(24))
    ),
    "sync_batch_norm": Case(
        about="statistics of the samples of all ranks", make_model=lambda: make_model(SyncNorm(24))
    ),
    "gather_without_gradient": Case(
        about="negatives of all ranks, gathered without a gradient",
        step=contrast_detached,
        make_model=Encoder,
        make_batch=make_pairs,
    ),
    "gather_with_gradient": Case(
        about="negatives of all ranks, gathered with their gradient",
        step=lambda model, batch: contrast(model, batch, _Gather.apply),
        make_model=Encoder,
        make_batch=make_pairs,
    ),
    "own_negatives": Case(
        about="negatives of a rank's own share",
        step=lambda model, batch: contrast(model, batch, lambda rows: rows),
        make_model=Encoder,
        make_batch=make_pairs,
    ),
    "clip_then_average": Case(
        about="each rank clips its own gradient", step=clip_then_average, wrapper=_NONE, wrap=_leave
    ),
    "average_then_clip": Case(
        about="the averaged gradient is clipped", step=average_then_clip, wrapper=_NONE, wrap=_leave
    ),
    "summed_norm": Case(about="squares summed over the ranks, then clipped", step=clip_by_summed_norm),
    "norm_outside_plan": Case(
        about="a norm over a part of the tokens, left out of the plan",
        make_model=SequenceBlock,
        make_batch=make_sequences,
        wrapper="tp",
        wrap=lambda model: parallelize(model, plans_norm=False),
        split=share_nothing,
    ),
    "norm_in_plan": Case(
        about="the same norm, in the plan",
        make_model=SequenceBlock,
        make_batch=make_sequences,
        wrapper="tp",
        wrap=lambda model: parallelize(model, plans_norm=True),
        split=share_nothing,
    ),
}
"""By the name that a configuration gives them."""


def find_case(name: str) -> Case:
    """Return a case by its name.

    Raises:
        WrongUse: there is none of that name.
    """
    if name not in CASES:
        raise WrongUse(f"one_process: case {name!r} is unknown; write one of: {', '.join(CASES)}")
    return CASES[name]
