"""The catalogue of exercises: what is broken, what is asked, how it is judged. Data.

A script is what its file here changes in `plain.py`; `Exercise.script` is the one file that is handed out.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ddpcall.teach.grade import criteria
from ddpcall.teach.grade.criteria import Criterion, list_criteria, of_its_own
from ddpcall.teach.source_code import cut_out

SCRIPTS = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Exercise:
    """One script to mend.

    Attributes:
        name: Its name, and its script's.
        title: What it is about, in one line.
        task: What to do, and what has to stay.
        hint: Where to look when stuck.
        own: The criteria of its own: what the script is for and must keep.
        min_steps: Optimizer steps that each of two ranks has to make; with more ranks, fewer.
        min_accuracy: Test accuracy that every rank's model has to reach.
    """

    name: str
    title: str
    task: str
    hint: str
    own: tuple[Criterion, ...]
    min_steps: int = 36
    min_accuracy: float = 0.87

    @cached_property
    def script(self) -> str:
        """The broken script, as it is handed out."""
        own = (SCRIPTS / f"{self.name}.py").read_text()
        sources = [(SCRIPTS / "plain.py").read_text(), own]
        code = cut_out(sources, ["__main__"], ignored_module="ddpcall.teach.exercises.plain")
        return f'"""{ast.get_docstring(ast.parse(own), clean=False)}"""\n\n{code}'

    @property
    def criteria(self) -> tuple[Criterion, ...]:
        """Everything it is judged by; 100 points."""
        return list_criteria(self.own)


EXERCISES = (
    Exercise(
        name="module_bypass",
        title="`model.module(x)`: two models, and a hook that never fires",
        task="Make the two ranks train one model, and make the hook on the model fire in every step.",
        hint="`ddpcall explain DC101`, `ddpcall lab run who_synchronizes`",
        own=(of_its_own("hook", "the hook fires", 15, criteria.judge_hook_fires),),
    ),
    Exercise(
        name="custom_method",
        title="A loss method that DDP does not have, called past it",
        task="Train with `compute_loss`, reconstruction and all, and through DDP.",
        hint="DDP runs `forward`. Let `forward` dispatch, or wrap a small module whose forward computes the loss; "
        "the class Net itself stays as it is.",
        own=(
            of_its_own(
                "loss",
                "the whole loss",
                15,
                criteria.judge_gets_gradient("decoder", "the reconstruction is left out"),
            ),
        ),
    ),
    Exercise(
        name="no_sync_window",
        title="Accumulation that synchronizes the wrong micro-batch",
        task="Accumulate four micro-batches a step, and let gradients travel once a step, at the right moment.",
        hint="`ddpcall explain DC104`, `ddpcall lab run arming`",
        own=(
            of_its_own("accumulates", "four micro-batches a step", 8, criteria.judge_accumulates(4)),
            of_its_own("communication", "one reduction a step", 7, criteria.judge_reduces_once),
        ),
    ),
    Exercise(
        name="late_unfreeze",
        title="An encoder unfrozen after the model was wrapped",
        task="Train the head alone in stage 1 (24 steps on two ranks) and everything in stage 2, in step on all "
        "ranks.",
        hint="`ddpcall explain DC102`: who knows which parameters are to be reduced, and since when?",
        min_steps=48,
        own=(of_its_own("stages", "two stages", 15, criteria.judge_unfreezes("encoder", 24, 20)),),
    ),
    Exercise(
        name="rank0_eval",
        title="Evaluation on rank 0 that never returns to training",
        task="Evaluate after every epoch, in eval mode, with the running statistics that all ranks agree on; "
        "train every step in train mode, dropout included.",
        hint="`ddpcall explain DC204`, `ddpcall lab run batchnorm_dropout`",
        own=(
            of_its_own("evaluates", "evaluated every epoch", 8, criteria.judge_evaluates(3, 700)),
            of_its_own("train_mode", "trained in train mode", 7, criteria.judge_train_mode),
        ),
    ),
    Exercise(
        name="early_step",
        title="An optimizer that steps before anything is averaged",
        task="Step with averaged gradients; the encoder still learns more slowly than the head.",
        hint="`ddpcall explain DC105`: when does a parameter's hook run, and when does DDP reduce its bucket?",
        own=(of_its_own("rates", "two learning rates", 15, criteria.judge_two_rates("encoder", "head")),),
    ),
    Exercise(
        name="load_on_rank0",
        title="A checkpoint loaded on rank 0 alone, after wrapping",
        task="Begin with the pretrained weights on every rank.",
        hint="`ddpcall explain DC202`: what does DDP send to the other ranks, and when?",
        own=(of_its_own("pretrained", "begins pretrained", 15, criteria.judge_begins_pretrained),),
    ),
    Exercise(
        name="shared_data",
        title="A loader that gives every rank the same samples",
        task="Divide every epoch between the ranks, and shuffle it anew each time.",
        hint="`ddpcall explain DC206`; torch.utils.data.DistributedSampler, and what its `set_epoch` is for",
        own=(
            of_its_own("covers", "every sample, divided", 10, criteria.judge_covers),
            of_its_own("shuffles", "shuffled every epoch", 5, criteria.judge_shuffles),
        ),
    ),
    Exercise(
        name="one_process",
        title="Two ranks that agree, and do not train what one process would",
        task="Make the ranks train what one process would, with the samples of all ranks in each step: every "
        "label weighs the same. Model, samples, cross entropy and plain SGD stay.",
        hint="`ddpcall explain DC110`, `ddpcall lab run one_process`: a mean of means is the mean only where all "
        "have as many terms.",
        min_steps=40,
        own=(of_its_own("one_process", "what one process computes", 15, criteria.judge_as_one_process),),
    ),
)
