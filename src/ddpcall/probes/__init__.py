"""Probes: each observes one signal of a trial, as a context manager, and yields its part of the evidence.

What a probe does to the subject goes through `ddpcall.taps` and is undone when it exits, also after an exception.
Every docstring says what the probe is blind to. What observers have counted so far is their `state_dict()`, of
plain values and tensors; a trial that is resumed gives it back with `load_state_dict()`. The protocol is in
`probes.probe`, the list in `probes.catalogue`.
"""
