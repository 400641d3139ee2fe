"""ddpcall: what `model.forward(x)` and `model.module(x)` lose in distributed PyTorch training.

Importing this package does no work: it patches nothing and imports neither torch nor Hydra.
"""

__version__ = "0.1.0"
