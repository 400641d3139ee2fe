"""DC2xx: what should be equal on all ranks, or should not."""

from __future__ import annotations

from ddpcall.findings.finding import DDP_DOCS, ISSUE, Rule, Severity

RULES = (
    Rule(
        code="DC201",
        name="replicas-diverged",
        severity=Severity.ERROR,
        title="The ranks' parameters differ, and no event explains why",
        why="Data parallelism keeps one model on all ranks. From the step named on, there are several.",
        wrong="if rank == 0:\n    model.reset_parameters()",
        fix="Look at what the ranks did differently up to the step named; broadcast the parameters from rank 0.",
        silent_when="The parameters are excluded from DDP, differ only between optimizer steps (SAM), or are sent "
        "around by the script after each step (an optimizer sharded by hand); local SGD; the difference is "
        "one of rounding, or gone when the ranks are asked about it.",
        blind_to="Parameters outside every wrapped module; whatever comes after the script was seen to send them; "
        "one difference of a few roundings that does not grow.",
        links=(DDP_DOCS,),
    ),
    Rule(
        code="DC202",
        name="loaded-on-some-ranks",
        severity=Severity.ERROR,
        title="`load_state_dict` ran on some ranks only, and the replicas differ",
        why="DDP broadcasts parameters when it wraps, not when a checkpoint is loaded afterwards.",
        wrong="if rank == 0:\n    ddp.module.load_state_dict(state)",
        fix="Load on every rank, or before wrapping.",
        silent_when="The model is broadcast afterwards.",
        blind_to="Parameters written by hand.",
        links=(DDP_DOCS,),
    ),
    Rule(
        code="DC203",
        name="optimizer-differs",
        severity=Severity.ERROR,
        title="The optimizer's settings differ between ranks",
        why="Equal gradients with different learning rates give different models.",
        wrong="lr = base_lr * (1 + rank)",
        fix="Compute the settings from what all ranks share; step the scheduler on every rank.",
        silent_when="Parameters excluded from DDP; each optimizer has its share of them and the script sends the "
        "updates around.",
        blind_to="Optimizer state.",
        links=(DDP_DOCS,),
    ),
    Rule(
        code="DC204",
        name="mode-differs",
        severity=Severity.ERROR,
        title="Some ranks train in eval mode",
        why="Gradients stay equal, but dropout and batch statistics do not: a rank that evaluated and did not "
        "switch back trains another function.",
        wrong="if rank == 0:\n    evaluate(model)  # calls model.eval() and never model.train()",
        fix="Call `model.train()` after evaluating, on every rank that called `model.eval()`.",
        silent_when="The modules concerned do not depend on the mode.",
        blind_to="Modes between two comparisons.",
        links=("https://github.com/huggingface/lerobot/pull/3668",),
    ),
    Rule(
        code="DC205",
        name="buffers-differ",
        severity=Severity.WARNING,
        title="Buffers differ between ranks when the model is evaluated or saved, or for good",
        why="BatchNorm statistics are local until the next training forward. Evaluating through the inner module "
        "gives every rank another result. Of statistics that a model keeps itself (codebooks, queues), "
        "the broadcast in that forward throws away what the other ranks added; without a wrapper, or with "
        "`broadcast_buffers=False`, each rank goes on with its own.",
        wrong="accuracy = evaluate(ddp.module)",
        fix="Broadcast the buffers first, or convert to SyncBatchNorm before wrapping. Other statistics: reduce "
        "counts and sums over the ranks before the update.",
        silent_when="During training: DDP broadcasts buffers at the next forward. Rank 0 alone evaluates. A "
        "`state_dict` that is not saved, or that of a copy. Non-persistent buffers: caches and hidden states are "
        "a rank's own. Saving what differs is a note. Of buffers that nothing sends around: batch norms; hidden "
        "states, noise and queues, which are replaced and not moved by a part; ranks with parameters of their "
        "own.",
        blind_to="Evaluation without a mode switch; evaluation on some ranks, but not on rank 0. What nothing "
        "sends around is looked for in the second step and told at the end: not in shorter runs, and not in "
        "compiled code. Statistics that are no buffers (a plain attribute, a scale factor that is computed from "
        "the first batch) are out of reach: gradients and parameters stay equal.",
        links=(ISSUE + "13711", ISSUE + "30718"),
    ),
    Rule(
        code="DC206",
        name="same-batch-on-every-rank",
        severity=Severity.WARNING,
        title="Every rank is fed the same batch",
        why="N ranks do the work of one.",
        wrong="loader = DataLoader(dataset, shuffle=True)  # same seed everywhere, no DistributedSampler",
        fix="Give the loader a `DistributedSampler(dataset)`, and call `sampler.set_epoch(epoch)`.",
        silent_when="The model is sharded over the ranks that share a batch; of several forwards in a step the "
        "first or the last has its own inputs.",
        blind_to="Batches that overlap in part.",
        links=("https://docs.pytorch.org/docs/stable/data.html#torch.utils.data.distributed.DistributedSampler",),
    ),
    Rule(
        code="DC207",
        name="identical-dropout",
        severity=Severity.NOTE,
        title="Every rank draws the same dropout masks",
        why="The same seed on every rank gives the same random numbers: less noise than meant.",
        wrong="torch.manual_seed(0)  # on every rank, after wrapping",
        fix="`torch.manual_seed(seed + rank)` after the model was built.",
        silent_when="The model has no active dropout.",
        blind_to="Generators passed by hand.",
        links=("https://github.com/huggingface/transformers/issues/31412",),
    ),
    Rule(
        code="DC208",
        name="loss-scale-differs",
        severity=Severity.ERROR,
        title="The GradScaler's loss scale differs between ranks",
        why="DDP averages the scaled gradients, and each rank divides the same average by its own scale: "
        "the ranks take steps of different sizes, and the replicas drift apart.",
        wrong='if rank == 0:\n    scaler.load_state_dict(checkpoint["scaler"])',
        fix="Call `scaler.load_state_dict(...)` on every rank, and give every rank the same `init_scale`.",
        silent_when="Gradients are unscaled before they are reduced, so that the parameters stay equal; each rank "
        "trains on its own until the script averages parameters (local SGD).",
        blind_to="A scale that is kept by hand; a GradScaler whose `step` and `unscale_` are never called.",
        links=("https://docs.pytorch.org/docs/stable/amp.html#gradient-scaling", ISSUE + "136009"),
    ),
)
