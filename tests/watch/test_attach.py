"""The watch attaches whatever comes first, and says what it could not attach to."""

import importlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import ddpcall
from ddpcall.watch.sensors.collectives import CollectiveLog
from ddpcall.watch.sensors.compiled import CompiledSensor
from ddpcall.watch.sensors.hooks import REGISTRATIONS
from ddpcall.watch.sensors.steps import StepSensor
from tests.ranks.lab_process import clean_environment

WATCH = [sys.executable, "-m", "ddpcall", "watch", "--json", "f.json"]
TIMEOUT_S = 300


def run_watched(directory, source):
    """Run a script alone under the watch; return its findings and the finished process."""
    (directory / "train.py").write_text(source)
    finished = subprocess.run(
        [*WATCH, "train.py"],
        cwd=directory,
        env=clean_environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    findings = json.loads((directory / "f.json").read_text())["findings"]
    return [(finding["code"], finding["line"]) for finding in findings], finished


def line_of(source, mark):
    (line,) = [number for number, line in enumerate(source.splitlines(), 1) if line.endswith(f"# {mark}")]
    return line


# ---- real ones --------------------------------------------------------------------------------------------------

LOOKED_UP_FIRST = """
import lookup_first  # as transformers, datasets and peft do
import torch

net = torch.nn.Sequential(torch.nn.Linear(2, 2))
net[0].register_forward_hook(lambda *_: None)
net[0].forward(torch.ones(1, 2))  # here
print(type(torch.__loader__).__name__, torch.__spec__.loader is torch.__loader__, sorted(vars(torch.__loader__)))
print(lookup_first.Trainer().has_torch)
"""

LOOKUP_FIRST = """
import importlib, importlib.metadata, importlib.util, sys, types
has_torch = importlib.util.find_spec("torch") is not None
version = importlib.metadata.version("torch")

class _LazyModule(types.ModuleType):
    def __getattr__(self, name):
        if name == "Trainer":
            return importlib.import_module("trainer").Trainer
        raise AttributeError(name)

sys.modules[__name__].__class__ = _LazyModule
"""


def test_torch_is_looked_up_before_it_is_imported(tmp_path):
    (tmp_path / "lookup_first.py").write_text(LOOKUP_FIRST)
    (tmp_path / "trainer.py").write_text("import torch\nclass Trainer:\n    has_torch = torch.__name__\n")
    found, finished = run_watched(tmp_path, LOOKED_UP_FIRST)
    assert found == [("DC301", line_of(LOOKED_UP_FIRST, "here"))], finished.stderr
    assert finished.stdout == "SourceFileLoader True ['name', 'path']\ntorch\n"


ACCELERATE_FIRST = """
from accelerate import Accelerator
import torch

accelerator = Accelerator(cpu=True, mixed_precision="bf16")
net = accelerator.prepare(torch.nn.Sequential(torch.nn.Linear(2, 2)))
net(torch.ones(1, 2))
net[0](torch.ones(1, 2))  # here
"""


def test_accelerate_is_imported_before_torch(tmp_path):
    """It imports torch while its own modules are still being executed."""
    pytest.importorskip("accelerate")
    found, finished = run_watched(tmp_path, ACCELERATE_FIRST)
    assert found == [("DC304", line_of(ACCELERATE_FIRST, "here"))], finished.stderr
    assert "not watched" not in finished.stderr


# ---- parts that cannot ------------------------------------------------------------------------------------------


def cannot(*_):
    raise AttributeError("module 'torch' has no attribute '_private'\nand more")


def use_hooks():
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].register_forward_hook(lambda *_: None)
    net[0].forward(torch.ones(1, 2))


def test_where_one_part_cannot_attach_the_others_do_and_it_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(CompiledSensor, "attach", cannot)
    with ddpcall.watch(on_finding="record") as session:
        use_hooks()
        assert [finding.code for finding in session.findings] == ["DC301"]
        reason = "AttributeError: module 'torch' has no attribute '_private'"
        assert session.not_attached == {"torch.compile": reason}
    assert capsys.readouterr().err == f"ddpcall watch: not watched: torch.compile ({reason})\n"


def test_ranks_other_than_the_first_do_not_repeat_it(monkeypatch, capsys):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(CompiledSensor, "attach", cannot)
    with ddpcall.watch(on_finding="record") as session:
        pass
    assert list(session.not_attached) == ["torch.compile"]
    assert capsys.readouterr().err == ""


def test_a_part_that_fails_half_way_leaves_nothing_behind(monkeypatch):
    register, load = nn.Module.register_forward_hook, nn.Module.load_state_dict
    monkeypatch.setitem(REGISTRATIONS, "register_what_torch_has_not", "forward")
    with ddpcall.watch(on_finding="record") as session:
        assert nn.Module.register_forward_hook is register
        assert nn.Module.load_state_dict is not load
    assert list(session.not_attached) == ["hooks of modules"]
    assert nn.Module.load_state_dict is load


def test_a_library_imported_later_that_cannot_be_watched_does_not_fail_its_import(tmp_path, monkeypatch, capsys):
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "__init__.py").write_text("")
    (tmp_path / "accelerate" / "accelerator.py").write_text("Renamed = 1\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "accelerate"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with ddpcall.watch(on_finding="record") as session:
        assert importlib.import_module("accelerate.accelerator").Renamed == 1
        use_hooks()
    assert list(session.not_attached) == ["accelerate's mixed precision"]
    assert "has no attribute 'Accelerator'" in capsys.readouterr().err
    assert [finding.code for finding in session.findings] == ["DC301"]
    for name in ("accelerate", "accelerate.accelerator"):
        del sys.modules[name]


def test_steps_are_not_judged_without_the_log_of_collectives(monkeypatch):
    """Gradients that the script reduces itself would look unreduced."""
    monkeypatch.setattr(CollectiveLog, "attach", cannot)
    steps = SimpleNamespace(num=0)
    monkeypatch.setattr(StepSensor, "_before_step", lambda *_: setattr(steps, "num", steps.num + 1))
    with ddpcall.watch(on_finding="record") as session:
        parameter = nn.Parameter(torch.ones(1))
        parameter.sum().backward()
        torch.optim.SGD([parameter], lr=0.1).step()
    assert list(session.not_attached) == ["collectives and optimizer steps"]
    assert steps.num == 0


def test_what_needs_a_private_name_that_torch_no_longer_has_says_so(monkeypatch, capsys):
    monkeypatch.delattr(torch.autograd.graph, "_engine_run_backward")
    with ddpcall.watch(on_finding="record") as session:
        use_hooks()
    assert list(session.not_attached) == ["what needs _engine_run_backward", "backwards"]
    sentence = "_engine_run_backward: gradients that torch.autograd.grad takes are not seen"
    assert all(sentence in reason for reason in session.not_attached.values())
    assert sentence in capsys.readouterr().err
    assert [finding.code for finding in session.findings] == ["DC301"]


def test_nothing_is_missing_as_a_rule():
    with ddpcall.watch(on_finding="record") as session:
        pass
    assert session.not_attached == {}


NOT_AT_ALL = """
import ddpcall.watch.session as session
def cannot(self):
    raise RuntimeError("as it were")
session.Session.start = cannot
import torch
print("trained")
"""


def test_a_script_whose_torch_cannot_be_watched_runs_and_it_is_said(tmp_path):
    _, finished = run_watched(tmp_path, NOT_AT_ALL)
    assert finished.stdout == "trained\n"
    assert "ddpcall watch: not watched: torch (RuntimeError: as it were)\n" in finished.stderr
