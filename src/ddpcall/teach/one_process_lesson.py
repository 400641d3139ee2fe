"""The lesson on one process: ranks that agree in every gradient, and do not compute what one process would."""

from __future__ import annotations

from ddpcall.teach.lesson import Choice, Lesson, Question, found
from ddpcall.teach.sources import Source

_SAME = Choice("same", "what one process with the whole batch computes")
_SCALED = Choice("scaled", "a multiple of it")
_WEIGHTED = Choice("weighted", "the same gradients, weighted otherwise")

ONE_PROCESS = Lesson(
    name="one_process",
    title="Would one process have computed the same?",
    experiment="same_as_one_process",
    question="Ranks can agree in every gradient, mix them by 1/N everywhere, and be wrong together. Two ranks, "
    "each with its share of a batch, beside one process with the whole of it: what do they compute?",
    predict=(
        Question(
            "Sequences of two ranks have 72 and 8 target tokens. Each rank takes the mean over its own, and DDP "
            "averages. The ranks compute …",
            (_SAME, _SCALED, _WEIGHTED),
            found(case="token_means", wrapper="ddp"),
        ),
        Question(
            "The loss is a sum over the samples, and DDP averages. The ranks compute …",
            (_SAME, _SCALED, _WEIGHTED),
            found(case="sum", wrapper="ddp"),
        ),
        Question(
            "To clip, a script sums the squares of its gradients over the ranks and takes the root. Under DDP "
            "that norm is √2 times too large. Under `fully_shard` the ranks compute …",
            (_SAME, Choice("update", "another update: the norm is wrong there too")),
            found(case="summed_norm", wrapper="fsdp2"),
        ),
        Question(
            "A contrastive loss takes its negatives from all ranks, by `dist.all_gather`, through which no "
            "gradient comes back. The loss is right to the last digit. The gradients are …",
            (
                _SAME,
                _SCALED,
                Choice("loss", "those of another loss: no factor and no weights of the ranks make up"),
            ),
            found(case="gather_without_gradient", wrapper="ddp"),
        ),
    ),
    columns=(),
    look=(
        "Every mistake stands beside a step that is right. What do the two differ in, and is it the wrapper?",
        "`mean` is the same under six wrappers, each of which averages in its own manner; `sum` is scaled.",
        "`summed_norm` is one piece of code: wrong under `ddp`, right under `fsdp2`.",
    ),
    why=(
        "DDP takes the mean over ranks. That is the mean over the batch only where every rank's loss is a mean "
        "over as many terms as every other's. With 72 and 8 targets each target of the second rank weighs nine "
        "times as much. Divide each rank's *sum* by the count of all ranks, and multiply by the number of ranks, "
        "which DDP will divide by.",
        "A sum of squares over ranks is the norm of the whole where each rank holds a part of every gradient, and "
        "√N times the norm where each rank holds all of it. Whether a reduction is right depends on what lies on "
        "the ranks.",
        "`dist.all_gather` writes into tensors that autograd does not know. A rank's rows are negatives for all "
        "other ranks too, and what those would tell it is lost. `all_gather_single` of "
        "`torch.distributed._functional_collectives` (`all_gather_tensor` before torch 2.13) lets it through.",
        "The comparison takes the same step in one process, from the same parameters, measures how far rounding "
        "alone moves it, and looks in causal order for the first thing that differs: modules by sample, loss, "
        "gradients by ratio and by weights, update (docs/compare.md).",
    ),
    sources=(
        Source(
            "torch.distributed.algorithms.ddp_comm_hooks.default_hooks",
            "allreduce_hook",
            "the mean over ranks, whatever they counted",
        ),
        Source("torch.nn.functional", "cross_entropy", "its mean is over the targets that are not ignored"),
        Source("torch.nn.utils.clip_grad", "clip_grad_norm_", "the norm of the gradients that this rank holds"),
    ),
    further=(
        ("ddpcall lab start one_process", "make two ranks train what one would"),
        ("ddpcall explain DC110", "what the watch says of unequal numbers of targets"),
    ),
    discuss=(
        "A colleague multiplies the learning rate by the number of ranks. Is that one of these mistakes?",
        "Your batch norm takes its statistics from a rank's samples. When would you want exactly that?",
        "Which of these would a comparison of two loss curves show, and after how many steps?",
    ),
)
