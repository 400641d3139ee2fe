"""An independent witness: what a corpus script really does to its replicas, measured without ddpcall.

`python -m tests.corpus.harm SCRIPT…` runs each script on its ranks with torch's own global hooks, which digest
every optimizer's gradients before a step and parameters after it, the inputs of wrapped models and, at the end,
modes and buffers. Each rank writes a file; the files are compared afterwards, so that nothing here adds a
collective.

Blind to: what a script does outside optimizer steps and module calls (a checkpoint's content, compiled frames,
hooks that did not fire); sharded parameters, which differ by design.
"""

import hashlib
import json
import os
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.corpus.marks import read_marks
from tests.corpus.runner import run_on_ranks

WITNESS = "CORPUS_WITNESS_DIR"


def digest(tensors: list[Any]) -> str:
    """A digest of tensors' values, in order."""
    import torch

    sha = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        flat = local.detach().cpu().contiguous()
        sha.update(str((flat.dtype, tuple(flat.shape))).encode())
        sha.update(flat.flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


class Witness:
    """Records one rank's run through torch's global optimizer and module hooks."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.open: dict[int, dict[str, Any]] = {}  # by optimizer: one may step inside another's step
        self.inputs: list[str] = []
        self.models: list[Any] = []

    def put_on(self) -> None:
        import torch
        from torch import nn
        from torch.nn.parallel import DistributedDataParallel
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        def before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            record = self.open[id(optimizer)] = {
                "gradients": [digest([p.grad]) if p.grad is not None else "" for p in parameters],
                "settings": str([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]),
                "rng": digest([torch.get_rng_state()]),
                "modes": str([[m.training for m in model.modules()] for model in self.models]),
            }
            self.steps.append(record)

        def after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self.open[id(optimizer)]["parameters"] = [digest([p]) for p in parameters]

        def see_inputs(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if isinstance(module, DistributedDataParallel) and torch.is_grad_enabled():
                self.inputs.append(digest([x for x in inputs if isinstance(x, torch.Tensor)]))

        construct = DistributedDataParallel.__init__

        def see_wrapping(ddp: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
            construct(ddp, module, *args, **kwargs)
            self.models.append(module)

        register_optimizer_step_pre_hook(before_step)
        register_optimizer_step_post_hook(after_step)
        nn.modules.module.register_module_forward_pre_hook(see_inputs)
        DistributedDataParallel.__init__ = see_wrapping  # type: ignore[method-assign]

    def record(self) -> dict[str, Any]:
        buffers = [digest(list(model.buffers())) for model in self.models]
        return {"steps": self.steps, "inputs": self.inputs, "buffers": buffers}


def run_as_rank(script: str) -> None:
    witness = Witness()
    witness.put_on()
    sys.argv = [script]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        path = Path(os.environ[WITNESS]) / f"{os.environ.get('RANK', '0')}.json"
        path.write_text(json.dumps(witness.record()))


def first_difference(records: list[dict[str, Any]], what: str) -> int | None:
    """The first optimizer step (from 0) at which `what` is not the same on all ranks."""
    for index, step in enumerate(zip(*(record["steps"] for record in records), strict=False)):
        if any(rank[what] != step[0][what] for rank in step):
            return index
    return None


def compare(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What differs between ranks and from which optimizer step; what is suspiciously equal."""
    found: dict[str, Any] = {"steps": [len(record["steps"]) for record in records]}
    for what in ("gradients", "parameters", "settings", "modes"):
        step = first_difference(records, what)
        if step is not None:
            found[f"{what} differ from step"] = step
    if any(record["buffers"] != records[0]["buffers"] for record in records):
        found["buffers differ at the end"] = True
    shared = set(records[0]["inputs"]).intersection(*(record["inputs"] for record in records[1:]))
    if shared and len(records) > 1:
        found["batches in common"] = len(shared)
    repeated = max(len(record["inputs"]) - len(set(record["inputs"])) for record in records)
    if repeated:
        found["batches that a rank saw again"] = repeated
    rng = [step["rng"] for step in records[0]["steps"]]
    if len(records) > 1 and rng and all([s["rng"] for s in r["steps"]] == rng for r in records):
        found["the same random numbers"] = True
    return found


def witness_script(script: Path) -> dict[str, Any]:
    """Runs a script under the witness and compares its ranks."""
    marks = read_marks(script)
    with tempfile.TemporaryDirectory() as directory:
        run = run_on_ranks(marks.ranks, ["-m", "tests.corpus.harm", "--rank", str(script)], {WITNESS: directory})
        records = [json.loads(path.read_text()) for path in sorted(Path(directory).glob("*.json"))]
    found: dict[str, Any] = {"exit": run.exit_code}
    return found | (compare(records) if records else {"output": run.output[-800:]})


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--rank"]:
        run_as_rank(arguments[1])
        return
    for argument in arguments:
        print(f"{Path(argument).stem}: {json.dumps(witness_script(Path(argument)))}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
