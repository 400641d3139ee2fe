"""DC4xx: data and randomness: what each rank is fed, and the random numbers that it draws."""

from __future__ import annotations

from ddpcall.findings.finding import ISSUE, Rule, Severity

_SAMPLER_DOCS = "https://docs.pytorch.org/docs/stable/data.html#torch.utils.data.distributed.DistributedSampler"

RULES = (
    Rule(
        code="DC401",
        name="same-order-in-every-epoch",
        severity=Severity.WARNING,
        title="A sampler that shuffles gave the same order in two epochs",
        why="DistributedSampler shuffles by its seed and the epoch that it is told. Without `set_epoch` every "
        "epoch has the same batches in the same order, and a rank sees its own share of the data alone, never the "
        "rest.",
        wrong="for epoch in range(epochs):\n    for batch in loader:  # and no loader.sampler.set_epoch(epoch)",
        fix="`loader.sampler.set_epoch(epoch)` at the start of every epoch.",
        silent_when="Nothing is shuffled (`shuffle=False`, indices in ascending order); one epoch is longer than "
        "the other (a curriculum); no optimizer steps "
        "between the batches (evaluation); another optimizer steps in each of the epochs; fewer than 8 indices; "
        "`DistributedSampler.set_epoch` was called between the two epochs with the number that it had: the epoch "
        "is repeated on purpose.",
        blind_to="Loaders that are not torch's; `itertools.cycle(loader)`, which replays its first epoch; "
        "samplers of one's own that have neither `set_epoch` nor `shuffle`; datasets that are made anew for every "
        "epoch.",
        links=(_SAMPLER_DOCS, "https://github.com/kan-bayashi/ParallelWaveGAN/issues/177"),
    ),
    Rule(
        code="DC402",
        name="shares-do-not-partition",
        severity=Severity.WARNING,
        title="The ranks' shares of the data overlap, or leave some of it out",
        why="DistributedSampler shuffles on every rank by itself and takes every n-th index, beginning at its own "
        "rank. Only of one and the same permutation are these shares: with another seed, epoch or number of "
        "replicas on some rank, samples come twice in an epoch and others never, and where all ranks take the "
        "same share, n ranks do the work of one.",
        wrong="sampler = DistributedSampler(dataset, seed=args.seed + rank)",
        fix="Give every rank the same `seed`, call `set_epoch` with the same number on every rank, and leave "
        "`num_replicas` and `rank` to the process group.",
        silent_when="A few samples come twice so that shares are of one size; each rank goes through the whole "
        "dataset in an order of its own (`num_replicas=1`); samples are drawn with replacement or by weight; no "
        "optimizer steps between the batches; ranks that are given the same indices have other batches (a dataset "
        "each); another sampler over the same dataset gives the shares that are left.",
        blind_to="Other samplers than DistributedSampler (subclasses with their own `__iter__` too) and "
        "accelerate's shards; models that neither DDP nor replicate wraps; ranks beyond the first 16; indices "
        "after the first 65,536 of an epoch on each rank; fewer than 8 indices.",
        links=(
            _SAMPLER_DOCS,
            "https://github.com/mlcommons/training/pull/625",
            "https://github.com/NVlabs/LongLive/issues/71",
        ),
    ),
    Rule(
        code="DC403",
        name="padding-counted",
        severity=Severity.NOTE,
        title="An evaluation counts samples twice that were added to make the ranks' shares even",
        why="Where the ranks do not divide the dataset evenly, DistributedSampler gives its first samples once "
        "more to the last ranks. Losses, hits and counts that are summed over the ranks have them twice: the "
        "metric is not that of the dataset, and another one with another number of ranks.",
        wrong="sampler = DistributedSampler(test_set, shuffle=False)  # 61 samples on 2 ranks\n"
        "dist.all_reduce(torch.tensor([num_right, num_seen]))",
        fix="Give each rank its own samples once, `Subset(dataset, range(rank, len(dataset), world_size))` and no "
        "DistributedSampler, and evaluate `model.module`; or leave the added samples out of what is counted.",
        silent_when="The ranks divide the dataset; `drop_last=True`; the added samples are left out "
        "(accelerate's `gather_for_metrics`); rank 0 evaluates the whole dataset; an optimizer steps between the "
        "batches; no count is summed.",
        blind_to="Counts that are gathered, or summed batch by batch; means of means; gathered predictions "
        "(torchmetrics), whose surplus may be cut off later. A metric of one rank's share that is printed or "
        "saved as if it were whole is not looked for: a rank that evaluates its share may write its part down for "
        "a later merge, and nothing that is sent tells the two apart.",
        links=(_SAMPLER_DOCS, ISSUE + "25162", "https://github.com/roboflow/rf-detr/issues/1507"),
    ),
    Rule(
        code="DC404",
        name="same-random-numbers",
        severity=Severity.NOTE,
        title="Every rank draws the same random numbers for batches that differ",
        why="The same seed on every rank gives the same noise, diffusion time steps or masks: all ranks' batches "
        "together have as many different ones as one rank's, and the gradient is noisier than it should be.",
        wrong="set_seed(42)  # on every rank\nnoise = torch.randn_like(images)",
        fix="`torch.manual_seed(seed + rank)` on every rank, after the model was built.",
        silent_when="The ranks' generators are in different states; all ranks have the same batch (tensor "
        "parallelism); what is drawn is sent to the other ranks, or is not for the samples of a batch (noise on "
        "weights, which must be the same everywhere); no loader gives the batches; a generator is passed; the "
        "draws are `torch.randperm`'s. Dropout is DC207.",
        blind_to="Python's and numpy's generators; draws in a loader's workers, and all draws where anything is "
        "compiled; models that neither DDP nor replicate wraps; what is not drawn in optimizer steps 2, 4, 8 or "
        "16; draws that do not begin with the batch's dimension.",
        links=(
            "https://github.com/Robbyant/lingbot-vla-v2/issues/41",
            "https://docs.pytorch.org/docs/stable/generated/torch.manual_seed.html",
        ),
    ),
)
