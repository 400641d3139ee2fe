"""Design rule: torch's private names stand in one room, and the installed torch has those that it should."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from ddpcall import torch_internals as internals

SOURCE = Path(__file__).parents[2] / "src" / "ddpcall"
PRIVATE_PATH = re.compile(r"torch(\.\w+)*\._(?!_)\w+(\.\w+)*")
ENTRIES = internals.list_entries()
REGISTERED = {entry.name for entry in ENTRIES if entry.name.startswith("_")}
OF_OTHERS = {
    *("_exit", "_getframe", "_current_frames", "_run_module_as_main", "_args_from_interpreter_flags"),  # Python
    *("_setupstate", "_prepareconfig", "_do_configure", "_tmp_path_factory"),  # pytest
    *("_reset_state", "_models"),  # accelerate
    "_get_rerun_filter_regex",  # rerunfailures
    "_target_",  # Hydra
}
EXCEPTED = {
    "torch_internals.py": "the room itself",
    "teach/exercises": "scripts as users write them",
    "ranks/interpreters.py": "names a module to import, in a process that must not import torch itself",
}


def find_private(tree: ast.Module) -> Iterator[str]:
    """Yield the private names of torch that a file imports, reads as attributes or names in strings."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    own |= {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("self", "cls")
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if PRIVATE_PATH.fullmatch(alias.name))
        elif isinstance(node, ast.ImportFrom):
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (path for path in paths if PRIVATE_PATH.fullmatch(path))
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            if node.attr not in OF_OTHERS and (node.attr in REGISTERED - own or node.attr not in own):
                yield ast.unparse(node)
        elif isinstance(node, ast.Constant) and _names_private(node.value):
            yield repr(node.value)


def _names_private(value: object) -> bool:
    return isinstance(value, str) and (value in REGISTERED or bool(PRIVATE_PATH.fullmatch(value)))


def is_excepted(path: Path) -> bool:
    return any(path.is_relative_to(SOURCE / place) for place in EXCEPTED)


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_private_names_of_torch_stand_in_one_room(path):
    found = [] if is_excepted(path) else list(find_private(ast.parse(path.read_text())))
    assert found == [], "give them an entry in torch_internals.py"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from torch.nn.modules.batchnorm import _NormBase", ["torch.nn.modules.batchnorm._NormBase"]),
        ("import torch._dynamo.config as config", ["torch._dynamo.config"]),
        ("from torch.distributed._composable.replicate import replicate", None),
        ("torch._C._current_graph_task_id()", ["torch._C._current_graph_task_id", "torch._C"]),
        ("parameter.grad._version", ["parameter.grad._version"]),
        ("getattr(module, '_forward_pre_hooks')", ["'_forward_pre_hooks'"]),
        ("sys.modules['torch._dynamo.eval_frame']", ["'torch._dynamo.eval_frame'"]),
        ("import torch.distributed as dist\ndist.get_rank()\ntorch.__version__", []),
        ("class A:\n    def use(self, other):\n        self._mine = other._mine", []),
        ("os._exit(1)", []),
        ("'torch and _mine'", []),
    ],
)
def test_the_rule_sees_private_names_and_nothing_else(code, found):
    names = list(find_private(ast.parse(code)))
    assert names == found if found is not None else names


def test_every_exception_to_the_rule_is_needed():
    for place in EXCEPTED:
        paths = [SOURCE / place] if place.endswith(".py") else list((SOURCE / place).glob("*.py"))
        if place != "teach/exercises":  # none does today, and a user's script may
            assert any(list(find_private(ast.parse(path.read_text()))) for path in paths), place


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch.distributed.optim scripts at its import
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.path)
def test_the_installed_torch_has_every_name_that_it_should(entry):
    if not entry.is_expected():
        assert entry.is_missing()
        pytest.skip(f"{entry.path} is seen in {entry.seen}, not in {torch.__version__}")
    entry.owner()
    assert not entry.is_missing(), entry.sentence()
    assert entry.purpose.startswith("to ")
    assert entry.without
    assert set(entry.rooms) <= {"watch", "lab", "ranks", "compare"}


def test_a_method_that_somebody_patched_still_sets_its_attributes(monkeypatch):
    init = DistributedDataParallel.__init__
    monkeypatch.setattr(DistributedDataParallel, "__init__", functools.wraps(init)(lambda *_: None))
    assert not internals.MODULE_PARAMETERS.is_missing()
    assert not internals.IGNORED_BY_DDP.is_missing()


def test_no_name_is_listed_twice():
    assert len({entry.path for entry in ENTRIES}) == len(ENTRIES)


@pytest.mark.parametrize(
    "path",
    [
        "torch._gone",
        "torch.nn.modules.module.Module._gone",
        "torch.distributed._gone.function",
        "torch._C._gone",
        "torch.autograd.graph._gone",
    ],
)
def test_a_missing_name_is_told_by_a_sentence(path):
    entry = internals.Private(path, "to test", "nothing is tested")
    assert entry.is_missing()
    assert entry.get("default") == "default"
    assert entry.if_imported() is None
    with pytest.raises(internals.TorchNameMissing, match=f"{re.escape(torch.__version__)} has no {path}: nothing"):
        entry.get()
    with pytest.raises(internals.TorchNameMissing, match="nothing is tested"):
        internals.require(internals.CALLS["_call_impl"], entry)


def test_what_torch_imports_lazily_is_not_missing_and_not_imported_to_find_out():
    code = """
import sys
from ddpcall import torch_internals as internals
assert not internals.SKIP_CODE.is_missing()
assert internals.SKIP_CODE.if_imported() is None
assert "torch._dynamo" not in sys.modules
assert internals.SKIP_CODE.get() is sys.modules["torch._dynamo.eval_frame"].skip_code
assert internals.SKIP_CODE.if_imported() is not None
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_that_is_gone_is_listed_for_its_room(monkeypatch):
    assert internals.list_missing("watch") == []
    monkeypatch.delattr(torch.autograd.graph, "_engine_run_backward")
    assert internals.list_missing("lab") == []
    assert internals.list_missing("watch") == [internals.ENGINE_RUN_BACKWARD]
