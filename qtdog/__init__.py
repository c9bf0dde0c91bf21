"""qtdog: domain generalization by quantization-aware training (QT-DoG) and ensembles of quantized models (EoQ)."""

import os

# Read when PyTorch loads its OpenMP. Where something else wants a core too, threads that spin at the end of every
# parallel loop make a step of a small network take many times as long as threads that sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from qkernels import __version__
from qtdog.errors import UserError
from qtdog.results.runs import load_model

__all__ = ["UserError", "__version__", "load_model"]
