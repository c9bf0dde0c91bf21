"""qtdog: domain generalization by quantization-aware training (QT-DoG) and ensembles of quantized models (EoQ)."""

from qtdog.errors import UserError
from qtdog.runs import load_model

__all__ = ["UserError", "load_model"]
