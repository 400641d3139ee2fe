"""Design rule: a room imports only what lies below it, and `import ddpcall` does no work."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "ddpcall"
INTERNALS = {"torch_internals"}
LEAVES = {
    "paths",
    "reductions",
    "wrappers",
    "shards",
    "evidence",
    "findings",
    "imports",
    "taps",
    "ranks",
    "torch_version",
    "targets",
    "files",
    "launch_environment",
    "accelerator",
} | INTERNALS
ENVIRONMENT = {"launch_environment"}
MIDDLE = LEAVES | {"verdicts", "replicas", "sketch", "mixing", "probes", "compare"}
MAY_IMPORT = {
    "paths": set(),
    "evidence": set(),
    "files": set(),
    "launch_environment": set(),
    "accelerator": set(),
    "findings": set(),
    "imports": set(),
    "private_name": set(),
    "torch_version": set(),
    "targets": set(),
    "torch_internals": {"private_name"},
    "taps": INTERNALS,
    "ranks": INTERNALS | {"ranks", "accelerator"} | ENVIRONMENT,
    "reductions": INTERNALS,
    "wrappers": INTERNALS | {"paths", "reductions", "accelerator"},
    "shards": INTERNALS | {"wrappers"},
    "verdicts": LEAVES,
    "replicas": LEAVES,
    "sketch": INTERNALS | {"replicas"},
    "mixing": INTERNALS | ENVIRONMENT | {"taps", "replicas", "sketch"},
    "compare": INTERNALS
    | ENVIRONMENT
    | {"accelerator", "files", "imports", "taps", "targets", "replicas", "sketch", "mixing"},
    "probes": MIDDLE,
    "lab": MIDDLE | {"lab", "watch"},
    "watch": MIDDLE | {"watch"},
    "teach": MIDDLE | {"lab", "watch", "teach", "ddpcall"},
    "asserts": MIDDLE,
    "pytest_plugin": MIDDLE | {"asserts"},
    "cli": MIDDLE | {"lab", "watch", "teach", "ddpcall"},
    "__main__": {"cli"},
    "__init__": {"compare", "mixing", "watch"},  # for type checkers; another test says that nothing is imported
}
ONLY_IN_LAB = {"hydra", "omegaconf", "sklearn", "jinja2", "markupsafe", "yaml"}
# Claims are experiments that a learner reads and copies, so they spell out what `paths` and `wrappers` are for.
# Exercises are scripts as users write them; they are handed out, never imported.
MAY_SPELL_FORWARD = {"paths.py", "teach/claims", "teach/exercises"}
# taps, watch and the course's witness look at what users have wrapped; compare wraps in DDP by default.
MAY_WRAP = {
    "wrappers.py",
    "torch_internals.py",
    "teach/exercises",
    "teach/grade/observe.py",
    "taps",
    "compare/same.py",
    "watch",
}
WATCH = SOURCE / "watch"
RECORD = {"run", "models", "step_count", "findings_book", "advice"}
WATCH_MAY_IMPORT = {
    "output": {"output"},
    "program": {"program", "session", "options", "launch", "output"},
    "sensors": {"sensors", "output"} | RECORD,
    "rules": {"rules", "sensors"} | RECORD,
    "compare": {"compare", "rules", "sensors"} | RECORD,
}
# A sensor that begins a watch, and one name that a rule reads.
MAY_REACH_FURTHER = {
    "sensors/group_hook.py": "program",
    "rules/replicas.py": "compare",
}
PATCHES = {
    "hear_calls",
    "replace_attribute",
    "ForwardTap",
    "register_optimizer_step_pre_hook",
    "register_optimizer_step_post_hook",
}
WRAPPING = ("torch.nn.parallel", "torch.distributed._composable", "torch.distributed.fsdp")


def find_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {
                f"{node.module}.{alias.name}" if node.module == "ddpcall" else node.module for alias in node.names
            }
    return found


def room_of(path: Path) -> str:
    name = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    return "pytest_plugin" if name.startswith("pytest_plugin") else name


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_room_imports_only_rooms_below_it(path):
    imported = find_imports(path)
    rooms = {name.split(".")[1] for name in imported if name.startswith("ddpcall.")} - {"__version__"}
    rooms = {"pytest_plugin" if room.startswith("pytest_plugin") else room for room in rooms}
    assert rooms <= MAY_IMPORT[room_of(path)] | ({room_of(path)} if path.parent != SOURCE else set())
    if room_of(path) != "lab":
        assert not {name.split(".")[0] for name in imported} & ONLY_IN_LAB


def is_under(path: Path, places: set[str]) -> bool:
    return any(path.is_relative_to(SOURCE / place) for place in places)


def spells_forward(path: Path) -> bool:
    """Say whether a file calls an object's forward; through `super()` or `type(self)` a class extends its own."""
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    found = [func for func in calls if isinstance(func, ast.Attribute) and func.attr == "forward"]
    return any(ast.unparse(func.value) not in ("super()", "type(self)") for func in found)


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_only_paths_and_claims_spell_forward_and_only_wrappers_and_claims_wrap(path):
    assert is_under(path, MAY_SPELL_FORWARD) or not spells_forward(path)
    assert is_under(path, MAY_WRAP) or not any(name.startswith(WRAPPING) for name in find_imports(path))


def find_watch_imports(path: Path) -> set[str]:
    return {
        name.removeprefix("ddpcall.watch.") for name in find_imports(path) if name.startswith("ddpcall.watch.")
    }


@pytest.mark.parametrize("path", sorted(WATCH.glob("*/*.py")), ids=lambda path: str(path.relative_to(WATCH)))
def test_a_room_of_the_watch_imports_only_what_lies_below_it(path):
    rooms = {name.split(".")[0] for name in find_watch_imports(path)}
    allowed = WATCH_MAY_IMPORT[path.parent.name] | {MAY_REACH_FURTHER.get(str(path.relative_to(WATCH)), "")}
    assert rooms <= allowed


@pytest.mark.parametrize("room", ["watch", "lab"])
def test_the_files_of_a_room_import_each_other_in_no_circle(room):
    files = {
        str(path.relative_to(SOURCE)).removesuffix(".py").replace("/", "."): path
        for path in (SOURCE / room).rglob("*.py")
    }
    imports = {name: find_imports_at_start(path) & files.keys() for name, path in files.items()}
    while leaves := [name for name, below in imports.items() if not below]:
        imports = {name: below - set(leaves) for name, below in imports.items() if name not in leaves}
    assert not imports


def find_imports_at_start(path: Path) -> set[str]:
    """Return what the module imports as it is imported itself: not in functions, not for type checkers."""
    found = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom) and node.module]
    return {str(node.module).removeprefix("ddpcall.") for node in found}


def uses_patches(path: Path) -> bool:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    called = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return bool(names & PATCHES) or any(re.fullmatch(r"register_\w*hook", name) for name in called)


def test_only_sensors_of_the_watch_patch_torch_and_only_its_program_patches_what_starts_ranks():
    patching = {path.relative_to(WATCH) for path in WATCH.rglob("*.py") if uses_patches(path)}
    assert {path.parent.name for path in patching} == {"sensors", "program"}
    assert {str(path) for path in patching if path.parent.name == "program"} == {"program/spawned.py"}


def test_the_rules_on_forward_and_wrapping_see_what_they_forbid():
    assert spells_forward(SOURCE / "paths.py")
    assert not spells_forward(SOURCE / "lab" / "models.py")  # super().forward
    assert any(name.startswith(WRAPPING) for name in find_imports(SOURCE / "wrappers.py"))


def test_the_claims_room_needs_nothing_but_the_core():
    code = "import sys, ddpcall.teach.claims.run, ddpcall.teach.command, ddpcall.teach.show; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not set(done.stdout.split()) & (ONLY_IN_LAB | {"accelerate", "tensorboard"})


@pytest.mark.parametrize("package", ["torch", "hydra", "numpy", "rich", "accelerate"])
def test_importing_ddpcall_imports_nothing_heavy(package):
    code = f"import sys, ddpcall; sys.exit({package!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_pytest_plugin_imports_torch_only_when_an_assert_is_asked_for():
    code = """
import sys, ddpcall.pytest_plugin as plugin
assert "torch" not in sys.modules
assert plugin.assert_replicated.__module__ == "ddpcall.asserts" and "torch" in sys.modules
assert not hasattr(plugin, "assert_anything")
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
