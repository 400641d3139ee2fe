"""What the watch costs: step time with and without it, memory, and start-up.

Two gloo ranks; bare, watched, bare, watched … in the same processes, a fresh model each time. Default settings:
vitals are compared after each of the first 16 steps, then every tenth; gradients are measured in those 16, at 32,
64, 128 …, then every thousandth. A round's figure is put together from the medians of its steps from the 21st on,
as a thousand steps have them: 900 plain ones, 99 with vitals, one measured. A machine that others use makes single
steps slow, and means say nothing. Printed are the median and the spread of the rounds' ratios, in processor time
of all threads, and of plain steps alone.

`python -m bench.watch toy nanogpt` measures these alone; without names, everything.
"""

import gc
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Generator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ddpcall
from ddpcall.ranks import run_on_ranks

ROUNDS = 9
STEPS = 75
WARM_UP = 20
EVERY = 10  # the default
MEASURED = (32, 64)
STARTS = 5
TENSORS = 2_000
ACCUMULATED = 2
TARGETS = {"toy": 1.05, "wide": 1.01, "nanogpt": 1.05, "trainer": 1.05}


def build_toy() -> tuple[nn.Module, torch.Tensor]:
    """Return 200 tiny layers and a batch: the worst case for a cost per layer and parameter."""
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(200))), torch.randn(8, 16)


def build_wide() -> tuple[nn.Module, torch.Tensor]:
    """Return a model whose step takes at least 50 ms on two cores, and a batch."""
    layers = [layer for _ in range(6) for layer in (nn.Linear(1024, 1024), nn.ReLU())]
    return nn.Sequential(*layers), torch.randn(512, 1024)


class Block(nn.Module):
    """A transformer's block as nanoGPT has it: attention and an MLP behind layer norms."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.num_heads = num_heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add what was attended to, then what the MLP makes of it."""
        parts = self.attend(self.ln_1(x)).split(x.shape[-1], dim=2)
        query, key, value = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


class Gpt(nn.Module):
    """A GPT of characters, small enough for some 5 ms an iteration on one core."""

    def __init__(self, vocabulary: int = 65, length: int = 16, width: int = 32, num_blocks: int = 2) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(num_blocks)))
        self.ln_f, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss."""
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        logits = self.head(self.ln_f(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


BUILD = {"toy": build_toy, "wide": build_wide}


def train_plain(name: str) -> Generator[None]:
    """Train a fresh model, a step each time it is asked."""
    torch.manual_seed(0)
    inner, batch = BUILD[name]()
    batch += dist.get_rank()
    model = DistributedDataParallel(inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    while True:
        loss = model(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield


def train_gpt() -> Generator[None]:
    """Train as nanoGPT's train.py does: micro-batches, the reduction with the last one, clipping, AdamW."""
    torch.manual_seed(0)
    data = torch.randint(65, (4096,), generator=torch.Generator().manual_seed(dist.get_rank()))
    model = DistributedDataParallel(Gpt())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    while True:
        for micro in range(ACCUMULATED):
            model.require_backward_grad_sync = micro == ACCUMULATED - 1
            starts = torch.randint(4096 - 17, (4,)).tolist()
            tokens = torch.stack([data[start : start + 16] for start in starts])
            targets = torch.stack([data[start + 1 : start + 17] for start in starts])
            (model(tokens, targets) / ACCUMULATED).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield


def time_steps(steps: Generator[None]) -> list[float]:
    """Return the milliseconds of processor time of each step, after a fresh start."""
    taken = []
    for _ in range(STEPS):
        began = time.process_time()
        next(steps)
        taken.append(1000 * (time.process_time() - began))
    steps.close()
    return taken


def time_trainer() -> list[float]:
    """Return the same of Transformers' Trainer with a tiny GPT-2: its steps end when it says so."""
    import transformers  # pyright: ignore[reportMissingImports]

    rank = dist.get_rank()
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=65, n_positions=16, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    tokens = torch.randint(65, (8 * STEPS, 16), generator=torch.Generator().manual_seed(1))
    ends: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.process_time())

    with tempfile.TemporaryDirectory() as directory:
        arguments = transformers.TrainingArguments(
            directory, per_device_train_batch_size=4, max_steps=STEPS, report_to=[], save_strategy="no",
            use_cpu=True, disable_tqdm=True, logging_steps=10**6, seed=rank, data_seed=0,
        )  # fmt: skip
        data: Any = [{"input_ids": row, "labels": row} for row in tokens]
        trainer = transformers.Trainer(
            transformers.GPT2LMHeadModel(config), arguments, train_dataset=data, callbacks=[Clock()]
        )
        ends.append(time.process_time())
        trainer.train()
    return [1000 * (end - begin) for begin, end in pairwise(ends)]


@dataclass
class Round:
    """Milliseconds of processor time of a step, in a thousand steps, and of a plain one."""

    typical: float
    plain: float


def run_round(name: str) -> Round:
    """Train a fresh model; return what its steps took."""
    if name == "trainer":
        taken = time_trainer()
    else:
        taken = time_steps(train_gpt() if name == "nanogpt" else train_plain(name))
    gc.collect()
    dist.barrier()
    steps = [(step, ms) for step, ms in enumerate(taken, 1) if step > WARM_UP]
    measured = statistics.median(ms for step, ms in steps if step in MEASURED)
    with_vitals = statistics.median(ms for step, ms in steps if step % EVERY == 0)
    plain = statistics.median(ms for step, ms in steps if step % EVERY and step not in MEASURED)
    return Round(0.9 * plain + 0.099 * with_vitals + 0.001 * measured, plain)


def run_watched_round(name: str) -> Round:
    """Do the same under a watch."""
    with ddpcall.watch(on_finding="record") as session:
        taken = run_round(name)
    assert all(finding.code in ("DC206", "DC207") for finding in session.findings), session.findings
    return taken


def measure_rounds(name: str) -> list[tuple[Round, Round]]:
    """Return what bare and watched steps took, by round."""
    torch.set_num_threads(1)
    run_round(name)
    return [(run_round(name), run_watched_round(name)) for _ in range(ROUNDS)]


def measure_memory() -> float:
    """Return the bytes that watching takes for a model of `TENSORS` parameter tensors."""
    model = DistributedDataParallel(nn.Sequential(*(nn.Linear(2, 2) for _ in range(TENSORS // 2))))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        model(torch.randn(2, 2)).mean().backward()
        optimizer.step()

    step()
    tracemalloc.start()
    with ddpcall.watch(model, on_finding="record"):
        step()
        step()
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return float(taken)


def measure_start(arguments: list[str]) -> float:
    """Return the seconds that an interpreter takes for a script that imports torch and leaves."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - began


def say_ratios(name: str) -> None:
    """Measure one kind of training and print it."""
    if name == "trainer" and importlib.util.find_spec("transformers") is None:
        print("trainer: not measured, for transformers is not installed")
        return
    rounds = run_on_ranks(measure_rounds, 2, name, timeout_s=1500)[0]
    ratios = sorted(watched.typical / bare.typical for bare, watched in rounds)
    plain = statistics.median(watched.plain / bare.plain for bare, watched in rounds)
    bare = statistics.median(bare.typical for bare, _ in rounds)
    print(
        f"{name}: a step takes {bare:.2f} ms of processor time bare; watched ×{statistics.median(ratios):.3f} "
        f"({ratios[0]:.3f} to {ratios[-1]:.3f}; target {TARGETS[name]}); plain steps ×{plain:.3f}",
        flush=True,
    )


def main() -> None:
    """Measure and print."""
    chosen = sys.argv[1:]
    for name in chosen or TARGETS:
        if name in TARGETS:
            say_ratios(name)
    if chosen and "rest" not in chosen:
        return
    taken = run_on_ranks(measure_memory, 2, timeout_s=200)[0]
    print(f"memory for {TENSORS} parameter tensors: {taken / 1e6:.2f} MB (target {5 + TENSORS * 16 / 1e6:.2f} MB)")
    with tempfile.TemporaryDirectory() as directory:
        script = Path(directory) / "empty.py"
        script.write_text("import torch\n")
        pairs = [
            (measure_start([str(script)]), measure_start(["-m", "ddpcall", "watch", str(script)]))
            for _ in range(STARTS)
        ]
    differences = [watched - bare for bare, watched in pairs]
    print(f"start-up: {statistics.median(differences):.2f} s beyond `import torch` (target 0.5 s)")


if __name__ == "__main__":
    main()
