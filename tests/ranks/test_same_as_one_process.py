"""Would one process have computed the same? Each cause beside a look-alike in which nothing is wrong."""

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import ddpcall
from ddpcall.pytest_plugin import assert_same_as_one_process
from ddpcall.replicas import digest_state

pytestmark = pytest.mark.ranks(2)


def make_model(*extra):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), *extra, nn.Tanh(), nn.Linear(16, 4))


def make_batch(num_samples=10):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(num_samples, 8, generator=generator)
    return inputs, torch.randint(0, 4, (num_samples,), generator=generator)


def mean_step(model, batch):
    inputs, targets = batch
    loss = F.cross_entropy(model(inputs), targets)
    loss.backward()
    return loss


def sum_step(model, batch):
    inputs, targets = batch
    loss = F.cross_entropy(model(inputs), targets, reduction="sum")
    loss.backward()
    return loss


def compare(step, model=None, batch=None, **options):
    return ddpcall.same_as_one_process(step, model or make_model(), batch or make_batch(), **options)


def test_a_mean_over_equal_shares_is_the_same():
    result = assert_same_as_one_process(mean_step, make_model(), make_batch())
    assert result.cause == "same"
    assert "2 ranks computed what one process does: the gradients of 4 parameters agree" in result.message
    assert result.tolerance < 1e-4


# ---- scaled ----------------------------------------------------------------------------------------------------


def test_a_sum_is_scaled():
    result = compare(sum_step)
    assert not result.same
    assert result.cause == "scaled"
    assert result.scale == pytest.approx(0.5, abs=1e-5)
    assert "0.5 times that of one process: the loss is a sum over the samples" in result.message


def test_a_sum_times_the_number_of_ranks_is_the_same():
    def step(model, batch):
        inputs, targets = batch
        loss = F.cross_entropy(model(inputs), targets, reduction="sum") * dist.get_world_size()
        loss.backward()
        return loss

    assert_same_as_one_process(step, make_model(), make_batch())


def reduce_by_hand(model, divide_by):
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= divide_by


def test_a_loss_multiplied_by_the_number_of_ranks_is_scaled():
    def step(model, batch):
        factor = 2 if isinstance(model, DistributedDataParallel) else 1
        loss = factor * F.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        return loss

    result = compare(step)
    assert result.cause == "scaled"
    assert result.scale == pytest.approx(2, abs=1e-5)
    assert (
        "each rank's loss is 2 times what it should be. It is multiplied by the number of ranks" in result.message
    )


def test_gradients_that_are_summed_are_scaled():
    def step(model, batch):
        loss = mean_step(model, batch)
        reduce_by_hand(model, 1)
        return loss

    result = compare(step, wrap=lambda model: model)
    assert result.cause == "scaled"
    assert result.scale == pytest.approx(2, abs=1e-4)
    assert "the ranks' gradients are summed; divide by the number of ranks, 2" in result.message


def test_gradients_averaged_by_hand_are_the_same():
    def step(model, batch):
        loss = mean_step(model, batch)
        reduce_by_hand(model, dist.get_world_size())
        return loss

    assert_same_as_one_process(step, make_model(), make_batch(), wrap=lambda model: model)


def test_gradients_divided_twice_are_scaled():
    def step(model, batch):
        loss = mean_step(model, batch)
        for parameter in model.parameters():
            parameter.grad /= dist.get_world_size()
        return loss

    result = compare(step)
    assert result.cause == "scaled", result.message
    assert result.scale == pytest.approx(0.5, abs=1e-5)
    assert "is multiplied by 0.5 afterwards" in result.message


# ---- weighted --------------------------------------------------------------------------------------------------


def test_uneven_shares_are_weighted():
    result = compare(mean_step, batch=make_batch(9))
    assert result.cause == "weighted", result.message
    assert result.weights == pytest.approx((0.5, 0.5), abs=1e-3)
    assert result.reference_weights == pytest.approx((5 / 9, 4 / 9), abs=1e-3)
    assert "as their numbers of target tokens 5 and 4 do" in result.message


def make_tokens():
    """Return sequences of which those of rank 0 have 72 targets and those of rank 1 have 8."""
    inputs, targets = torch.randn(8, 20, 8, generator=torch.Generator().manual_seed(2)), torch.zeros(8, 20)
    targets = (inputs.sum(dim=2) > 0).long() + 2 * (inputs[..., 0] > 0).long()
    targets[:4, 18:], targets[4:, 2:] = -100, -100
    return {"inputs": inputs, "targets": targets}


def token_step(model, batch):
    logits = model(batch["inputs"])
    loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
    loss.backward()
    return loss


def test_means_of_unequal_token_counts_are_weighted():
    result = compare(token_step, batch=make_tokens())
    assert result.cause == "weighted", result.message
    assert "weighted 0.50 and 0.50; the whole batch weights them 0.90 and 0.10" in result.message
    assert "as their numbers of target tokens 72 and 8 do" in result.message


def test_a_token_count_of_all_ranks_is_the_same():
    def step(model, batch):
        logits = model(batch["inputs"])
        loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum")
        count = (batch["targets"] != -100).sum()
        dist.all_reduce(count)
        loss = loss * dist.get_world_size() / count
        loss.backward()
        return loss

    assert_same_as_one_process(step, make_model(), make_tokens())


def accumulate(model, batch, num_samples):
    """Accumulate a mean over micro-batches of so many samples; the last may be smaller."""
    parts = list(zip(*(tensor.split(num_samples) for tensor in batch), strict=True))
    for index, part in enumerate(parts):
        is_last = index == len(parts) - 1
        with contextlib.nullcontext() if is_last or not hasattr(model, "no_sync") else model.no_sync():
            loss = F.cross_entropy(model(part[0]), part[1]) / len(parts)
            loss.backward()
    return loss


def test_equal_micro_batches_are_the_same():
    assert_same_as_one_process(lambda model, batch: accumulate(model, batch, 2), make_model(), make_batch(8))


def test_unequal_micro_batches_are_weighted():
    """One process takes twelve samples as 4, 4, 4; a rank takes its six as 4 and 2."""
    result = compare(lambda model, batch: accumulate(model, batch, 4), batch=make_batch(12))
    assert result.cause == "weighted", result.message
    assert result.weights == pytest.approx((0.5, 0.5, 0.5, 0.5), abs=1e-3)
    assert result.reference_weights == pytest.approx((2 / 3, 1 / 3, 2 / 3, 1 / 3), abs=1e-3)
    assert "as their numbers of target tokens 4, 2, 4 and 2 do" in result.message


def test_gradients_that_are_not_averaged_are_weighted():
    result = compare(mean_step, wrap=lambda model: model)
    assert result.cause == "weighted"
    assert result.message.startswith("The ranks' gradients are not averaged; whether they average their weights")


# ---- module ----------------------------------------------------------------------------------------------------


def test_batch_norm_over_a_share_is_the_first_module():
    result = compare(mean_step, make_model(nn.BatchNorm1d(16)))
    assert (result.cause, result.where) == ("module", "1")
    assert "1 (BatchNorm1d): its output differs for 10 of 10 samples" in result.message
    assert "SyncBatchNorm.convert_sync_batchnorm(model)" in result.message


@pytest.mark.parametrize("norm", [nn.LayerNorm(16), nn.BatchNorm1d(16).eval()], ids=["layer", "frozen_batch"])
def test_a_norm_of_each_sample_alone_is_the_same(norm):
    assert_same_as_one_process(mean_step, make_model(norm), make_batch())


# ---- loss ------------------------------------------------------------------------------------------------------


def contrast(model, batch, gather):
    here = F.normalize(model(batch[0]), dim=1)
    there = F.normalize(model(batch[1]), dim=1)
    first, everybody = dist.get_rank() * len(here), torch.cat(gather(there))
    loss = F.cross_entropy(here @ everybody.T / 0.2, torch.arange(first, first + len(here)))
    loss.backward()
    return loss


def make_pairs():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(8, 8, generator=generator), torch.randn(8, 8, generator=generator)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = make_model()

    def forward(self, x):
        return self.net(x)


class GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        ctx.size = len(tensor)
        return torch.cat(gather_without_gradient(tensor))

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank() * ctx.size :][: ctx.size]


def gather_without_gradient(tensor):
    parts = [torch.zeros_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return parts


def test_negatives_of_a_share_alone_are_the_loss():
    result = compare(local_contrast, Encoder(), make_pairs())
    assert result.cause == "loss", result.message
    assert "no weighted mean of its shares' losses" in result.message


def local_contrast(model, batch):
    here, there = F.normalize(model(batch[0]), dim=1), F.normalize(model(batch[1]), dim=1)
    loss = F.cross_entropy(here @ there.T / 0.2, torch.arange(len(here)))
    loss.backward()
    return loss


def test_a_gather_that_lets_no_gradient_through_is_the_loss():
    def step(model, batch):
        if dist.get_world_size() == 1:
            return local_contrast(model, batch)
        return contrast(model, batch, gather_without_gradient)

    result = compare(step, Encoder(), make_pairs())
    assert result.cause == "loss", result.message


def test_a_gather_with_its_gradient_is_the_same():
    assert_same_as_one_process(
        lambda model, batch: contrast(model, batch, lambda t: [GatherWithGradient.apply(t)]),
        Encoder(),
        make_pairs(),
    )


# ---- some parameters, update -----------------------------------------------------------------------------------


def test_a_parameter_that_is_reduced_twice_is_named():
    def step(model, batch):
        loss = mean_step(model, batch)
        dist.all_reduce(model.get_parameter("module.2.bias" if hasattr(model, "module") else "2.bias").grad)
        return loss

    result = compare(step)
    assert (result.cause, result.where) == ("some_parameters", "2.bias"), result.message
    assert result.scale == pytest.approx(2, abs=1e-4)
    assert "1 of 4 parameters differ from those of one process, and they are 2 times" in result.message


def test_a_parameter_that_ddp_was_told_to_ignore_is_named():
    def wrap(model):
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["2.bias"])
        return nn.parallel.DistributedDataParallel(model)

    result = compare(mean_step, wrap=wrap)
    assert (result.cause, result.where) == ("some_parameters", "2.bias"), result.message
    assert "The gradients of some parameters are not averaged: 2.bias. The others agree." in result.message


def test_a_parameter_that_is_averaged_twice_is_the_same():
    def step(model, batch):
        loss = mean_step(model, batch)
        bias = model.get_parameter("module.2.bias" if hasattr(model, "module") else "2.bias")
        dist.all_reduce(bias.grad)
        bias.grad /= dist.get_world_size()
        return loss

    assert_same_as_one_process(step, make_model(), make_batch())


def test_clipping_before_the_reduction_is_the_update():
    def step(model, batch):
        loss = mean_step(model, batch)
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        reduce_by_hand(model, dist.get_world_size())
        return loss

    result = compare(step, wrap=lambda model: model)
    assert result.cause == "update", result.message
    assert "Before the ranks' gradients are put together they are the same" in result.message


def test_clipping_by_a_norm_that_is_reduced_twice_is_the_update():
    def step(model, batch):
        loss = mean_step(model, batch)
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters()])) ** 2
        dist.all_reduce(norm)
        for parameter in model.parameters():
            parameter.grad *= 0.05 / norm.sqrt()
        return loss

    result = compare(step)
    assert result.cause == "update", result.message
    assert result.scale == pytest.approx(2**-0.5, abs=1e-4)


def test_clipping_of_the_mean_is_the_same():
    def step(model, batch):
        loss = mean_step(model, batch)
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        return loss

    assert_same_as_one_process(step, make_model(), make_batch())


def test_a_learning_rate_times_the_number_of_ranks_is_the_update():
    result = compare(mean_step, optimizer=lambda p: torch.optim.SGD(p, lr=0.1 * dist.get_world_size()))
    assert result.cause == "update", result.message
    assert "The gradients agree, and what the optimizer adds does not, by up to 100.0%" in result.message


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_updates_of_three_steps_are_the_same(kind):
    result = assert_same_as_one_process(
        mean_step, make_model(), make_batch(), optimizer=lambda p: kind(p, lr=0.01), steps=3
    )
    assert result.step == 2
    assert "the gradients and updates of 4 parameters" in result.message


def test_what_differs_from_the_second_step_on_is_told_with_the_step():
    calls = {}

    def step(model, batch):
        calls[id(model)] = calls.get(id(model), 0) + 1
        loss = mean_step(model, batch)
        if calls[id(model)] == 2 and dist.get_world_size() > 1:
            reduce_by_hand(model, 1)
        return loss

    result = compare(step, optimizer=lambda p: torch.optim.SGD(p, lr=0.01), steps=3)
    assert (result.cause, result.step) == ("scaled", 1), result.message


@pytest.mark.parametrize("is_right", [True, False])
def test_sharded_parameters_are_compared(is_right):
    def shard(model):
        for layer in (model[0], model[2]):
            fully_shard(layer)
        return fully_shard(model)

    result = compare(
        mean_step if is_right else sum_step, wrap=shard, optimizer=lambda p: torch.optim.SGD(p, lr=0.1)
    )
    assert result.cause == ("same" if is_right else "scaled"), result.message


# ---- random numbers, precision ---------------------------------------------------------------------------------


def test_dropout_is_left_out_and_that_is_said():
    result = assert_same_as_one_process(mean_step, make_model(nn.Dropout(0.5)), make_batch())
    assert "The comparison was made without dropout." in result.message


class Dropping(nn.Module):
    """Calls dropout as a function."""

    def __init__(self, probability, is_on):
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.options = {"p": probability, "training": is_on}

    def forward(self, x):
        return self.linear(F.dropout(x, **self.options))


@pytest.mark.parametrize(
    ("probability", "is_on", "is_said"), [(0.5, True, True), (0.0, True, False), (0.5, False, False)]
)
def test_only_dropout_that_drops_is_spoken_of(probability, is_on, is_said):
    result = assert_same_as_one_process(mean_step, Dropping(probability, is_on), make_batch())
    assert ("without dropout" in result.message) == is_said


def test_random_numbers_explain_nothing():
    def step(model, batch):
        return mean_step(model, (batch[0] + torch.randn_like(batch[0]), batch[1]))

    result = compare(step)
    assert result.cause == "unexplained"
    assert "The step draws random numbers" in result.message


def autocast_step(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    return loss


def wrong_autocast_step(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(batch[0]), batch[1], reduction="sum")
    loss.backward()
    return loss


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("is_right", [True, False])
def test_the_tolerance_follows_the_precision(precision, is_right):
    model, batch = make_model(), make_batch(32)
    if precision == "bfloat16":
        model, batch = model.to(torch.bfloat16), (batch[0].to(torch.bfloat16), batch[1])
    right, wrong = (autocast_step, wrong_autocast_step) if precision == "autocast" else (mean_step, sum_step)
    result = compare(right if is_right else wrong, model, batch, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    assert result.same == is_right, result.message
    assert result.tolerance < (1e-4 if precision == "float32" else 0.3)
    if not is_right:
        assert result.cause == "scaled"


# ---- what is left as it was, and errors ------------------------------------------------------------------------


def note_state(model):
    return (
        digest_state(model.state_dict()),
        [parameter.grad for parameter in model.parameters()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        torch.random.get_rng_state().tolist(),
        model.training,
        dist.group.WORLD,
        dist.get_world_size(),
    )


def raising_step(model, batch):
    if dist.get_world_size() > 1 and dist.get_rank() == 1:
        raise KeyError("labels")
    return mean_step(model, batch)


ERROR = r"^the step raised on the ranks \(rank 1: KeyError: 'labels'\)$"


@pytest.mark.parametrize("step", [mean_step, raising_step])
def test_everything_is_left_as_it_was(step):
    model = make_model(nn.BatchNorm1d(16), nn.Dropout())
    before = note_state(model)
    with pytest.raises(RuntimeError, match=ERROR) if step is raising_step else contextlib.nullcontext():
        compare(step, model, optimizer=torch.optim.AdamW, timeout_s=4)  # a rank waits as long for the other
    assert note_state(model) == before
    dist.barrier()


def test_an_error_in_one_process_is_raised_on_all():
    def step(model, batch):
        if dist.get_world_size() == 1:
            raise OSError("no room")
        return mean_step(model, batch)

    with pytest.raises(RuntimeError, match=r"in one process, with the whole batch .rank 0: OSError: no room"):
        compare(step)


def test_the_assertion_says_cause_and_message():
    with pytest.raises(AssertionError, match=r"do not compute what one process does \(scaled\):\nEvery gradient"):
        assert_same_as_one_process(sum_step, make_model(), make_batch())


def test_another_model_on_a_rank_is_refused():
    torch.manual_seed(dist.get_rank())
    with pytest.raises(ValueError, match=r"the model .* on rank 1 is not that of rank 0. Seed every rank alike"):
        compare(mean_step, nn.Linear(8, 4))


def test_another_batch_on_a_rank_is_refused():
    batch = torch.full((4, 8), float(dist.get_rank())), torch.zeros(4, dtype=torch.long)
    with pytest.raises(
        ValueError, match=r"the batch .* on rank 1 is not that of rank 0. Give every rank the whole"
    ):
        compare(mean_step, batch=batch)


def test_a_batch_of_fewer_samples_than_ranks_is_refused():
    with pytest.raises(ValueError, match="1 samples cannot be split between 2 ranks"):
        compare(mean_step, batch=make_batch(1))


def test_a_split_of_ones_own_is_used():
    def split(batch, rank, num_ranks):
        return tuple(tensor[rank::num_ranks] for tensor in batch)

    assert_same_as_one_process(mean_step, make_model(), make_batch(), split=split)


# ---- documented limits -----------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head = nn.LSTM(8, 8, num_layers=2, dropout=dropout, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.lstm(x[:, None].expand(-1, 3, -1))[0][:, -1])


@pytest.mark.parametrize(("dropout", "cause"), [(0.0, "same"), (0.5, "unexplained")])
def test_dropout_within_a_recurrent_layer_cannot_be_left_out(dropout, cause):
    result = compare(mean_step, Recurrent(dropout))
    assert result.cause == cause, result.message
    assert ("except in recurrent layers" in result.message) == (dropout > 0)


def test_an_order_that_matters_is_no_noise():
    """The first half of the batch counts twice: a mean over the other order is another one."""

    def step(model, batch):
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        loss = (losses * torch.linspace(0.5, 1.5, len(losses))).mean()
        loss.backward()
        return loss

    result = compare(step)
    assert not result.same
    assert result.tolerance < 1e-4
    assert "The order of the samples matters to this step" in result.message


def test_a_loss_of_zero_tells_nothing():
    def step(model, batch):
        loss = model(batch[0]).sum() * 0
        loss.backward()
        return loss

    result = compare(step)
    assert (result.cause, result.same) == ("unexplained", False)
    assert "every gradient is zero: there is nothing to compare" in result.message


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match=r"steps is 0; write 1 or more"):
        compare(mean_step, steps=0)


@pytest.mark.ranks(1)
def test_one_rank_is_refused():
    with pytest.raises(RuntimeError, match=r"there is only one rank: start the script with torchrun"):
        compare(mean_step)


@pytest.mark.ranks(4)
def test_four_ranks_with_uneven_shares_are_weighted():
    result = compare(mean_step, batch=make_batch(14))
    assert result.reference_weights == pytest.approx((4 / 14, 4 / 14, 3 / 14, 3 / 14), abs=1e-3), result.message
    assert "as their numbers of target tokens 4, 4, 3 and 3 do" in result.message
