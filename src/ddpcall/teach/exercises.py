"""The catalogue of exercises: what is broken, what is asked, how it is judged. Data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ddpcall.teach import criteria
from ddpcall.teach.criteria import Criterion

SCRIPTS = Path(__file__).parent / "exercises"


@dataclass(frozen=True, kw_only=True)
class Exercise:
    """One script to mend.

    Attributes:
        name: Its name, and its script's.
        title: What it is about, in one line.
        task: What to do, and what has to stay.
        hint: Where to look when stuck.
        min_steps: Optimizer steps that each of two ranks has to make; with more ranks, fewer.
        min_accuracy: Test accuracy that every rank's model has to reach.
        intent: The criteria of its own: what the script is for and must keep.
    """

    name: str
    title: str
    task: str
    hint: str
    min_steps: int
    min_accuracy: float
    intent: tuple[Criterion, ...]

    @property
    def script(self) -> Path:
        """The broken script, as it is handed out."""
        return SCRIPTS / f"{self.name}.py"

    @property
    def criteria(self) -> tuple[Criterion, ...]:
        """Everything it is judged by; 100 points."""
        ran = ("fair_play", "runs")
        trained = (*ran, "task", "trains")
        intent = tuple(criterion.key for criterion in self.intent)
        return (
            Criterion("fair_play", "grader left alone", 0, criteria.judge_fair_play),
            Criterion("runs", "runs to its end", 5, criteria.judge_runs, ("fair_play",)),
            Criterion("task", "the same task", 5, criteria.judge_task, ran),
            Criterion("trains", "trains the model", 10, criteria.judge_trains, (*ran, "task")),
            *self.intent,
            Criterion("parallel", "data parallel, by DDP", 15, criteria.judge_parallel, trained),
            Criterion(
                "synchronised",
                "one model on all ranks",
                25,
                criteria.judge_synchronised,
                (*trained, *intent, "parallel"),
            ),
            Criterion("alike", "ranks run alike", 10, criteria.judge_alike, (*trained, "parallel")),
            Criterion("findings", "the watch is silent", 5, criteria.judge_findings, (*trained, "parallel")),
            Criterion("accuracy", "accuracy on every rank", 10, criteria.judge_accuracy, (*trained, "parallel")),
        )


def _intent(key: str, title: str, points: int, judge: criteria.Callable[..., criteria.Judgement]) -> Criterion:
    return Criterion(key, title, points, judge, ("fair_play", "runs", "task", "trains"))


EXERCISES = (
    Exercise(
        name="module_bypass",
        title="`model.module(x)`: two models, and a hook that never fires",
        task="Make the two ranks train one model, and make the hook on the model fire in every step.",
        hint="`ddpcall explain DC101`, `ddpcall lab run who_synchronises`",
        min_steps=36,
        min_accuracy=0.87,
        intent=(_intent("hook", "the hook fires", 15, criteria.judge_hook_fires),),
    ),
    Exercise(
        name="custom_method",
        title="A loss method that DDP does not have, called past it",
        task="Train with `compute_loss`, reconstruction and all, and through DDP.",
        hint="DDP runs `forward`. Let `forward` dispatch, or wrap a small module whose forward computes the loss; "
        "the class Net itself stays as it is.",
        min_steps=36,
        min_accuracy=0.87,
        intent=(
            _intent(
                "loss",
                "the whole loss",
                15,
                criteria.judge_gets_gradient("decoder", "the reconstruction is left out"),
            ),
        ),
    ),
    Exercise(
        name="no_sync_window",
        title="Accumulation that synchronises the wrong micro-batch",
        task="Accumulate four micro-batches a step, and let gradients travel once a step, at the right moment.",
        hint="`ddpcall explain DC104`, `ddpcall lab run arming`",
        min_steps=36,
        min_accuracy=0.87,
        intent=(
            _intent("accumulates", "four micro-batches a step", 8, criteria.judge_accumulates(4)),
            _intent("communication", "one reduction a step", 7, criteria.judge_reduces_once),
        ),
    ),
    Exercise(
        name="late_unfreeze",
        title="An encoder unfrozen after the model was wrapped",
        task="Train the head alone in stage 1 (24 steps on two ranks) and everything in stage 2, in step on all "
        "ranks.",
        hint="`ddpcall explain DC102`: who knows which parameters are to be reduced, and since when?",
        min_steps=48,
        min_accuracy=0.87,
        intent=(_intent("stages", "two stages", 15, criteria.judge_unfreezes("encoder", 24, 20)),),
    ),
    Exercise(
        name="rank0_eval",
        title="Evaluation on rank 0 that never returns to training",
        task="Evaluate after every epoch, in eval mode, with the running statistics that all ranks agree on; "
        "train every step in train mode, dropout included.",
        hint="`ddpcall explain DC204`, `ddpcall lab run batchnorm_dropout`",
        min_steps=36,
        min_accuracy=0.87,
        intent=(
            _intent("evaluates", "evaluated every epoch", 8, criteria.judge_evaluates(3, 700)),
            _intent("train_mode", "trained in train mode", 7, criteria.judge_train_mode),
        ),
    ),
    Exercise(
        name="early_step",
        title="An optimizer that steps before anything is averaged",
        task="Step with averaged gradients; the encoder still learns more slowly than the head.",
        hint="`ddpcall explain DC105`: when does a parameter's hook run, and when does DDP reduce its bucket?",
        min_steps=36,
        min_accuracy=0.87,
        intent=(_intent("rates", "two learning rates", 15, criteria.judge_two_rates("encoder", "head")),),
    ),
    Exercise(
        name="load_on_rank0",
        title="A checkpoint loaded on rank 0 alone, after wrapping",
        task="Begin with the pretrained weights on every rank.",
        hint="`ddpcall explain DC202`: what does DDP send to the other ranks, and when?",
        min_steps=36,
        min_accuracy=0.87,
        intent=(_intent("pretrained", "begins pretrained", 15, criteria.judge_begins_pretrained),),
    ),
    Exercise(
        name="shared_data",
        title="A loader that gives every rank the same samples",
        task="Divide every epoch between the ranks, and shuffle it anew each time.",
        hint="`ddpcall explain DC206`; torch.utils.data.DistributedSampler, and what its `set_epoch` is for",
        min_steps=36,
        min_accuracy=0.87,
        intent=(
            _intent("covers", "every sample, divided", 10, criteria.judge_covers),
            _intent("shuffles", "shuffled every epoch", 5, criteria.judge_shuffles),
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
        min_accuracy=0.87,
        intent=(_intent("one_process", "what one process computes", 15, criteria.judge_as_one_process),),
    ),
)


def find_exercise(name: str) -> Exercise:
    """Return an exercise by name.

    Raises:
        ValueError: There is none such; the message lists those that are.
    """
    for exercise in EXERCISES:
        if exercise.name == name:
            return exercise
    names = ", ".join(exercise.name for exercise in EXERCISES)
    raise ValueError(f"there is no exercise {name!r}; write one of: {names}")
