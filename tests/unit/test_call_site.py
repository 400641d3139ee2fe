"""Which line is named: code is compiled under the paths it would have, and its real stack is looked at."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import ddpcall
from ddpcall.taps import CallSite, find_call_site

PACKAGES = "/opt/env/lib/python3.11/site-packages/"
DEBIAN = "/usr/lib/python3/dist-packages/"
PROJECT = "/home/me/project/"
OURS = Path(ddpcall.__file__).parent


def run_as(file: str, source: str, **names: Any) -> dict[str, Any]:
    """Run source as if it stood in a file; returns its namespace."""
    module = file.removeprefix(PACKAGES).removeprefix(DEBIAN).removesuffix(".py").replace("/", ".")
    namespace: dict[str, Any] = {"__name__": module, **names}
    exec(compile(source, file, "exec"), namespace)
    return namespace


class Sites:
    """Holds what `look` finds when code calls it; the model's inside are the modules of `model`."""

    def __init__(self) -> None:
        self.model: nn.Module = nn.Identity()
        self.found: list[CallSite] = []
        source = "def look():\n    found.append(find_call_site(is_inside))\n"
        names = {"found": self.found, "find_call_site": find_call_site, "is_inside": self.is_inside}
        self.look: Callable[[], None] = run_as(str(OURS / "look.py"), source, **names)["look"]

    def is_inside(self, candidate: Any) -> bool:
        return any(candidate is module for module in self.model.modules())

    @property
    def place(self) -> tuple[str, int, str]:
        (site,) = self.found
        return site.file.removeprefix(PACKAGES).removeprefix(PROJECT), site.line, site.function

    @property
    def caller(self) -> tuple[str, int, str] | None:
        (site,) = self.found
        caller = site.called_from
        return None if caller is None else (caller.file.removeprefix(PROJECT), caller.line, caller.function)


def test_a_users_line_is_named_alone():
    sites = Sites()
    run_as(PROJECT + "train.py", "def step():\n    look()\nstep()\n", look=sites.look)
    assert (sites.place, sites.caller) == (("train.py", 2, "step"), None)


def test_a_librarys_line_is_named_with_the_users_line_that_led_to_it():
    for directory in (PACKAGES, DEBIAN):
        sites = Sites()
        library = run_as(directory + "other/fit.py", "def fit(loss):\n    return loss()\n")
        trainer = run_as(directory + "foo/loop.py", "def train():\n    fit(look)\n", look=sites.look, **library)
        run_as(PROJECT + "train.py", "def main():\n\n    train()\nmain()\n", train=trainer["train"])
        (site,) = sites.found
        assert (site.file, site.line, site.function) == (directory + "other/fit.py", 2, "fit")
        assert sites.caller == ("train.py", 3, "main")


def test_an_editable_install_and_a_src_layout_are_the_users_own():
    sites = Sites()
    run_as(PROJECT + "src/mine/loop.py", "def train():\n    look()\ntrain()\n", look=sites.look)
    assert (sites.place, sites.caller) == (("src/mine/loop.py", 2, "train"), None)


def test_sites_that_differ_in_their_callers_alone_are_the_same():
    caller = CallSite("train.py", 3, "main")
    with_caller, without = CallSite("lib.py", 1, "f", caller), CallSite("lib.py", 1, "f")
    assert with_caller == without
    assert len({with_caller, without}) == 1


MODEL = """
class Net(Base):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(2, 2)
    def compute_loss(self, x):
        return self.inner(x)
    def inner(self, x):
        look()
        return x
    def on_batch_end(self, x):
        self.helper(x)
    def on_other_end(self, x):
        free(self)
    def helper(self, x):
        look()
def free(net):
    look()
"""
CALL = "def call(hook, *args):\n    return hook(*args)\n"


def make_model(sites: Sites, base: type[nn.Module]) -> Any:
    names = run_as(PROJECT + "model.py", MODEL, Base=base, nn=nn, look=sites.look)
    sites.model = names["Net"]()
    return sites.model


def make_base(file: str) -> type[nn.Module]:
    """A library's own kind of module, as LightningModule is Lightning's."""
    return run_as(PACKAGES + file, "class TrainedModule(Module):\n    pass\n", Module=nn.Module)["TrainedModule"]


def test_a_model_is_entered_where_its_outermost_method_is_called():
    sites = Sites()
    model = make_model(sites, nn.Module)
    run_as(PROJECT + "train.py", "\nloss = model.compute_loss(1)\n", model=model)
    assert (sites.place, sites.caller) == (("train.py", 2, "<module>"), None)


def test_a_library_that_calls_a_plain_model_is_the_one_that_entered_it():
    sites = Sites()
    model = make_model(sites, nn.Module)
    library = run_as(PACKAGES + "foo/loop.py", CALL)
    run_as(PROJECT + "train.py", "\ncall(model.compute_loss, 1)\n", model=model, **library)
    assert (sites.place, sites.caller) == (("foo/loop.py", 2, "call"), ("train.py", 2, "<module>"))


def test_where_the_model_is_the_trainers_object_the_users_method_is_the_line():
    for package in ("foo", "lightning/pytorch", "pytorch_lightning"):
        sites = Sites()
        model = make_model(sites, make_base(package + "/core/module.py"))
        library = run_as(PACKAGES + package + "/trainer/call.py", CALL)
        run_as(PROJECT + "train.py", "call(model.on_batch_end, 1)\n", model=model, **library)
        assert (sites.place, sites.caller) == (("model.py", 16, "helper"), ("model.py", 12, "on_batch_end"))


def test_a_free_function_below_a_trainers_hook_is_the_users_line_too():
    sites = Sites()
    model = make_model(sites, make_base("foo/core/module.py"))
    library = run_as(PACKAGES + "foo/trainer/call.py", CALL)
    run_as(PROJECT + "train.py", "call(model.on_other_end, 1)\n", model=model, **library)
    assert (sites.place, sites.caller) == (("model.py", 18, "free"), ("model.py", 14, "on_other_end"))


def test_a_script_that_calls_the_trainers_object_itself_is_the_line():
    for passing_on in ("accelerate/utils.py", "lightning/fabric/wrappers.py"):
        sites = Sites()
        model = make_model(sites, make_base("lightning/pytorch/core/module.py"))
        library = run_as(PACKAGES + passing_on, CALL)
        run_as(PROJECT + "train.py", "\n\ncall(model.on_batch_end, 1)\n", model=model, **library)
        assert (sites.place, sites.caller) == (("train.py", 3, "<module>"), None)


def test_another_librarys_trainer_is_not_the_models_own():
    sites = Sites()
    model = make_model(sites, make_base("foo/core/module.py"))
    library = run_as(PACKAGES + "bar/trainer.py", CALL)
    run_as(PROJECT + "train.py", "call(model.on_batch_end, 1)\n", model=model, **library)
    assert sites.place == ("bar/trainer.py", 2, "call")


def test_torch_between_the_users_line_and_the_model_is_passed_over():
    sites = Sites()
    model = make_model(sites, nn.Module)
    source = "\ncheckpoint(model.compute_loss, x, use_reentrant=False)\n"
    run_as(PROJECT + "train.py", source, model=model, checkpoint=checkpoint, x=torch.ones(1))
    assert (sites.place, sites.caller) == (("train.py", 2, "<module>"), None)
