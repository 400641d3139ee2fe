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
        "between the batches (evaluation); another optimizer steps in each of the epochs; fewer than 8 indices.",
        blind_to="Loaders that are not torch's; `itertools.cycle(loader)`, which replays its first epoch; "
        "samplers of one's own that have neither `set_epoch` nor `shuffle`; datasets that are made anew for every "
        "epoch.",
        links=(_SAMPLER_DOCS, "https://github.com/kan-bayashi/ParallelWaveGAN/issues/177"),
    ),
)
