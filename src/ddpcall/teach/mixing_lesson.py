"""The lesson on the mixing matrix: ten ways in which four ranks learn from one another."""

from __future__ import annotations

from ddpcall.teach.lesson import Choice, Lesson, Question, verdict
from ddpcall.teach.sources import Source

MIXING = Lesson(
    name="mixing",
    title="Who learns from whom",
    experiment="mixing_matrix",
    question="In a step, rank i uses the sum over j of W[i, j] times what rank j computed. Data parallelism "
    "is one W, with 1/N everywhere. Four ranks, ten different ones: what does each look like?",
    predict=(
        Question(
            "A communication hook sums the gradients and forgets to divide. Whoever compares the gradients "
            "of the ranks says …",
            (Choice("synced", "they are equal"), Choice("local", "they differ")),
            verdict("gradients", wrapper="ddp_summed"),
        ),
        Question(
            "Two micro-batches, and `no_sync()` stands around the last one instead of the first. What the "
            "optimizer uses is …",
            (
                Choice("averaged", "the mean of all ranks: the first backward was synchronized"),
                Choice("partly_local", "of the first the mean, of the last each rank's own"),
                Choice("local", "each rank's own alone"),
            ),
            verdict("mixing", wrapper="ddp", window="no_sync_last_micro_batch"),
        ),
        Question(
            "Under `Join`, the last of four ranks has run out of batches. What the other three use is …",
            (
                Choice("averaged", "the mean of their own three"),
                Choice("scaled", "a multiple of that mean"),
                Choice("dropped", "the mean of three, of which one is left out"),
            ),
            verdict("mixing", wrapper="ddp_join_uneven"),
        ),
        Question(
            "A hybrid mesh of 2 × 2, and `fully_shard` was given its inner dim alone. W is …",
            (
                Choice("averaged", "1/4 everywhere"),
                Choice("groups", "two blocks of 1/2"),
                Choice("local", "the identity"),
            ),
            verdict("mixing", wrapper="fsdp2_hybrid_inner"),
        ),
    ),
    columns=("gradients", "mixing", "accuracy", "distance"),
    look=(
        "Five rows are `synced` and only one of them is `averaged`. Equal gradients are what a sum, a dropped "
        "rank and a compressed mean have, too.",
        "Five rows are `local` or `sharded`, which says nothing of who meets whom: two groups, a ring, one "
        "micro-batch of two.",
        "The page of the run draws each W: `ddpcall report` on the directory named below the table.",
    ),
    why=(
        "What a rank's own computation contributed can be seen where autograd hands it over, before any "
        "communication; what it uses, where its optimizer begins its step. Both are kept as small linear "
        "sketches. Since S(Σ w·g) = Σ w·S(g), the weights follow from the sketches of all ranks, by least "
        "squares; sketches of shards add up to that of the whole.",
        "DDP divides by the size of its process group, so that a group of two gives blocks of 1/2. `Join` "
        "divides by the number of ranks at the beginning, so that three of four leave 3/4 of a mean. "
        "`no_sync()` leaves a micro-batch local until the next synchronized one picks it up: after the last "
        "one there is none.",
        "The page “The mixing matrix” (docs/mixing_matrix.md) has all shapes, how to measure a script of your own "
        "in three lines, and what the matrix cannot tell.",
    ),
    sources=(
        Source(
            "torch.distributed.algorithms.ddp_comm_hooks.default_hooks",
            "allreduce_hook",
            "the mean: it divides, then sums",
        ),
        Source(
            "torch.nn.parallel.distributed", "DistributedDataParallel.no_sync", "a flag that the forward reads"
        ),
        Source("torch.distributed.algorithms.join", "Join", "who shadows for a rank without batches"),
    ),
    further=(
        ("ddpcall train experiment=mixing_matrix ranks=8", "groups of four, a longer ring"),
        ("ddpcall lab start no_sync_window", "mend an accumulation that is off by one"),
    ),
    discuss=(
        "Which of the ten would you notice by the loss curve alone, and after how many steps?",
        "Every W here has rows that say what one step does. What does a ring do in many steps?",
        "A loss is divided by the number of tokens of its own rank. W is 1/N everywhere. Is the step right?",
    ),
)
