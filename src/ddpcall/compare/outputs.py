"""The first module, in forward order, whose output for a sample is not what it is in another run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ddpcall.compare.samples import Place, SampleOutputs

_NORMS_OF_A_BATCH = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "LazyBatchNorm1d", "LazyBatchNorm2d")


@dataclass(frozen=True)
class FirstModule:
    """What was found.

    Attributes:
        name: The module that differs; empty for the model itself, None where none does.
        sentence: What there is to say of it; empty where everything was compared and is the same.
        is_whole: The model's own output was compared for every sample.
        difference: Largest difference, relative to the largest output.
    """

    name: str | None
    sentence: str
    is_whole: bool = False
    difference: float = 0.0


def find_first_module(
    run: SampleOutputs,
    reference: SampleOutputs,
    variants: Sequence[SampleOutputs],
    multiple: float,
    eps: float = 0.0,
) -> FirstModule:
    """Compare the outputs of modules, sample by sample.

    Args:
        run: Of all ranks.
        reference: What it is compared with.
        variants: The reference again, in ways that must not matter: what these change is noise.
        multiple: Of the noise: what exceeds it is a difference.
        eps: Noise that is there without variants, relative to the largest output.
    """
    here, there = run.by_sample(), reference.by_sample()
    common = [sample for sample in there if sample in here]
    if not common:
        return FirstModule(None, "No output could be compared: no sample's input is the same as in one process.")
    rows, base = [here[sample] for sample in common], [there[sample] for sample in common]
    is_whole = len(common) == len(there) and ("", 0) in run.outputs and ("", 0) in reference.outputs
    for place, expected in reference.outputs.items():
        if place not in run.outputs or run.widths.get(place[0]) != reference.widths.get(place[0]):
            continue  # a rank of a tensor-parallel model holds a part of it
        noise = max((_measure_noise(place, expected, there, variant) for variant in variants), default=0.0)
        size = float(np.nanmax(np.linalg.norm(expected, axis=1), initial=0.0))
        allowed = multiple * max(noise, 1.2e-7 * size, eps * size)
        apart = np.linalg.norm(run.outputs[place][rows] - expected[base], axis=1)
        off = int((np.nan_to_num(apart) > allowed).sum())
        if off:
            worst = float(np.nanmax(apart)) / (size or 1.0)
            sentence = _describe(place, reference.kinds.get(place[0], ""), off, len(common), worst)
            return FirstModule(place[0], sentence, is_whole, worst)
    said = "" if is_whole else "Not every module's output could be compared by sample."
    return FirstModule(None, said, is_whole)


def _measure_noise(
    place: Place, expected: np.ndarray, there: dict[tuple[int, int], int], variant: SampleOutputs
) -> float:
    if place not in variant.outputs:
        return 0.0
    where = variant.by_sample()
    common = [sample for sample in there if sample in where]
    rows = variant.outputs[place][[where[sample] for sample in common]]
    return float(np.nanmax(np.linalg.norm(rows - expected[[there[s] for s in common]], axis=1), initial=0.0))


def _describe(place: Place, kind: str, off: int, num_samples: int, worst: float) -> str:
    name = f"{place[0]} ({kind})" if place[0] else f"the model itself ({kind})"
    text = (
        f"The first module that computes something else is {name}: its output differs for {off} of {num_samples} "
        f"samples, by up to {worst:.1%} of the largest."
    )
    if kind in _NORMS_OF_A_BATCH:
        text += (
            " It takes its statistics from the samples of its rank alone. Write: "
            "model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)"
        )
    return text
