"""`same_as_one_process`: would one process with the whole batch have computed the same?"""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddpcall.compare.batches import (
    Split,
    count_samples,
    digest_batch,
    map_tensors,
    permute_samples,
    perturb,
    split_evenly,
)
from ddpcall.compare.judge import StepJudge
from ddpcall.compare.noise import Noise
from ddpcall.compare.one_process import keep_random_state, kept_random_state, seed_all, world_of
from ddpcall.compare.result import OneProcessComparison
from ddpcall.compare.steps import MakeOptimizer, Step, StepRecord, join_ranks, take_steps
from ddpcall.mixing import RanksMissing, exchange_records
from ddpcall.replicas import digest_state

_NUM_VARIANTS = 2
_FOLLOWS = ("Timed out", "timed out", "timeout caused pair closure", "Connection closed", "Connection reset")
_MISSING = (
    "same_as_one_process compares ranks with one process, and there {what}: start the script with "
    "torchrun --nproc-per-node 2 or more and call torch.distributed.init_process_group() first"
)


def same_as_one_process(
    step: Callable[[Any, Any], Any],
    model: nn.Module,
    batch: Any,
    *,
    wrap: Callable[[nn.Module], nn.Module] = DistributedDataParallel,
    optimizer: MakeOptimizer | None = None,
    steps: int = 1,
    split: Split | None = None,
    timeout_s: float = 60.0,
) -> OneProcessComparison:
    """Compare a training step of all ranks with the same step of one process that has the whole batch.

        result = ddpcall.same_as_one_process(step, model, batch)
        print(result.same, result.cause, result.message)

    Every rank calls it, with the same model and the same global batch. Each trains a wrapped copy of the model on
    its share; rank 0 also trains a plain copy on the whole batch, as the only rank of its process group. The
    model, the random state and the process group are left alone.

    Args:
        step: `step(model, batch)`: forward, backward and what else happens before the optimizer, such as a
            reduction by hand or clipping; returns the loss.
        model: The plain module.
        batch: The global batch: a tensor, or tuples, lists and dicts of tensors, whose dim 0 is the sample.
        wrap: Returns what the ranks train, given a copy of the model.
        optimizer: Makes the optimizer of a list of parameters, such as
            `lambda parameters: torch.optim.AdamW(parameters)`; then updates are compared too.
        steps: How often to step, on the same batch.
        split: `split(batch, rank, num_ranks)` returns a rank's share; without it dim 0 is cut evenly.
        timeout_s: Seconds that ranks wait for each other, in collectives too.

    Raises:
        RuntimeError: there is no process group, or one rank alone; the step raised on some rank.
        ValueError: ranks were given different models or batches; the batch cannot be split.

    Blind to: gradients of parameters that `requires_grad` leaves out; what `step` does with process groups that
    were made before the call, which still have all ranks while rank 0 is one process.
    """
    if not dist.is_initialized():
        raise RuntimeError(_MISSING.format(what="is no process group"))
    if dist.get_world_size() < 2:
        raise RuntimeError(_MISSING.format(what="is only one rank"))
    call = _Call(step, model, batch, wrap, optimizer, steps, split or split_evenly, timeout_s)
    with kept_random_state():
        return call.compare()


class _Call:
    """One call of `same_as_one_process`."""

    def __init__(
        self,
        step: Callable[[Any, Any], Any],
        model: nn.Module,
        batch: Any,
        wrap: Callable[[nn.Module], nn.Module],
        optimizer: MakeOptimizer | None,
        steps: int,
        split: Split,
        timeout_s: float,
    ) -> None:
        self._step, self._model, self._batch = step, model, batch
        self._wrap, self._optimizer, self._steps = wrap, optimizer, steps
        self._split, self._timeout_s = split, timeout_s
        self._random_state = keep_random_state()

    def compare(self) -> OneProcessComparison:
        _check_given_alike(self._together(self._check, "cannot be compared"))
        self._together(self._run_alone, "raised in one process, with the whole batch")
        records = self._together(self._run_wrapped, "raised on the ranks")
        # Rank 0 alone judges, so that all ranks have the same answer.
        answers = self._together(lambda: self._judge(records), "could not be judged")
        return OneProcessComparison.from_json(answers[0])

    def _together(self, act: Callable[[], bytes], what: str) -> list[bytes]:
        """Do something on every rank and return what all made of it; what one raises, all raise."""
        failure: Exception | None = None
        try:
            data = b"." + act()
        except Exception as error:
            failure = error
            data = b"!" + json.dumps([f"{type(error).__name__}: {error}", isinstance(error, ValueError)]).encode()
        try:
            # A rank that was held up in a collective comes after that one's time limit.
            answers = exchange_records(data, 2 * self._timeout_s + 1)
        except RanksMissing as missing:
            raise failure or _explain_missing(missing) from None
        failed = {rank: json.loads(answer[1:]) for rank, answer in enumerate(answers) if answer[:1] == b"!"}
        if failed:
            raise _describe_failures(failed, what) from failure
        return [answer[1:] for answer in answers]

    def _check(self) -> bytes:
        if not isinstance(self._model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(
                f"model is a {type(self._model).__name__}; give the plain module, and wrap= for what the ranks "
                "train. Write: same_as_one_process(step, model, batch)"
            )
        if self._steps < 1:
            raise ValueError(f"steps is {self._steps}; write 1 or more")
        count_samples(self._batch)
        return json.dumps([digest_state(self._model.state_dict()), digest_batch(self._batch)]).encode()

    def _run_alone(self) -> bytes:
        """Take the steps in one process, as they are and in ways that must not matter; on rank 0."""
        if dist.get_rank():
            return b""
        with world_of([0], self._timeout_s):
            self._reference = self._train_alone(copy.deepcopy(self._model), self._batch)
            samples = [record.outputs.samples for record in self._reference]
            eps = max([record.eps for record in self._reference] + [self._eps_of_parameters()])
            self._perturbed = []
            for seed in range(_NUM_VARIANTS):
                generator = torch.Generator().manual_seed(seed)
                model, batch = self._perturb(eps, generator)
                self._perturbed.append(self._train_alone(model, batch, samples))
            self._permuted = []
            for seed in range(_NUM_VARIANTS):
                order = torch.randperm(count_samples(self._batch), generator=torch.Generator().manual_seed(seed))
                batch = permute_samples(self._batch, order)
                self._permuted.append(self._train_alone(copy.deepcopy(self._model), batch))
            self._repeated = self._train_alone(copy.deepcopy(self._model), self._batch)
            self._reseeded = self._train_alone(copy.deepcopy(self._model), self._batch, seed=1)
        return b""

    def _eps_of_parameters(self) -> float:
        return max(torch.finfo(p.dtype).eps for p in self._model.parameters() if p.is_floating_point())

    def _perturb(self, eps: float, generator: torch.Generator) -> tuple[nn.Module, Any]:
        model = copy.deepcopy(self._model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(perturb(parameter, eps, generator))
        return model, map_tensors(self._batch, lambda tensor: perturb(tensor, eps, generator))

    def _train_alone(
        self, model: nn.Module, batch: Any, samples: Any = None, seed: int | None = None
    ) -> list[StepRecord]:
        self._random_state()
        if seed is not None:
            seed_all(seed)
        return take_steps(self._step, model, model, batch, self._optimizer, self._steps, samples)

    def _run_wrapped(self) -> bytes:
        self._random_state()
        inner = copy.deepcopy(self._model)
        share = self._split(self._batch, dist.get_rank(), dist.get_world_size())
        with world_of(range(dist.get_world_size()), self._timeout_s):
            try:
                wrapped = self._wrap(inner)
                records = take_steps(self._step, wrapped, inner, share, self._optimizer, self._steps)
            finally:
                wrapped = inner = None
                gc.collect()  # a DDP object that outlives its process group hangs
        return _join_bytes([record.to_bytes() for record in records])

    def _judge(self, records: list[bytes]) -> bytes:
        if dist.get_rank():
            return b""
        by_rank = [[StepRecord.from_bytes(data) for data in _split_bytes(own)] for own in records]
        result = None
        for index in range(self._steps):
            ranks = join_ranks([own[index] for own in by_rank])
            noise = Noise(
                [_join_one(run[index]) for run in self._perturbed],
                [_join_one(run[index]) for run in self._permuted],
                _join_one(self._repeated[index]),
                _join_one(self._reseeded[index]),
            )
            result = StepJudge(ranks, _join_one(self._reference[index]), noise, index).judge()
            if not result.same:
                break
        assert result is not None
        return json.dumps(result.to_json()).encode()


def _join_one(record: StepRecord) -> Step:
    return join_ranks([record])


def _check_given_alike(answers: list[bytes]) -> None:
    given = [json.loads(answer) for answer in answers]
    hints = {
        "model": "Seed every rank alike, or load the same weights,",
        "batch": "Give every rank the whole batch",
    }
    for index, (what, hint) in enumerate(hints.items()):
        differing = [rank for rank, own in enumerate(given) if own[index] != given[0][index]]
        if differing:
            ranks = ", ".join(map(str, differing))
            raise ValueError(
                f"the {what} that same_as_one_process was given on rank {ranks} is not that of rank 0. {hint} "
                "before the call: one process has only one"
            )


def _explain_missing(missing: RanksMissing) -> RuntimeError:
    ranks = ", ".join(map(str, missing.missing))
    return RuntimeError(
        f"ranks {ranks} did not come along in time: all ranks must call same_as_one_process. If the step takes "
        "longer, give it more time with timeout_s=…"
    )


def _describe_failures(failed: dict[int, tuple[str, bool]], what: str) -> Exception:
    """Return one error for all ranks: what only followed from another rank's error is left out."""
    first = {
        rank: said for rank, said in failed.items() if not any(sign in said[0] for sign in _FOLLOWS)
    } or failed
    by_text: dict[str, list[int]] = {}
    for rank, (text, _) in first.items():
        by_text.setdefault(text, []).append(rank)
    said = "; ".join(f"rank {', '.join(map(str, ranks))}: {text}" for text, ranks in by_text.items())
    kind = ValueError if all(is_value for _, is_value in first.values()) else RuntimeError
    return kind(f"the step {what} ({said})")


def _join_bytes(parts: list[bytes]) -> bytes:
    sizes = json.dumps([len(part) for part in parts]).encode()
    return len(sizes).to_bytes(8, "little") + sizes + b"".join(parts)


def _split_bytes(data: bytes) -> list[bytes]:
    first = 8 + int.from_bytes(data[:8], "little")
    parts = []
    for size in json.loads(data[8:first]):
        parts.append(data[first : first + size])
        first += size
    return parts
