"""DC4xx: data and randomness: what each rank is fed, and the random numbers that it draws."""

from __future__ import annotations

from ddpcall.findings.finding import Rule, Severity

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
        silent_when="Nothing is shuffled (`shuffle=False`, an order of the sampler's own); no optimizer steps "
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
)
