"""Devices and backends are named in one file, where another kind is one entry."""

import ast
import re
from pathlib import Path

import pytest
import torch

from ddpcall import accelerator

SOURCE = Path(__file__).parents[2] / "src" / "ddpcall"
# Lessons and exercises are what users write. `torch.cuda.` in evidence and messages is text for a reader.
MAY_NAME = ("accelerator.py", "teach/")
CPU = torch.device("cpu")


def names_a_device(path: Path) -> list[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    used = [ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)]
    return [text for text in texts if re.fullmatch(r"(cuda|nccl|xpu|xccl)(:.*)?", text)] + [
        name for name in used if re.match(r"torch\.(cuda|xpu)\b", name)
    ]


def test_no_other_file_names_a_device_or_its_backend():
    others = [path for path in SOURCE.rglob("*.py") if not str(path.relative_to(SOURCE)).startswith(MAY_NAME)]
    assert {str(path): found for path in others if (found := names_a_device(path))} == {}
    assert len(names_a_device(SOURCE / "accelerator.py")) > 4  # the search sees them


@pytest.fixture
def two_xpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 2)


def test_another_kind_of_device_is_chosen_with_its_own_backend(two_xpus):
    chosen = accelerator.choose_accelerator("auto", "auto", local_rank=1, local_world_size=2)
    assert (str(chosen.device), chosen.backend) == ("xpu:1", "xccl")
    assert accelerator.explain_missing_devices("xccl", 3) == (
        "3 ranks on xccl need 3 XPU devices; this machine has 2"
    )


def test_one_kind_of_device_does_not_take_anothers_backend(two_xpus):
    with pytest.raises(
        ValueError, match=r"backend=nccl needs CUDA tensors, but the device is the XPU. Write backend=xccl"
    ):
        accelerator.choose_accelerator("auto", "nccl", local_rank=0, local_world_size=2)


@pytest.mark.parametrize(
    ("backend", "device"),
    [("gloo", "cpu"), ("nccl", "cuda:1"), ("cpu:gloo,cuda:nccl", "cuda:1"), ("xccl", "xpu:1")],
)
def test_a_backend_says_where_tensors_belong(backend, device):
    assert str(accelerator.choose_device(backend, 1)) == device


def test_on_the_cpu_there_is_nothing_to_select_and_gloo_needs_no_device():
    accelerator.select_device(CPU)
    assert accelerator.device_ids(CPU) is None
    assert accelerator.explain_missing_devices("gloo", 64) == ""


def test_the_random_state_is_kept_and_put_back():
    before = accelerator.get_rng_state(CPU)
    with accelerator.fork_rng(), accelerator.fork_rng(CPU):
        torch.rand(3)
    assert torch.equal(accelerator.get_rng_state("cpu"), before)
    torch.rand(3)
    accelerator.set_rng_state(before, CPU)
    assert torch.equal(torch.get_rng_state(), before)
