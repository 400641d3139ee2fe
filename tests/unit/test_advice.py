"""What to write instead of a line: right where it is given, and not given where the line does not tell."""

import sys
import textwrap

import pytest
from torch import nn

from ddpcall.watch.advice import IN_A_HOOK, Advice, Names, Role, advise, hands_over, read_names

WRAPPER, INNER, PART = Role


@pytest.fixture
def write(tmp_path):
    def write(source: str, line: int, roles: dict[str, Role], function: str = "<module>", **names) -> Names:
        file = tmp_path / f"train{len(list(tmp_path.iterdir()))}.py"
        file.write_text(textwrap.dedent(source).lstrip("\n"))
        return Names(tuple(roles.items()), frozenset({"enc", "head"}), str(file), line, function, **names)

    return write


@pytest.mark.parametrize(
    ("line", "roles", "fix", "called"),
    [
        ("loss = ddp.module(x)", {"ddp": WRAPPER}, "`loss = ddp(x)`.", "ddp.module"),
        ("loss = ddp.module.forward(x, y)", {"ddp": WRAPPER}, "`loss = ddp(x, y)`.", "ddp.module.forward"),
        ("loss = self.model.module(x)", {"self.model": WRAPPER}, "`loss = self.model(x)`.", "self.model.module"),
        ("return crit(ddp.module(x), y)", {"ddp": WRAPPER}, "`return crit(ddp(x), y)`.", "ddp.module"),
        ("ddp.module(x).sum().backward()", {"ddp": WRAPPER}, "`ddp(x).sum().backward()`.", "ddp.module"),
        ("loss = model(x)", {"model": WRAPPER, "m": INNER}, "", ""),
        ("x: Any = ddp.module(**batch)", {"ddp": WRAPPER}, "`x: Any = ddp(**batch)`.", "ddp.module"),
        (
            "loss = ddp.module.training_loss(x, y)",
            {"ddp": WRAPPER},
            "`loss = ddp(x, y)`, and let `forward` dispatch to `training_loss`.",
            "ddp.module.training_loss",
        ),
        (
            "loss = accelerator.unwrap_model(model)(x)",
            {"model": WRAPPER},
            "`loss = model(x)`.",
            "accelerator.unwrap_model(model)",
        ),
        (
            "p = self.accelerator.unwrap_model(self.policy).logprobs(ids)",
            {"self.policy": WRAPPER},
            "`p = self.policy(ids)`, and let `forward` dispatch to `logprobs`.",
            "self.accelerator.unwrap_model(self.policy).logprobs",
        ),
        (
            "loss = policy(x)",
            {"model": WRAPPER, "policy": INNER},
            "`loss = model(x)` (`policy` is the module inside `model`).",
            "policy",
        ),
        ("y = Net.forward(ddp.module, x)", {"ddp": WRAPPER}, "`y = ddp(x)`.", "Net.forward"),
        ("y = type(m).forward(m, x)", {"m": INNER}, "", "type(m).forward"),
        ("loss = self.net(x)", {"self.net": INNER, "self.ddp": WRAPPER}, "`loss = self.ddp(x)`.", "self.net"),
        ("loss = ddp.module._orig_mod(x)", {"ddp": WRAPPER}, "`loss = ddp(x)`.", "ddp.module._orig_mod"),
        (
            "loss = compiled._orig_mod.module(x)",
            {"compiled": WRAPPER},
            "`loss = compiled(x)`.",
            "compiled._orig_mod.module",
        ),
        (
            "loss = ddp.compute_loss(x)",
            {"ddp": WRAPPER},
            "`loss = ddp(x)`, and let `forward` dispatch to `compute_loss`.",
            "ddp.compute_loss",
        ),
        (
            "h = ddp.module.enc(x)",
            {"ddp": WRAPPER},
            "Let `forward` do what this line does with `ddp.module.enc`, and call the wrapper: `ddp(...)`.",
            "ddp.module.enc",
        ),
        (
            "y = m.head(m.enc.block(x))",
            {"ddp": WRAPPER, "m": INNER},
            "Let `forward` do what this line does with `m.head` and `m.enc.block`, and call the wrapper: "
            "`ddp(...)`.",
            "",
        ),
        (
            "x = layer(x)",
            {"layer": PART, "ddp": WRAPPER},
            "Let `forward` do what this line does with `layer`, and call the wrapper: `ddp(...)`.",
            "layer",
        ),
        (
            "for out in ddp.module.stream(x):",
            {"ddp": WRAPPER},
            "`ddp(x)`, and let `forward` dispatch to `stream`.",
            None,
        ),
    ],
)
def test_the_line_is_written_anew_with_the_scripts_own_names(write, line, roles, fix, called):
    body = "\n    y = ddp.module(1)\n" if line.endswith(":") else "\n"
    advice = advise(write(f"\n{line}{body}", 1, roles))
    assert advice.fix == fix
    if called is not None:
        assert advice.called == called


def test_a_long_statement_gives_the_call_alone_and_a_long_call_the_wrapper(write):
    many = ", ".join(f"argument_number_{n}" for n in range(8))
    first = advise(
        write(f"result_with_a_name_of_some_length = compute_something(ddp.module(x), {many})", 1, {"ddp": WRAPPER})
    )
    second = advise(write(f"y = ddp.module({many})", 1, {"ddp": WRAPPER}))
    assert (first.fix, second.fix) == ("`ddp(x)`.", "`y = ddp(...)`.")


def test_a_line_within_a_long_statement_and_a_nested_block_is_found(write):
    source = """
        def main():
            with context():
                if ready:
                    loss = criterion(
                        ddp.module(x),
                        y,
                    )
    """
    assert advise(write(source, 5, {"ddp": WRAPPER}, "main")).fix == "`loss = criterion(ddp(x), y)`."


@pytest.mark.parametrize(
    "line",
    [
        "loss = ddp.module.a(x) + ddp.module.b(y)",  # which of the two?
        "loss = ddp(x) + ddp.module.penalty()",  # the wrapper is called beside it
        "loss = fn(x)",  # a bound method kept earlier
        "loss = functional_call(ddp.module, state, x)",
        "loss = getattr(ddp.module, name)(x)",
        "ddp.module.train()",
        "y = ddp.module.enc(ddp.module(x))",
        "not python",
    ],
)
def test_where_the_line_does_not_tell_only_the_wrappers_name_is_given(write, line):
    assert advise(write(line, 1, {"ddp": WRAPPER})) == Advice(wrapper="ddp")


def test_without_a_source_there_is_no_advice():
    assert advise(Names((("ddp", WRAPPER),), frozenset(), "/no/such/file.py", 3, "f")) == Advice(wrapper="ddp")
    assert advise(Names()) == Advice()


def test_the_line_that_took_the_module_out_is_named_where_the_wrapper_has_no_name_any_more(write):
    source = """
        unet = accelerator.prepare(unet)
        unet = accelerator.unwrap_model(unet)
        loss = unet(x)
    """
    advice = advise(write(source, 3, {"unet": INNER}))
    assert advice.fix == "Line 2 takes the module out of its wrapper: keep the wrapper, and call that here."
    assert (advice.called, advice.wrapper) == ("unet", "")


def test_an_attribute_that_took_the_module_out_is_found_in_another_method(write):
    source = """
        class Trainer:
            def __init__(self, model):
                self.raw = model.module
            def step(self, x):
                return self.raw.loss(x)
    """
    fix = advise(write(source, 5, {"self.raw": INNER}, "step")).fix
    assert fix.startswith("Line 3 takes the module out of its wrapper")
    assert fix.endswith("call that here, and let `forward` dispatch to `loss`.")


@pytest.mark.parametrize(
    "others", ["def other(model):\n    net = model.module\n", "net = a.module\nnet = b.module\n"]
)
def test_another_functions_line_or_one_of_several_is_not_named(write, others):
    number = others.count("\n") + 2
    assert advise(write(others + "def f(net):\n    return net(x)\n", number, {"net": INNER}, "f")).fix == ""


def test_a_module_that_a_caller_handed_over_is_handed_over_as_the_wrapper(write):
    inner = write("def run(model, x):\n    return model(x)\n", 2, {"model": INNER}, "run")
    outer = write("def main():\n    run(ddp.module, x)\n", 2, {"ddp": WRAPPER}, "main")
    fix = advise(Names(inner.roles, inner.children, inner.file, 2, "run", outer)).fix
    assert fix == f"Hand over the wrapper in {outer.file.rpartition('/')[2]}:2 in main: `run(ddp, x)`."


@pytest.mark.parametrize(
    ("line", "roles", "fix", "called"),
    [
        ("y = super().loss(base, x)", {"model": WRAPPER, "base": INNER}, "`super().loss(model, x)`.", "base"),
        ("fit(1, net=ddp.module)", {"ddp": WRAPPER}, "`fit(1, net=ddp)`.", "ddp.module"),
        ("fit(unwrap_model(ddp))", {"ddp": WRAPPER}, "`fit(ddp)`.", "unwrap_model(ddp)"),
        ("fit(net)", {"net": INNER}, "", "net"),
    ],
)
def test_a_line_that_hands_the_module_to_a_library_hands_over_the_wrapper_instead(write, line, roles, fix, called):
    names = write(line, 1, roles, is_caller=True)
    assert hands_over(names)
    assert (advise(names).fix, advise(names).called, advise(names).is_handed_over) == (fix, called, True)


@pytest.mark.parametrize(
    "line",
    [
        "train(ddp, ddp.module)",  # both are handed over
        "train(ddp.module, teacher=ddp.module)",
        "trainer.train(batches)",
        "fit(make(ddp))",  # who knows what it makes
        "fit(ddp)",
    ],
)
def test_a_line_that_may_be_right_hands_nothing_over(write, line):
    names = write(line, 1, {"ddp": WRAPPER}, is_caller=True)
    assert not hands_over(names)
    assert not advise(names).is_handed_over


def test_a_caller_that_does_not_hand_the_module_over_only_gives_the_wrappers_name(write):
    inner = write("def run(self, x):\n    return self.net.loss(x)\n", 2, {"self.net": INNER}, "run")
    outer = write("def main():\n    trainer.run(loader)\n", 2, {"ddp": WRAPPER}, "main")
    fix = advise(Names(inner.roles, inner.children, inner.file, 2, "run", outer)).fix
    assert fix.startswith("Call the wrapper in place of `self.net`: ")
    assert fix.endswith(":2 in main has it as `ddp`, and let `forward` dispatch to `loss`.")


def test_in_a_hook_of_the_models_own_the_trainers_method_is_the_place(write):
    assert advise(write("self.net(x).backward()", 1, {"self": INNER, "self.net": PART})) == Advice(IN_A_HOOK)


# ---- names


class Holder(nn.Module):
    """Stands for a wrapper: a module with the model as its child."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Trainer:
    def __init__(self, wrapper, net) -> None:
        self.ddp, self.net, self.count = wrapper, net, 3

    def step(self, wrapper, net):
        return read_names(sys._getframe(), wrapper, net)


def as_dict(names: Names) -> dict[str, Role]:
    return dict(names.roles)


def test_names_are_read_from_locals_and_what_they_hold():
    net = nn.Sequential(nn.Linear(1, 1))
    ddp = Holder(net)
    layer, other = net[0], nn.Linear(1, 1)
    names = read_names(sys._getframe(), ddp, net)
    assert as_dict(names) == {"net": INNER, "ddp": WRAPPER, "layer": PART}
    assert (names.wrapper, names.children, names.outer) == ("ddp", {"0"}, None)
    assert (names.file, names.function) == (__file__, "test_names_are_read_from_locals_and_what_they_hold")
    del layer, other


def test_a_trainers_attributes_are_names_and_the_arguments_are_not_asked_for_more():
    net = nn.Linear(1, 1)
    trainer = Trainer(Holder(net), net)
    names = trainer.step(trainer.ddp, net)
    assert as_dict(names) == {"wrapper": WRAPPER, "net": INNER, "self.ddp": WRAPPER, "self.net": INNER}


def test_globals_are_names(monkeypatch):
    net = nn.Linear(1, 1)
    monkeypatch.setitem(globals(), "the_wrapper", Holder(net))
    names = read_names(sys._getframe(), globals()["the_wrapper"], net)
    assert names.wrapper == "the_wrapper"


def run_inner(model, find):
    return find(sys._getframe())


def test_a_wrapper_that_only_a_caller_knows_is_read_there():
    net = nn.Linear(1, 1)
    ddp = Holder(net)
    names = run_inner(net, lambda frame: read_names(frame, ddp, net))
    assert as_dict(names) == {"model": INNER}
    assert names.outer is not None
    assert (names.wrapper, names.outer.wrapper) == ("", "ddp")
    assert names.outer.function == "test_a_wrapper_that_only_a_caller_knows_is_read_there"


def test_what_compiles_the_wrapper_is_the_wrapper_and_a_module_of_the_scripts_own_is_not():
    net = nn.Linear(1, 1)
    ddp = Holder(net)
    around = nn.Sequential(ddp)  # as torch's OptimizedModule
    mine = Holder(ddp)
    names = read_names(sys._getframe(), ddp, net)
    assert as_dict(names) == {"net": INNER, "ddp": WRAPPER, "around": WRAPPER, "mine.module": WRAPPER}
    del around, mine


def test_a_module_that_is_called_itself_is_its_own_wrapper_and_one_that_is_gone_has_no_name():
    net = nn.Linear(1, 1)
    assert as_dict(read_names(sys._getframe(), net, net)) == {"net": WRAPPER}
    assert as_dict(read_names(sys._getframe(), None, net)) == {"net": INNER}
