"""The list of probes. A trial loops over it; so do its evidence, its checkpoints and its report."""

from __future__ import annotations

from ddpcall.probes import (
    collectives,
    compiled,
    gradients,
    hooks,
    mixing,
    modes,
    reducer,
    replicas,
    timeline,
)
from ddpcall.probes.probe import Probe

# In the order in which they are entered and told of a backward: the flight recorder's marks come before any probe
# talks, and what sits on the subject last (hooks, timeline) can leave first.
PROBES: tuple[Probe, ...] = (
    compiled.PROBE,
    collectives.PROBE,
    reducer.PROBE,
    gradients.PROBE,
    replicas.PROBE,
    modes.PROBE,
    mixing.PROBE,
    hooks.PROBE,
    timeline.PROBE,
)
