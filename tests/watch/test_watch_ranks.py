"""The watch on two ranks: what it must find, on which line, and the look-alikes it must stay silent on."""

import copy
import inspect
import io
import pickle
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable import replicate
from torch.distributed._functional_collectives import all_reduce as functional_all_reduce
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import ddpcall
from ddpcall.watch.session import WatchError

pytestmark = pytest.mark.ranks(2)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 2)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))

    def compute_loss(self, x):
        return self(x).square().mean()

    def past_children(self, x):
        hidden = nn.functional.linear(x, self.first.weight, self.first.bias)
        return nn.functional.linear(hidden, self.second.weight).square().mean()


@pytest.fixture
def session(rank, tmp_path):
    """A watch around the test, which must leave nothing behind."""
    before = {cls: attributes(cls) for cls in (nn.Module, nn.Parameter, DistributedDataParallel)}
    with ddpcall.watch(on_finding="record", json=tmp_path / f"{rank.rank}.json", every=0) as session:
        yield session
    assert {cls: attributes(cls) for cls in before} == before


def attributes(cls):
    """Return a class's own attributes, less what pickle caches there."""
    return {name: value for name, value in vars(cls).items() if name != "__slotnames__"}


class Setup:
    def __init__(self, rank, model=None, **options):
        torch.manual_seed(0)
        self.ddp = DistributedDataParallel(model or Net(), **options)
        self.optimizer = torch.optim.SGD(self.ddp.parameters(), lr=0.1)
        torch.manual_seed(rank.rank)

    def batch(self):
        return torch.randn(3, 4)

    def step(self, loss):
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def line_of(test, text):
    """Return the number of the test's line that ends in the comment `# text`."""
    lines, first = inspect.getsourcelines(test)
    (line,) = [first + offset for offset, line in enumerate(lines) if line.rstrip().endswith(f"# {text}")]
    return line


def only(session, code, test, mark="here"):
    """Check that there is one finding, on the marked line of the test, in the first step; return it."""
    (finding,) = session.findings
    assert (finding.code, finding.line, finding.file) == (code, line_of(test, mark), __file__)
    return finding


# ---- findings -------------------------------------------------------------------------------------------------


def test_inner_call_is_found_on_its_line(rank, session):
    setup = Setup(rank)
    for _ in range(3):
        loss = setup.ddp.module(setup.batch()).mean()  # here
        setup.step(loss)
    finding = only(session, "DC101", test_inner_call_is_found_on_its_line)
    assert (finding.step, finding.count, finding.ranks) == (1, 3, (rank.rank,))
    assert sorted(finding.parameters) == ["first.bias", "first.weight", "second.bias", "second.weight"]


def test_inner_forward_kept_original_is_found(rank, session):
    net = Net()
    setup = Setup(rank, net)
    loss = net.forward(setup.batch()).mean()  # here
    setup.step(loss)
    only(session, "DC101", test_inner_forward_kept_original_is_found)


def test_the_line_is_where_the_model_was_entered_not_inside_it(rank, session):
    setup = Setup(rank)
    setup.step(setup.ddp.module.compute_loss(setup.batch()))  # here
    only(session, "DC101", test_the_line_is_where_the_model_was_entered_not_inside_it)


def run_helper(model, x):
    return model(x).mean()  # in the helper


def test_a_helper_that_gets_the_inner_module_is_the_line(rank, session):
    setup = Setup(rank)
    setup.step(run_helper(setup.ddp.module, setup.batch()))
    only(session, "DC101", run_helper, "in the helper")


def test_piece_by_piece_is_one_finding(rank, session):
    setup = Setup(rank)
    hidden = setup.ddp.module.first(setup.batch())  # here
    setup.step(setup.ddp.module.second(hidden).mean())
    only(session, "DC101", test_piece_by_piece_is_one_finding)


def test_functional_call_is_found(rank, session):
    setup = Setup(rank)
    inner = setup.ddp.module
    outputs = torch.func.functional_call(inner, dict(inner.named_parameters()), (setup.batch(),))  # here
    setup.step(outputs.mean())
    only(session, "DC101", test_functional_call_is_found)


def test_raw_weights_are_found_in_the_second_step(rank, session):
    setup = Setup(rank)
    for _ in range(2):
        loss = setup.ddp.module.past_children(setup.batch())  # here
        setup.step(loss)
    finding = only(session, "DC101", test_raw_weights_are_found_in_the_second_step)
    assert (finding.cause, finding.step) == ("raw_weights", 1)


def test_raw_weights_of_a_single_step_are_found_at_the_backward(rank, tmp_path):
    with ddpcall.watch(on_finding="record", json=tmp_path / f"{rank.rank}.json", every=0) as session:
        setup = Setup(rank)
        loss = setup.ddp.module.past_children(setup.batch())
        loss.backward()  # here
        setup.optimizer.step()
    only(session, "DC101", test_raw_weights_of_a_single_step_are_found_at_the_backward)


def test_two_forwards_then_two_backwards_leave_the_second_unreduced(rank, session):
    setup = Setup(rank)
    one, two = setup.ddp(setup.batch()).mean(), setup.ddp(setup.batch()).mean()
    one.backward()
    two.backward()  # here
    setup.optimizer.step()
    only(session, "DC101", test_two_forwards_then_two_backwards_leave_the_second_unreduced)


def test_autograd_grad_written_to_grad_is_found(rank, session):
    setup = Setup(rank)
    parameters = list(setup.ddp.parameters())
    gradients = torch.autograd.grad(setup.ddp(setup.batch()).mean(), parameters)  # here
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    setup.optimizer.step()
    only(session, "DC101", test_autograd_grad_written_to_grad_is_found)


def test_a_penalty_whose_backward_is_its_own_is_found_at_its_forward(rank, session):
    setup = Setup(rank)
    setup.ddp(setup.batch()).mean().backward()
    x = setup.batch().requires_grad_()
    outputs = setup.ddp.module(x)  # here
    (gradient,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
    gradient.square().mean().backward()
    setup.optimizer.step()
    only(session, "DC101", test_a_penalty_whose_backward_is_its_own_is_found_at_its_forward)


def test_a_shared_trunk_is_found_when_neither_wrapper_is_called(rank, session):
    setup = Setup(rank)
    DistributedDataParallel(nn.Sequential(setup.ddp.module.first, nn.Linear(8, 3)))
    setup.step(setup.ddp.module(setup.batch()).mean())  # here
    assert {finding.code for finding in session.findings} == {"DC101"}
    assert {finding.line for finding in session.findings} == {
        line_of(test_a_shared_trunk_is_found_when_neither_wrapper_is_called, "here")
    }


def test_a_model_that_was_frozen_in_the_first_backward_is_still_watched(rank, session, capsys):
    setup, frozen = Setup(rank), Setup(rank)
    frozen.ddp.requires_grad_(False)
    setup.step(frozen.ddp.module(setup.ddp(setup.batch()).repeat(1, 2)).mean())
    frozen.ddp.requires_grad_(True)
    frozen.step(frozen.ddp.module(frozen.batch()).mean())  # here
    only(session, "DC101", test_a_model_that_was_frozen_in_the_first_backward_is_still_watched)
    assert "error of its own" not in capsys.readouterr().err


class SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        total = grad.clone()
        dist.all_reduce(total)
        return total


def test_a_collective_of_the_graph_is_no_reduction_of_gradients(rank, session):
    setup = Setup(rank)
    features = setup.ddp.module(setup.batch())  # here
    setup.step(SumOverRanks.apply(features.repeat(100, 1)).mean())
    only(session, "DC101", test_a_collective_of_the_graph_is_no_reduction_of_gradients)


def test_an_unfrozen_parameter_is_found_where_it_was_unfrozen(rank, session):
    net = Net()
    net.first.requires_grad_(False)
    setup = Setup(rank, net)
    net.first.weight.requires_grad = True  # here
    setup.step(setup.ddp(setup.batch()).mean())
    assert only(session, "DC102", test_an_unfrozen_parameter_is_found_where_it_was_unfrozen).parameters == (
        "first.weight",
    )


def test_a_replaced_head_is_found_where_it_was_replaced(rank, session):
    net = Net()
    setup = Setup(rank, net, find_unused_parameters=True)
    net.second = nn.Linear(8, 3)  # here
    setup.optimizer = torch.optim.SGD(setup.ddp.parameters(), lr=0.1)
    setup.step(setup.ddp(setup.batch()).mean())
    finding = only(session, "DC102", test_a_replaced_head_is_found_where_it_was_replaced)
    assert sorted(finding.parameters) == ["second.bias", "second.weight"]


def test_a_conversion_after_wrapping_is_found_where_it_happened(rank, session):
    setup = Setup(rank)
    setup.ddp.module.double().float()  # here
    setup.step(setup.ddp(setup.batch()).mean())
    only(session, "DC103", test_a_conversion_after_wrapping_is_found_where_it_happened)


def test_no_sync_around_the_last_forward_is_found(rank, session):
    setup = Setup(rank)
    with setup.ddp.no_sync():  # here
        loss = setup.ddp(setup.batch()).mean()
    setup.step(loss)
    assert only(session, "DC104", test_no_sync_around_the_last_forward_is_found).severity == "error"


def test_no_sync_around_the_backward_alone_is_a_warning(rank, session):
    setup = Setup(rank)
    loss = setup.ddp(setup.batch()).mean()
    with setup.ddp.no_sync():  # here
        loss.backward()
    setup.optimizer.step()
    assert only(session, "DC104", test_no_sync_around_the_backward_alone_is_a_warning).severity == "warning"


def test_a_step_inside_a_gradient_hook_is_found(rank, session):
    setup = Setup(rank)

    def step_at_once(parameter):
        setup.optimizer.step()  # here

    setup.ddp.module.first.weight.register_post_accumulate_grad_hook(step_at_once)
    setup.ddp(setup.batch()).mean().backward()
    only(session, "DC105", test_a_step_inside_a_gradient_hook_is_found)


def test_skipped_hooks_are_found_and_gradients_are_not_complained_about(rank, session):
    setup = Setup(rank)
    handle = setup.ddp.register_forward_hook(lambda module, inputs, outputs: None)
    setup.step(setup.ddp(setup.batch()).mean())
    assert session.findings == []
    outputs: Any = setup.ddp.forward(setup.batch())  # here
    setup.step(outputs.mean())
    finding = only(session, "DC301", test_skipped_hooks_are_found_and_gradients_are_not_complained_about)
    assert "1 forward hook " in finding.message
    handle.remove()


def test_raise_stops_the_step_that_would_do_the_harm(rank, tmp_path):
    with ddpcall.watch(on_finding="raise", json=tmp_path / f"{rank.rank}.json", every=0):
        setup = Setup(rank)
        before = copy.deepcopy(setup.ddp.module.state_dict())
        setup.ddp.module(setup.batch()).mean().backward()
        with pytest.raises(WatchError, match="DC101 gradients-not-synchronized"):
            setup.optimizer.step()
        assert all(torch.equal(before[name], value) for name, value in setup.ddp.module.state_dict().items())


def test_a_model_wrapped_before_can_be_watched(rank, tmp_path):
    setup = Setup(rank)
    with ddpcall.watch(setup.ddp, on_finding="record", json=tmp_path / f"{rank.rank}.json", every=0) as session:
        setup.step(setup.ddp.module(setup.batch()).mean())
    assert [finding.code for finding in session.findings] == ["DC101"]


# ---- look-alikes ----------------------------------------------------------------------------------------------


def reduce_gradients(optimizer):
    for parameter in optimizer.param_groups[0]["params"]:
        dist.all_reduce(parameter.grad)


class ReducingSGD(torch.optim.SGD):
    def step(self, closure=None):
        reduce_gradients(self)
        return super().step(closure)


def harmless(rank, name, setup):
    """Do one harmless thing that looks like a mistake, and train."""
    ddp, x = setup.ddp, setup.batch()
    match name:
        case "wrapped_call":
            setup.step(ddp(x).mean())
        case "wrapped_forward":
            outputs: Any = ddp.forward(x)
            setup.step(outputs.mean())
        case "evaluation":
            with torch.no_grad():
                assert torch.equal(ddp.module(x), ddp.module.forward(x))
            setup.step(ddp(x).mean())
        case "evaluation_with_gradients_on":
            ddp.module(x).mean().item()
            setup.step(ddp(x).mean())
        case "armed_by_the_wrapper":
            ddp(x)
            setup.step(ddp.module(x).mean())
        case "inner_loss_on_wrapped_outputs":
            outputs = ddp(x)
            setup.step(ddp.module.second(torch.relu(ddp.module.first(x))).mean() + outputs.mean())
        case "accumulation":
            with ddp.no_sync():
                ddp(x).mean().backward()
            ddp(x).mean().backward()
            setup.optimizer.step()
        case "reduced_by_hand":
            ddp.module(x).mean().backward()
            for parameter in ddp.parameters():
                dist.all_reduce(parameter.grad)
            setup.optimizer.step()
        case "reduced_flat_by_hand":
            ddp.module(x).mean().backward()
            flat = torch.cat([parameter.grad.flatten() for parameter in ddp.parameters()])
            dist.all_reduce(flat)
            for parameter, part in zip(
                ddp.parameters(), flat.split([p.numel() for p in ddp.parameters()]), strict=True
            ):
                parameter.grad.copy_(part.view_as(parameter))
            setup.optimizer.step()
        case "reduced_in_hooks":
            for parameter in ddp.parameters():
                parameter.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad))
            for _ in range(2):
                setup.step(ddp.module(x).mean())
        case "reduced_functionally":
            ddp.module(x).mean().backward()
            for parameter in ddp.parameters():
                parameter.grad = functional_all_reduce(parameter.grad, "sum", cast(Any, dist.group.WORLD))
            setup.optimizer.step()
        case "reduced_by_a_step_hook":
            setup.optimizer.register_step_pre_hook(lambda optimizer, *_: reduce_gradients(optimizer))
            setup.step(ddp.module(x).mean())
        case "reduced_by_the_optimizers_own_step":
            setup.optimizer = ReducingSGD(ddp.parameters(), lr=0.1)
            with ddp.no_sync():
                setup.step(ddp(x).mean())
        case "parameters_averaged_after_the_step":
            for _ in range(2):
                setup.step(ddp.module(setup.batch()).square().mean())
                flat = nn.utils.parameters_to_vector(ddp.parameters()).detach()
                dist.all_reduce(flat)
                nn.utils.vector_to_parameters(flat / dist.get_world_size(), ddp.parameters())
        case "trunk_shared_by_two_wrappers":
            other = DistributedDataParallel(nn.Sequential(ddp.module.first, nn.Linear(8, 3)))
            for wrapper in (ddp, other, ddp):
                setup.step(wrapper(x).mean())
        case "scripted_inner":
            with pytest.warns(DeprecationWarning, match="jit.script"):
                scripted: Any = torch.jit.script(ddp.module.first)
            assert torch.equal(scripted(x), ddp.module.first(x))
        case "dropped_before_the_step":
            ddp.module(x).mean().backward()
            setup.step(ddp(x).mean())
        case "gradient_penalty":
            x.requires_grad_()
            outputs = ddp(x)
            (gradient,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
            setup.step(gradient.square().mean() + outputs.mean())
        case "gradient_norm_logged":
            loss = ddp(x).mean()
            torch.autograd.grad(loss, list(ddp.parameters()), retain_graph=True)
            setup.step(loss)
        case "teacher":
            teacher = copy.deepcopy(ddp.module)
            with torch.no_grad():
                target = teacher(x)
            setup.step((ddp(x) - target).square().mean())
        case "sam":
            ddp.module(x).mean().backward()
            with torch.no_grad():
                for parameter in ddp.parameters():
                    parameter.add_(0.01 * parameter.grad)
            setup.step(ddp(x).mean())
        case "closure":
            setup.optimizer = torch.optim.LBFGS(ddp.parameters(), max_iter=2)

            def closure():
                setup.optimizer.zero_grad()
                loss = ddp(x).square().mean()
                loss.backward()
                return loss

            setup.optimizer.step(closure)
        case "checkpointed":
            outputs: Any = checkpoint(ddp, x, use_reentrant=False)
            setup.step(outputs.mean())


HARMLESS = [
    "wrapped_call",
    "wrapped_forward",
    "evaluation",
    "evaluation_with_gradients_on",
    "armed_by_the_wrapper",
    "inner_loss_on_wrapped_outputs",
    "accumulation",
    "reduced_by_hand",
    "reduced_flat_by_hand",
    "reduced_in_hooks",
    "reduced_functionally",
    "reduced_by_a_step_hook",
    "reduced_by_the_optimizers_own_step",
    "parameters_averaged_after_the_step",
    "trunk_shared_by_two_wrappers",
    "scripted_inner",
    "dropped_before_the_step",
    "gradient_penalty",
    "gradient_norm_logged",
    "teacher",
    "sam",
    "closure",
    "checkpointed",
]


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_look_alikes_stay_silent(rank, session, name):
    setup = Setup(rank)
    for _ in range(2):
        harmless(rank, name, setup)
    assert session.findings == []


@pytest.mark.parametrize("options", [{"static_graph": True}, {"find_unused_parameters": True}])
def test_other_reducers_settings_stay_silent_and_are_seen(rank, session, options):
    setup = Setup(rank, **options)
    for _ in range(3):
        setup.step(setup.ddp(setup.batch()).mean())
    assert session.findings == []
    setup.step(setup.ddp.module(setup.batch()).mean())
    assert [finding.code for finding in session.findings] == ["DC101"]


def test_ignored_parameters_are_trained_locally_on_purpose(rank, session):
    net: Any = Net()
    net._ddp_params_and_buffers_to_ignore = ["second.weight", "second.bias"]
    setup = Setup(rank, net)
    setup.step(setup.ddp(setup.batch()).mean())
    assert session.findings == []


def test_two_wrappers_trained_in_turn_stay_silent(rank, session):
    generator, critic = Setup(rank), Setup(rank, nn.Linear(2, 1))
    for _ in range(2):
        fake = generator.ddp(generator.batch())
        critic.step(critic.ddp(fake.detach()).mean())
        generator.step(critic.ddp.module(fake).mean())
    assert session.findings == []


# ---- sharded models, and the other replicate ------------------------------------------------------------------


class Sharded(Setup):
    def __init__(self, rank, apply, watched=None):
        torch.manual_seed(0)
        self.net = watched or Net()
        apply(self.net)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
        torch.manual_seed(rank.rank)


def accumulate(setup, num_synchronized):
    for micro in range(2):
        setup.net.set_requires_gradient_sync(micro >= 2 - num_synchronized)  # here
        setup.net(setup.batch()).mean().backward()
    setup.optimizer.step()
    setup.optimizer.zero_grad()


@pytest.mark.parametrize("apply", [fully_shard, replicate])
def test_synchronization_left_off_at_the_step_is_found_where_it_was_switched(rank, session, apply):
    setup = Sharded(rank, apply)
    for _ in range(2):
        accumulate(setup, num_synchronized=1)
    assert session.findings == []
    accumulate(setup, num_synchronized=0)
    (finding,) = session.findings
    assert (finding.code, finding.line, finding.step) == ("DC104", line_of(accumulate, "here"), 3)
    assert sorted(finding.parameters) == ["first.bias", "first.weight", "second.bias", "second.weight"]


def test_a_forward_that_trains_nothing_is_found_on_its_line(rank, session):
    setup = Sharded(rank, fully_shard)
    shards: Any = setup.optimizer.param_groups[0]["params"]  # the module holds whole parameters by and by
    before = [parameter.to_local().clone() for parameter in shards]
    with torch.no_grad():
        setup.net(setup.batch())
    loss = setup.net.forward(setup.batch()).mean()  # here
    loss.backward()
    assert session.findings == []
    setup.optimizer.step()
    finding = only(session, "DC306", test_a_forward_that_trains_nothing_is_found_on_its_line)
    assert (finding.cause, len(finding.parameters)) == ("sharded_unreduced", 4)
    after = [parameter.to_local() for parameter in shards]
    assert all(map(torch.equal, before, after)), "the harm itself"


def test_a_sharded_forward_without_harm_is_silent(rank, session):
    setup = Sharded(rank, fully_shard)
    for _ in range(2):
        with torch.no_grad():
            setup.net(setup.batch())
        setup.net.forward(setup.batch()).mean().item()  # nothing is trained with it
        setup.step(setup.net(setup.batch()).mean())
        with torch.no_grad():
            setup.net(setup.batch())
        setup.net.forward(setup.batch()).mean().backward()
        setup.net(setup.batch()).mean().backward()  # reduces both
        setup.optimizer.step()
        setup.optimizer.zero_grad()
    assert session.findings == []


# ---- the model is left as it was -------------------------------------------------------------------------------


def test_copies_and_pickles_carry_no_tap_and_use_their_own_parameters(rank, session):
    setup = Setup(rank)
    inner = setup.ddp.module
    assert "forward" in vars(inner), "the positive control: the original is tapped"
    averaged = torch.optim.swa_utils.AveragedModel(inner).module
    stream = io.BytesIO()
    torch.save(inner, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    x = setup.batch()
    for other in (copy.deepcopy(inner), copy.copy(inner), averaged, pickle.loads(pickle.dumps(inner)), loaded):
        assert "forward" not in vars(other)
        assert torch.equal(other(x), inner(x))
    twin = copy.deepcopy(inner)
    with torch.no_grad():
        twin.first.weight.zero_()
    assert not torch.equal(twin(x), inner(x))


class OwnState(Net):
    def __getstate__(self):
        return self.__dict__.copy()


def test_copies_of_a_class_with_its_own_getstate_use_their_own_parameters(rank, session):
    inner = Setup(rank, OwnState()).ddp.module
    x = torch.randn(2, 4)
    for twin in (copy.deepcopy(inner), pickle.loads(pickle.dumps(inner))):
        assert torch.equal(twin(x), inner(x))
        with torch.no_grad():
            twin.second.bias.add_(1)
        assert not torch.equal(twin(x), inner(x))


def facts(model, x):
    """Return what a user can see of a model."""
    traced: Any = torch.jit.trace(model, x)
    return {
        "state": list(model.state_dict()),
        "modules": [name for name, _ in model.named_modules()],
        "hooks": [
            (name, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for name, m in model.named_modules()
        ],
        "signature": str(inspect.signature(model.forward)),
        "outputs": model(x).tolist(),
        "fx": torch.fx.symbolic_trace(model).code,
        "traced": traced(x).tolist(),
        "exported": [
            node.target for node in torch.export.export(model, (x,)).graph.nodes if node.op == "call_function"
        ],
    }


@pytest.mark.ranks(2, timeout=240)
def test_a_watched_model_looks_and_computes_as_before(rank, session):
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    setup = Setup(rank)
    bare = copy.deepcopy(setup.ddp.module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jit.trace is deprecated, and says so
        assert [str(target) for target in facts(setup.ddp.module, x)] == [str(t) for t in facts(bare, x)]
        assert str(facts(setup.ddp.module, x)) == str(facts(bare, x))


def test_everything_is_undone(rank, tmp_path):
    net = Net()
    before = [dict(vars(module)) for module in net.modules()]

    def fail_in_the_middle():
        with ddpcall.watch(on_finding="record", json=tmp_path / f"{rank.rank}.json", every=0):
            setup = Setup(rank, net)
            setup.step(setup.ddp(setup.batch()).mean())
            raise KeyError("the script's own")

    with pytest.raises(KeyError, match="the script's own"):
        fail_in_the_middle()
    after = [dict(vars(module)) for module in net.modules()]
    assert [sorted(names) for names in after] == [sorted(names) for names in before]
    assert all(parameter._post_accumulate_grad_hooks is None for parameter in net.parameters())


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("wrap_first", [True, False])
def test_compiled_frames_and_graphs_are_as_without_the_watch(rank, tmp_path, wrap_first):
    from torch._dynamo.testing import CompileCounter

    def frames():
        torch._dynamo.reset()
        counter = CompileCounter()
        net = Net()
        if wrap_first:
            ddp = DistributedDataParallel(net)
            compiled = torch.compile(net, backend=counter, fullgraph=True)
            del ddp
        else:
            compiled = torch.compile(net, backend=counter, fullgraph=True)
        for _ in range(3):
            compiled(torch.randn(2, 4)).mean().backward()
        return counter.frame_count, counter.op_count

    bare = frames()
    with ddpcall.watch(on_finding="record", json=tmp_path / f"{rank.rank}.json", every=0):
        watched = frames()
    assert watched == bare
    assert bare[0] == 1


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("takes_gradients", [False, True])
@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::DeprecationWarning:torch")  # dynamo's own doing
def test_nothing_of_the_watchs_own_is_compiled_in_a_compiled_step(rank, tmp_path, monkeypatch, takes_gradients):
    # What runs eagerly between the graphs of a compiled step, backward and optimizer, comes before dynamo as well.
    from torch._dynamo import convert_frame

    compile_frame = convert_frame._compile
    compiled: list[str] = []

    def noting(code, *args, **kwargs):
        compiled.append(f"{Path(code.co_filename).name}:{code.co_name}")
        return compile_frame(code, *args, **kwargs)

    def compile_step() -> list[str]:
        torch._dynamo.reset()
        ddp = DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)))
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)

        @torch.compile(backend="eager")
        def step(batch):
            if takes_gradients:
                return torch.autograd.grad(ddp(batch).sum(), list(ddp.parameters()))
            ddp(batch).sum().backward()
            return optimizer.step()

        compiled.clear()
        for _ in range(3):
            step(torch.randn(2, 4))
        return list(compiled)

    monkeypatch.setattr(convert_frame, "_compile", noting)
    compile_step()  # what is compiled once in a process is compiled now
    bare = Counter(compile_step())
    with ddpcall.watch(on_finding="record", json=tmp_path / f"{rank.rank}.json", every=0):
        watched = Counter(compile_step())
    assert sum(bare.values()) > 3
    assert watched - bare == Counter()


def scripted_both_ways(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and says so
        return torch.jit.script(model)


@pytest.mark.ranks(2, timeout=240)
def test_a_watched_model_can_be_scripted_and_the_script_is_the_same(rank, session):
    setup = Setup(rank)
    bare = scripted_both_ways(copy.deepcopy(setup.ddp.module))
    watched = scripted_both_ways(setup.ddp.module)
    x = setup.batch()
    assert watched.code == bare.code
    assert torch.equal(watched(x), setup.ddp.module(x))
    setup.step(setup.ddp.module(x).mean())
    assert [finding.code for finding in session.findings] == ["DC101"], "the original is watched still"


def test_checkpoints_look_and_load_as_without_the_watch(rank, session):
    setup = Setup(rank)
    state = setup.ddp.state_dict()
    assert list(state) == [f"module.{name}" for name in Net().state_dict()]
    stream = io.BytesIO()
    torch.save({"model": state, "optimizer": setup.optimizer.state_dict(), "net": setup.ddp.module}, stream)
    assert b"ddpcall" not in stream.getvalue()
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    assert setup.ddp.load_state_dict(loaded["model"]).missing_keys == []
    assert set(vars(loaded["net"])) == set(vars(Net()))


def test_an_averaged_model_averages_and_uses_its_own_parameters(rank, session):
    setup = Setup(rank)
    averaged = torch.optim.swa_utils.AveragedModel(setup.ddp.module)
    x = setup.batch()
    for _ in range(3):
        setup.step(setup.ddp(setup.batch()).square().mean())
        averaged.update_parameters(setup.ddp.module)
    assert torch.equal(averaged(x), torch.func.functional_call(Net(), dict(averaged.module.named_parameters()), x))
    assert not torch.equal(averaged(x), setup.ddp.module(x))
    assert session.findings == []
