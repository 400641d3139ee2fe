"""Probes: each observes one signal of a trial, as a context manager, and yields its part of the evidence.

What a probe does to the subject goes through `ddpcall.taps` and is undone when it exits, also after an exception.
Every docstring says what the probe is blind to.
"""
