"""Runs a script or a module unchanged, and leaves as it would."""
