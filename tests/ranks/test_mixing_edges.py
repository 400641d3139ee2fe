"""Where a careless measurement of the mixing matrix goes wrong: one test an edge, each says what the matrix is."""

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import debugging_hooks, default_hooks, powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint_sequential

import ddpcall
from ddpcall.asserts import assert_gradients_averaged
from tests.ranks.mixing_models import (
    columns,
    compute_loss,
    expect,
    make_batch,
    make_model,
    measure,
    reduce_by_hand,
)

pytestmark = pytest.mark.ranks(2)


def wrap(model=None, **options) -> Any:
    return DistributedDataParallel(model or make_model(), **options)


def make_sgd(model, lr=0.01, **options):
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


# ---- what is in .grad before ------------------------------------------------------------------------------------

CLEARINGS = {
    "to none": lambda model: model.zero_grad(set_to_none=True),
    "to zero": lambda model: model.zero_grad(set_to_none=False),
    "forgotten": lambda model: None,
    "decayed": lambda model: [p.grad.mul_(0.9) for p in model.parameters() if p.grad is not None],
    "by hand": lambda model: [setattr(p, "grad", None) for p in model.parameters()],
}


@pytest.mark.parametrize("views", [False, True], ids=["", "bucket views"])
@pytest.mark.parametrize("clearing", list(CLEARINGS))
def test_every_way_to_clear_gradients(rank, clearing, views):
    model = wrap(gradient_as_bucket_view=views)
    optimizer = make_sgd(model)

    def step(number):
        CLEARINGS[clearing](model)
        compute_loss(model, make_batch(rank.rank + 10 * number)).backward()
        optimizer.step()

    expect(measure(model, optimizer, step, 3), "averaged", 0.5, columns(2, 0))


def test_gradients_that_are_cleared_between_two_backwards(rank):
    model = wrap()
    optimizer = make_sgd(model)

    def step(number):
        compute_loss(model, make_batch(rank.rank)).backward()
        optimizer.zero_grad()
        compute_loss(model, make_batch(rank.rank + 10)).backward()
        optimizer.step()

    expect(measure(model, optimizer, step), "averaged", [0, 0, 0.5, 0.5], columns(2, 0, 1))


def test_a_parameter_that_a_step_does_not_use_keeps_nothing_of_the_step_before(rank):
    model = wrap(find_unused_parameters=True)
    optimizer = make_sgd(model)

    def step(number):
        optimizer.zero_grad(set_to_none=False)
        hidden = model.module[2] if number == 0 else nn.Identity()

        class Part(nn.Module):
            def forward(self, x):
                return model.module[4](hidden(model.module[0](x)))

        loss = Part()(make_batch(rank.rank + number)).square().sum()
        loss.backward()
        reduce_by_hand_where_it_is(model)
        optimizer.step()

    mixing = measure(model, optimizer, step, 2)
    expect(mixing, "averaged", 0.5)
    assert set(mixing.by_parameter["unidentifiable"]) == {"module.2.weight", "module.2.bias"}


def reduce_by_hand_where_it_is(model):
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= 2


def test_gradients_thrown_away_before_the_step(rank):
    model = wrap()
    optimizer = make_sgd(model)

    def step(number):
        compute_loss(model, make_batch(rank.rank)).backward()
        optimizer.zero_grad(set_to_none=number == 0)
        optimizer.step()

    expect(measure(model, optimizer, step), "thrown_away")
    expect(measure(model, optimizer, step, 2), "thrown_away")


# ---- several backwards ------------------------------------------------------------------------------------------


def test_two_losses_of_one_forward_reduce_the_first_alone(rank):
    model = wrap()
    optimizer = make_sgd(model)

    def step(number):
        output = model(make_batch(rank.rank))
        output.square().sum().backward(retain_graph=True)
        output.abs().sum().backward()
        optimizer.step()

    matrix = np.hstack([np.full((2, 2), 0.5), np.eye(2)])
    expect(measure(model, optimizer, step), "partly_local", matrix, columns(2, 0, 1))


def test_one_loss_backward_twice_counts_its_own_rank_more(rank):
    model = wrap()
    optimizer = make_sgd(model)

    def step(number):
        loss = compute_loss(model, make_batch(rank.rank))
        loss.backward(retain_graph=True)
        loss.backward()
        optimizer.step()

    mixing = measure(model, optimizer, step)
    assert mixing.shape == "partly_local"
    # Of all that a rank computed, in both backwards: once itself alone, once averaged.
    assert mixing.columns == columns(2, 0)
    np.testing.assert_allclose(mixing.matrix, [[0.75, 0.25], [0.25, 0.75]], atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(rank, use_reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = make_model()

        def forward(self, x):
            return checkpoint_sequential(self.body, 3, x.requires_grad_(), use_reentrant=use_reentrant)

    model = wrap(Checkpointed(), static_graph=use_reentrant)
    optimizer = make_sgd(model)

    def step(number):
        compute_loss(model, make_batch(rank.rank)).backward()
        optimizer.step()

    expect(measure(model, optimizer, step), "averaged", 0.5, columns(2, 0))


def test_a_gradient_that_was_only_looked_at_is_no_late_one(rank):
    model = wrap()
    optimizer = make_sgd(model)

    def step(number):
        loss = compute_loss(model, make_batch(rank.rank))
        loss.backward(retain_graph=True)
        torch.autograd.grad(compute_loss(model.module, make_batch(rank.rank + 10)), list(model.parameters()))
        optimizer.step()

    expect(measure(model, optimizer, step), "averaged", [0.5, 0.5, 0, 0], columns(2, 0, 1))


def test_a_gradient_penalty(rank):
    model = wrap()
    optimizer = make_sgd(model)

    def step(number):
        loss = compute_loss(model, make_batch(rank.rank))
        gradients = torch.autograd.grad(loss, list(model.module.parameters()), create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in gradients)
        (loss + 0.01 * penalty).backward()
        optimizer.step()

    mixing = measure(model, optimizer, step)
    assert mixing.shape == "averaged"
    np.testing.assert_allclose(mixing.matrix, np.broadcast_to([0, 0, 0.5, 0.5], (2, 4)), atol=1e-3)


# ---- scaling and transforming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_scales_and_a_skipped_step_ends_the_window(rank, fused):
    model = wrap()
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(number, spoil=False):
        optimizer.zero_grad()
        factor = float("inf") if spoil else 1.0
        scaler.scale(compute_loss(model, make_batch(rank.rank + number)) * factor).backward()
        scaler.step(optimizer)
        scaler.update()

    mixing = measure(model, optimizer, step)
    assert mixing.shape == ("averaged" if fused else "scaled")
    assert mixing.scale == pytest.approx(1 if fused else 1 / 1024, rel=1e-4)

    with ddpcall.measure_mixing(model, optimizer) as mixing:
        step(0)
        step(1, spoil=True)
        step(2)
    assert mixing.shape in ("scaled", "averaged")
    assert mixing.columns == columns(2, 0)


def test_a_skipped_step_alone_is_said(rank):
    model = wrap()
    optimizer = make_sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(number):
        scaler.scale(compute_loss(model, make_batch(rank.rank)) * float("inf")).backward()
        scaler.step(optimizer)

    with pytest.raises(RuntimeError, match="GradScaler skipped it"):
        measure(model, optimizer, step)


def clip_by_parameter(model):
    for parameter in model.parameters():
        torch.nn.utils.clip_grad_norm_([parameter], 0.1)


CHANGES = {
    "clip value": lambda model: torch.nn.utils.clip_grad_value_(model.parameters(), 0.5),
    "weight decay": lambda model: [p.grad.add_(p.detach(), alpha=10.0) for p in model.parameters()],
    "sign": lambda model: [p.grad.sign_() for p in model.parameters()],
}


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("is_bypassed", [False, True], ids=["reduced", "local"])
def test_what_is_done_to_gradients_after_the_backward(rank, change, is_bypassed):
    """On the mean it is harmless; on local gradients it must not hide that they differ."""
    model = wrap()
    optimizer = make_sgd(model)

    def step(number):
        compute_loss(model.module if is_bypassed else model, make_batch(rank.rank)).backward()
        CHANGES[change](model)
        optimizer.step()

    expect(measure(model, optimizer, step), "different" if is_bypassed else "transformed")


@pytest.mark.parametrize("is_bypassed", [False, True], ids=["reduced", "local"])
def test_clipping_every_parameter_by_itself_keeps_the_shape(rank, is_bypassed):
    model = wrap()
    optimizer = make_sgd(model)

    def step(number):
        compute_loss(model.module if is_bypassed else model, make_batch(rank.rank)).backward()
        clip_by_parameter(model)
        optimizer.step()

    expect(measure(model, optimizer, step), "local" if is_bypassed else "scaled")


def compress_to_bfloat16(_, bucket):
    """What torch's own hook does, which refuses gloo."""
    short = bucket.buffer().bfloat16() / 2
    dist.all_reduce(short)
    future = torch.futures.Future()
    future.set_result(short.to(bucket.buffer().dtype))
    return future


HOOKS = {
    "fp16": (lambda: (None, default_hooks.fp16_compress_hook), "averaged", 0.5),
    "bf16": (lambda: (None, compress_to_bfloat16), "averaged", 0.5),
    "noop": (lambda: (None, debugging_hooks.noop_hook), "local", np.eye(2)),
    "power": (
        lambda: (powerSGD_hook.PowerSGDState(None, 1, start_powerSGD_iter=2), powerSGD_hook.powerSGD_hook),
        "transformed",
        None,
    ),
}


@pytest.mark.parametrize("hook", list(HOOKS))
def test_communication_hooks(rank, hook):
    make, shape, entries = HOOKS[hook]
    model = wrap()
    model.register_comm_hook(*make())
    optimizer = make_sgd(model)

    def step(number):
        optimizer.zero_grad()
        compute_loss(model, make_batch(rank.rank + 10 * number)).backward()
        optimizer.step()

    mixing = measure(model, optimizer, step, 4)
    # PowerSGD leaves small parameters alone.
    shapes = {name for name in mixing.by_parameter if name != "unidentifiable"}
    assert shape in shapes
    if entries is not None:
        expect(mixing, shape, entries, residual=2e-2, atol=2e-2)


def test_gradients_that_a_communication_hook_delays_are_late(rank):
    held = {}

    def delay(_, bucket):
        mean = bucket.buffer() / 2
        dist.all_reduce(mean)
        last = held.get(bucket.index(), torch.zeros_like(mean))
        held[bucket.index()] = mean
        future = torch.futures.Future()
        future.set_result(last)
        return future

    model = wrap()
    model.register_comm_hook(None, delay)
    optimizer = make_sgd(model)

    def step(number):
        optimizer.zero_grad()
        compute_loss(model, make_batch(rank.rank + 10 * number)).backward()
        optimizer.step()

    step(0)
    mixing = measure(model, optimizer, step, 2)
    expect(mixing, "late", [0.5, 0.5, 0, 0], columns(2, -1, 0))


# ---- optimizers -------------------------------------------------------------------------------------------------


def test_lbfgs_is_read_when_its_closure_returns(rank):
    model = wrap()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=3, max_eval=10)

    def step(number):
        def closure():
            optimizer.zero_grad()
            loss = compute_loss(model, make_batch(rank.rank))
            loss.backward()
            return loss

        optimizer.step(closure)

    mixing = measure(model, optimizer, step)
    assert mixing.shape == "averaged"
    np.testing.assert_allclose(mixing.matrix[:, -2:], 0.5, atol=1e-3)


@pytest.mark.parametrize("as_keyword", [False, True])
def test_a_closure_that_clears_gradients_itself(rank, as_keyword):
    model = wrap()
    optimizer = make_sgd(model)

    def step(number):
        def closure():
            optimizer.zero_grad()
            loss = compute_loss(model, make_batch(rank.rank + number))
            loss.backward()
            return loss

        loss: Any = optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
        assert loss.requires_grad

    expect(measure(model, optimizer, step, 2), "averaged", 0.5, columns(2, 0))


class SAM(torch.optim.Optimizer):
    """Two backwards a step: at the weights, and a little uphill of them, where the gradient is taken."""

    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.base = torch.optim.SGD(self.param_groups, lr=0.01)

    def step(self, closure):  # pyright: ignore[reportIncompatibleMethodOverride]
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(parameter.grad, alpha=0.01)
        self.zero_grad()
        closure()
        with torch.no_grad():
            for parameter, old in zip(parameters, before, strict=True):
                parameter.copy_(old)
        self.base.step()


def test_sam_uses_its_second_backward(rank):
    model = wrap()
    optimizer = SAM(model.parameters())

    def step(number):
        compute_loss(model, make_batch(rank.rank)).backward()
        optimizer.step(lambda: compute_loss(model, make_batch(rank.rank)).backward())
        optimizer.zero_grad()

    mixing = measure(model, optimizer, step)
    assert mixing.shape == "averaged"
    np.testing.assert_allclose(mixing.matrix[:, -2:], 0.5, atol=1e-2)


class ReducingSGD(torch.optim.SGD):
    """Reduces in its own step, as Horovod's optimizer does."""

    def __init__(self, model):
        self.model, self.base = model, torch.optim.SGD(model.parameters(), lr=0.01)
        super().__init__(model.parameters(), lr=0.01)

    def step(self, closure=None):
        reduce_by_hand(self.model)
        return self.base.step(closure)


def test_an_optimizer_that_reduces_in_its_step(rank):
    model = make_model()
    optimizer = ReducingSGD(model)

    def step(number):
        compute_loss(model, make_batch(rank.rank)).backward()
        optimizer.step()

    expect(measure(model, optimizer, step), "averaged", 0.5, columns(2, 0))


def test_a_users_pre_hook_that_reduces(rank):
    model = make_model()
    optimizer = make_sgd(model)

    def step(number):
        if number == 0:
            optimizer.register_step_pre_hook(lambda *_: reduce_by_hand(model))
        optimizer.zero_grad()
        compute_loss(model, make_batch(rank.rank)).backward()
        optimizer.step()

    expect(measure(model, optimizer, step, 2), "averaged", 0.5, columns(2, 0))
    assert len(optimizer._optimizer_step_pre_hooks) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_zero_redundancy_optimizer(rank):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = wrap()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)

    def step(number):
        compute_loss(model, make_batch(rank.rank)).backward()
        optimizer.step()

    mixing = measure(model, optimizer, step)
    expect(mixing, "averaged", 0.5, columns(2, 0))
    assert sum(map(len, mixing.by_parameter.values())) == 6


def test_optimizers_that_step_in_the_backward(rank):
    """Before DDP has reduced: every rank steps by its own gradient."""
    model = wrap()
    optimizers = {p: torch.optim.SGD([p], lr=0.01) for p in model.parameters()}

    def step_one(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step_one)

    def step(number):
        compute_loss(model, make_batch(rank.rank + number)).backward()

    expect(measure(model, list(optimizers.values()), step, 2), "local", np.eye(2))


def test_two_optimizers_for_one_model(rank):
    model = wrap()
    inner = list(model.module)
    optimizers = [torch.optim.SGD(inner[0].parameters(), lr=0.1), torch.optim.AdamW(inner[2].parameters())]

    def step(number):
        compute_loss(model, make_batch(rank.rank)).backward()
        for optimizer in optimizers:
            optimizer.step()

    mixing = measure(model, optimizers, step)
    expect(mixing, "averaged", 0.5, columns(2, 0))
    assert len(mixing.by_parameter["averaged"]) == 4


def test_two_optimizers_that_share_parameters(rank):
    model = wrap()
    first, second = make_sgd(model), make_sgd(model, 0.1)

    def step(number):
        compute_loss(model, make_batch(rank.rank)).backward()
        first.step()
        compute_loss(model, make_batch(rank.rank + 10)).backward()
        second.step()

    expect(measure(model, [first, second], step), "averaged", 0.5, columns(2, 0))


def test_two_models_in_one_optimizer(rank):
    model, other = wrap(), make_model()
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.01)

    def step(number):
        (compute_loss(model, make_batch(rank.rank)) + compute_loss(other, make_batch(rank.rank))).backward()
        optimizer.step()

    both = nn.ModuleDict({"model": model, "other": other})
    mixing = measure(both, optimizer, step)
    expect(mixing, "partly_local")
    assert all(name.startswith("other.") for name in mixing.by_parameter["local"])
    # From now on they are no replicas any more. Perhaps they were never meant to be; no certificate says so.
    mixing = measure(both, optimizer, step)
    expect(mixing, "partly_local")
    assert all(name.startswith("other.") for name in mixing.by_parameter["local"])
    assert "these weights differed before the step" in mixing.reason
    assert "other." in mixing.reason
    expect(measure(model, optimizer, step), "averaged", 0.5)
    expect(measure(other, optimizer, step), "local")


def test_two_models_against_each_other(rank):
    """The discriminator's window holds the generator's backward too, of which nothing is used."""
    maker, judge_ = wrap(nn.Linear(16, 16)), wrap(make_model())
    steps_of_maker, steps_of_judge = make_sgd(maker), make_sgd(judge_)

    def step(number):
        compute_loss(judge_, maker(make_batch(rank.rank + 10 * number))).backward()
        steps_of_maker.step()
        steps_of_judge.zero_grad()
        compute_loss(judge_, maker(make_batch(rank.rank + 20)).detach()).backward()
        steps_of_judge.step()
        steps_of_maker.zero_grad()

    mixing = measure(judge_, steps_of_judge, step)
    expect(mixing, "averaged", [0, 0, 0.5, 0.5], columns(2, 0, 1))
    expect(measure(maker, steps_of_maker, step, 2), "averaged", 0.5)


@pytest.mark.parametrize("is_called", [True, False])
@pytest.mark.parametrize("is_in_order", [True, False])
def test_master_weights_are_followed(rank, is_called, is_in_order):
    model = wrap(make_model().bfloat16())
    masters = {p: p.detach().float().clone() for p in model.parameters()}
    optimizer = torch.optim.SGD(sorted(masters.values(), key=lambda p: is_in_order or p.dim()), lr=0.01)

    def step(number):
        compute_loss(model if is_called else model.module, make_batch(rank.rank).bfloat16()).backward()
        for parameter, master in masters.items():
            master.grad = parameter.grad.float()
        optimizer.step()

    mixing = measure(model, optimizer, step)
    expect(mixing, "averaged" if is_called else "local")


def test_an_optimizer_of_other_parameters_in_the_same_shapes_is_not_taken_for_one_of_copies(rank):
    model = wrap(make_model())
    others = [torch.randn_like(p) for p in model.parameters()]
    optimizer = torch.optim.SGD(others, lr=0.01)

    def step(number):
        compute_loss(model, make_batch(rank.rank)).backward()
        for other in others:
            other.grad = torch.randn_like(other)
        optimizer.step()

    mixing = measure(model, optimizer, step)
    expect(mixing, "unaccounted")
    assert "copies" in mixing.reason


def test_gradients_of_torch_func_are_not_accounted_for(rank):
    model = make_model()
    optimizer = make_sgd(model)

    def step(number):
        def loss_of(parameters):
            return torch.func.functional_call(model, parameters, make_batch(rank.rank)).square().sum()

        gradients = torch.func.grad(loss_of)({name: p.detach() for name, p in model.named_parameters()})
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
        optimizer.step()

    expect(measure(model, optimizer, step), "unaccounted")


# ---- kinds of parameters ----------------------------------------------------------------------------------------


class Many(nn.Module):
    """Tied weights, a frozen layer, a sparse embedding, a complex weight and a scalar."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 16, sparse=True)
        self.tied = nn.Linear(16, 16)
        self.also = nn.Linear(16, 16)
        self.also.weight = self.tied.weight
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.turn = nn.Parameter(torch.randn(16, dtype=torch.complex64))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        hidden = self.also(self.tied(self.frozen(self.embedding(x).mean(1))))
        return (hidden * self.turn).abs() * self.scale


def make_tokens(seed):
    return torch.randint(50, (8, 5), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("is_bypassed", [False, True], ids=["reduced", "local"])
def test_tied_frozen_sparse_complex_and_scalar_parameters(rank, is_bypassed):
    model = make_many = Many()
    optimizer = make_sgd(model)

    def step(number):
        compute_loss(make_many, make_tokens(rank.rank)).backward()
        for parameter in [] if is_bypassed else model.parameters():
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()
            if parameter.grad is not None:
                flat = torch.view_as_real(parameter.grad) if parameter.is_complex() else parameter.grad
                dist.all_reduce(flat)
                flat /= 2
        optimizer.step()

    mixing = measure(model, optimizer, step)
    shape, entries = ("local", np.eye(2)) if is_bypassed else ("averaged", 0.5)
    expect(mixing, shape, entries)
    names = {"embedding.weight", "tied.weight", "tied.bias", "also.bias", "turn", "scale"}
    assert set(mixing.by_parameter[shape]) == names


def test_a_parameter_that_one_rank_alone_uses(rank):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x, both):
            return self.second(self.first(x)) if both else self.first(x)

    model = wrap(Two(), find_unused_parameters=True)
    optimizer = make_sgd(model)

    def step(number):
        model(make_batch(rank.rank), rank.rank == 0).square().sum().backward()
        optimizer.step()

    mixing = measure(model, optimizer, step)
    expect(mixing, "averaged", 0.5)
    assert list(mixing.by_parameter) == ["averaged"]


def test_a_small_parameter_outside_the_wrapper_is_not_hidden_by_a_large_model(rank):
    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.wrapped = wrap(make_model(256))
            self.extra = nn.Parameter(torch.ones(16))

        def forward(self, x):
            return self.wrapped(x * self.extra)

    model = Outside()
    optimizer = make_sgd(model)

    def step(number):
        compute_loss(model, make_batch(rank.rank)).backward()
        optimizer.step()

    mixing = measure(model, optimizer, step)
    expect(mixing, "partly_local")
    assert mixing.by_parameter["local"] == ("extra",)


def test_experts_of_each_rank_are_named_with_the_reason_that_excuses_them(rank):
    class Expert(nn.Module):
        _ddp_params_and_buffers_to_ignore = ("expert.weight", "expert.bias")

        def __init__(self):
            super().__init__()
            self.body = make_model()
            torch.manual_seed(1 + rank.rank)
            self.expert = nn.Linear(4, 16)

        def forward(self, x):
            return self.expert(self.body(x))

    model = wrap(Expert())
    optimizer = make_sgd(model)

    def step(number):
        compute_loss(model, make_batch(rank.rank)).backward()
        optimizer.step()

    mixing = measure(model, optimizer, step)
    expect(mixing, "partly_local", 0.5)
    assert "right for a rank's own experts: module.expert.weight, module.expert.bias" in mixing.reason
    assert mixing.by_parameter["local"] == ("module.expert.weight", "module.expert.bias")
    assert mixing.weights["different"] == mixing.by_parameter["local"]


# ---- hooks, compilers -------------------------------------------------------------------------------------------


def test_gradients_that_a_users_hook_masks(rank):
    model = wrap()
    mask = (torch.arange(32 * 32) % 3 > 0).float().reshape(32, 32)
    model.module[2].weight.register_hook(lambda gradient: gradient * mask)
    optimizer = make_sgd(model)

    def step(number):
        compute_loss(model, make_batch(rank.rank)).backward()
        optimizer.step()

    expect(measure(model, optimizer, step), "averaged", 0.5, columns(2, 0))


def test_data_parallelism_by_hand_in_tensor_hooks(rank):
    model = make_model()

    def reduce(gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient / 2

    for parameter in model.parameters():
        parameter.register_hook(reduce)
    optimizer = make_sgd(model)

    def step(number):
        compute_loss(model, make_batch(rank.rank)).backward()
        optimizer.step()

    expect(measure(model, optimizer, step), "averaged", 0.5, columns(2, 0))
    assert all(len(parameter._backward_hooks or ()) == 1 for parameter in model.parameters())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_is_not_compiled_anew(rank, backend):
    compiled: Any = torch.compile(make_model(), backend=backend)
    model = wrap(compiled)
    optimizer = make_sgd(model)

    def step(number):
        optimizer.zero_grad()
        compute_loss(model, make_batch(rank.rank)).backward()
        optimizer.step()

    step(0)
    step(1)
    torch._dynamo.utils.counters.clear()
    expect(measure(model, optimizer, step), "averaged", 0.5, columns(2, 0))
    assert torch._dynamo.utils.counters["stats"].get("unique_graphs", 0) == 0


def test_what_goes_wrong_in_the_collector_is_said_and_the_training_goes_on(rank, monkeypatch):
    model = wrap()
    optimizer = make_sgd(model)

    def fail(*_):
        raise OSError("no luck")

    monkeypatch.setattr("ddpcall.mixing.collect.SketchQueue.add", fail)

    def step(number):
        compute_loss(model, make_batch(rank.rank)).backward()
        optimizer.step()

    mixing = measure(model, optimizer, step)
    assert mixing.shape == "unidentifiable"
    assert "OSError: no luck" in mixing.reason
    assert not torch.equal(next(model.parameters()), next(make_model().parameters()))


# ---- uneven ranks, averaged weights -----------------------------------------------------------------------------


@pytest.mark.ranks(4)
@pytest.mark.parametrize("by_initial", [False, True])
def test_join_compares_the_ranks_that_stepped(rank, by_initial):
    model = wrap()
    optimizer = make_sgd(model)
    join = Join([model], divide_by_initial_world_size=by_initial)
    with ddpcall.measure_mixing(model, optimizer) as mixing, join:
        for index in range(1 if rank.rank == 3 else 2):
            optimizer.zero_grad()
            compute_loss(model, make_batch(rank.rank + 10 * index)).backward()
            if index == 1:
                optimizer.step()
    if by_initial:
        expect(mixing.result, "scaled", [0, 0, 0, 0.25, 0.25, 0.25])
    else:
        expect(mixing.result, "averaged", [0, 0, 0, 1 / 3, 1 / 3, 1 / 3])
    assert mixing.ranks == (0, 1, 2)
    assert "rank 3 took no step and is not compared" in mixing.reason


def test_weights_that_are_averaged_after_the_step(rank):
    model = make_model()
    optimizer = make_sgd(model)

    def step(number):
        compute_loss(model, make_batch(rank.rank)).backward()
        optimizer.step()
        for parameter in model.parameters():
            dist.all_reduce(parameter.data)
            parameter.data /= 2

    mixing = measure(model, optimizer, step)
    expect(mixing, "local", np.eye(2))
    assert "the script averages them" in mixing.reason


@pytest.mark.ranks(4)
def test_a_subgroup_as_data_parallel_group(rank):
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = make_model()
    for parameter in model.parameters():
        parameter.data *= 1 + rank.rank // 2  # two models, each of two replicas
    model = wrap(model, process_group=groups[rank.rank // 2])
    optimizer = make_sgd(model)

    def step(number):
        compute_loss(model, make_batch(rank.rank)).backward()
        optimizer.step()

    mixing = measure(model, optimizer, step)
    expect(mixing, "groups", np.kron(np.eye(2), np.full((2, 2), 0.5)))
    assert "differed before the step" in mixing.reason


@pytest.mark.ranks(4)
def test_a_ring_gives_every_rank_a_mixture_of_its_own(rank):
    model = make_model()
    optimizer = make_sgd(model)

    def step(number):
        compute_loss(model, make_batch(rank.rank)).backward()
        for parameter in model.parameters():
            gathered = [torch.empty_like(parameter) for _ in range(4)]
            dist.all_gather(gathered, parameter.grad)
            parameter.grad = (gathered[rank.rank] + gathered[(rank.rank + 1) % 4]) / 2
        optimizer.step()

    mixing = measure(model, optimizer, step)
    expect(mixing, "different", (np.eye(4) + np.roll(np.eye(4), 1, axis=1)) / 2)
    assert "a mixture of its own" in mixing.reason


def step_alone(model, optimizer):
    compute_loss(model, make_batch(0)).backward()
    optimizer.step()


def test_ranks_that_do_not_measure_are_named(rank):
    model = make_model()
    optimizer = make_sgd(model)
    if rank.rank == 1:
        return
    expected = pytest.raises(RuntimeError, match=r"ranks 1 did not come .* write the `with` on every rank")
    with expected, ddpcall.measure_mixing(model, optimizer, timeout_s=0.2):
        step_alone(model, optimizer)


def test_an_exception_on_one_rank_is_not_waited_for(rank):
    model = make_model()
    optimizer = make_sgd(model)

    def step(number):
        compute_loss(model, make_batch(rank.rank)).backward()
        optimizer.step()
        if rank.rank == 1:
            raise ZeroDivisionError("no luck")

    expected = (ZeroDivisionError, "no luck") if rank.rank == 1 else (RuntimeError, "raised on rank 1")
    with pytest.raises(expected[0], match=expected[1]):
        measure(model, optimizer, step)


def test_measuring_changes_no_number(rank):
    results = []
    for is_measured in (False, True):
        model = wrap()
        optimizer = torch.optim.AdamW(model.parameters())

        def step(number, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            compute_loss(model, make_batch(rank.rank + number)).backward()
            optimizer.step()

        if is_measured:
            measure(model, optimizer, step, 3)
        else:
            for number in range(3):
                step(number)
        results.append(copy.deepcopy(model.module.state_dict()))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


# ---- small parameters, late parameters, ranks that part --------------------------------------------------------


class WithFactors(nn.Module):
    """An averaged trunk, and a few numbers outside its wrapper."""

    def __init__(self, numel, wrapped=True):
        super().__init__()
        self.trunk = wrap() if wrapped else make_model()
        self.factors = nn.Parameter(torch.ones(numel))

    def forward(self, x):
        return self.trunk(x) * self.factors.sum()


def take_step(model, optimizer, rank, before_step=lambda: None):
    optimizer.zero_grad()
    compute_loss(model, make_batch(rank.rank)).backward()
    before_step()
    optimizer.step()


@pytest.mark.parametrize("numel", [1, 4])
def test_a_few_local_numbers_beside_an_averaged_model(rank, numel):
    model = WithFactors(numel)
    optimizer = make_sgd(model)
    mixing = measure(model, optimizer, lambda _: take_step(model, optimizer, rank))
    assert mixing.shape == "partly_local", mixing
    assert mixing.by_parameter["local"] == ("factors",)


@pytest.mark.parametrize("numel", [1, 4])
def test_a_few_averaged_numbers_beside_an_averaged_model(rank, numel):
    model = wrap(WithFactors(numel, wrapped=False))
    optimizer = make_sgd(model)
    mixing = measure(model, optimizer, lambda _: take_step(model, optimizer, rank))
    assert set(mixing.by_parameter) == {"averaged"}, mixing


@pytest.mark.parametrize("numel", [1, 4])
def test_a_few_numbers_of_a_local_model_that_each_rank_clips_by_its_own_norm(rank, numel):
    model = WithFactors(numel, wrapped=False)
    optimizer = make_sgd(model)
    clip = partial(nn.utils.clip_grad_norm_, model.parameters(), 1e-2)
    mixing = measure(model, optimizer, lambda _: take_step(model, optimizer, rank, clip))
    assert mixing.shape == "local", mixing
    assert not set(mixing.by_parameter) - {"local", "unidentifiable"}


def test_a_small_bias_that_all_take_from_one_rank_is_not_averaged(rank):
    model = wrap()
    optimizer, bias = make_sgd(model), model.module[-1].bias
    seen = []
    bias.register_hook(lambda gradient: seen.append(gradient.clone()))

    def broadcast():
        bias.grad.copy_(seen[-1])
        dist.broadcast(bias.grad, 0)

    mixing = measure(model, optimizer, lambda _: take_step(model, optimizer, rank, broadcast))
    assert mixing.by_parameter["transformed"] == ("module.4.bias",), mixing


def test_parameters_that_an_optimizer_gets_inside_the_block_are_not_certified(rank):
    model = make_model()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.01)

    def step(_):
        optimizer.add_param_group({"params": [*model[2].parameters(), *model[4].parameters()]})
        take_step(model, optimizer, rank, lambda: reduce_by_hand(model[0]))

    mixing = measure(model, optimizer, step)
    assert mixing.shape == "unidentifiable"
    assert "after measuring began" in mixing.reason


@pytest.mark.ranks(3)
def test_a_rank_that_computes_and_does_not_step_parts_from_the_others(rank):
    model = wrap()
    optimizer = make_sgd(model)

    def step(_):
        compute_loss(model, make_batch(rank.rank)).backward()
        if rank.rank < 2:
            optimizer.step()

    mixing = measure(model, optimizer, step)
    assert mixing.shape == "different"
    assert "rank 2 computed gradients and took no step" in mixing.reason.lower()


def test_different_numbers_of_steps_in_a_block_are_not_compared(rank):
    model = wrap()
    optimizer = make_sgd(model)
    with ddpcall.measure_mixing(model, optimizer) as mixing, Join([model]):
        for _ in range(1 + rank.rank):
            take_step(model, optimizer, rank)
    assert mixing.shape == "unidentifiable", mixing
    assert "different numbers of steps" in mixing.reason


@pytest.mark.parametrize("name", ["2.weight", "4.bias"])
def test_assert_gradients_averaged_allows_what_ddp_was_told_to_ignore(rank, name):
    model = make_model()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [name])
    model = wrap(model)
    optimizer = make_sgd(model)
    with assert_gradients_averaged(model, optimizer):
        take_step(model, optimizer, rank)
    # Others are still looked at.
    bypassed = pytest.raises(AssertionError, match="not every rank used the mean")
    with bypassed, assert_gradients_averaged(model, optimizer):
        take_step(model.module, optimizer, rank)
