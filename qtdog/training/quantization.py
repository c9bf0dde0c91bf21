"""What becomes of a model when its run begins to quantize, and when it may be selected."""

import copy

from torch import nn

import qkernels as qk
from qtdog.config import Quantization, RunConfig


def prepare(model: nn.Module, quantization: Quantization) -> qk.QuantizationReport:
    """Give `model` the quantized layers and scales that it will have from the switch on; until then all is float.

    So optimizer, averages and wrappers know all Parameters from the start, and the weights stay the same ones. (The
    code published with QT-DoG made new ones at its switch, which no optimizer knew: neither weights nor scales were
    trained any more. That is `rtn-frozen`: the layers that are quantized are not trained from then on;
    `frozen-backbone` leaves them as they are, float.)

    Returns:
        What will be quantized, or would be.
    """
    quantized = model if quantization.makes_codes else copy.deepcopy(model)
    report = qk.quantize_(quantized, quantization.qconfig(), enabled=False)
    qk.fuse_weights_(model)
    return report


def switch(model: nn.Module, quantization: Quantization, report: qk.QuantizationReport) -> None:
    """From now on `model` trains through quantized weights, or not at all where it is to be frozen."""
    if quantization.makes_codes:
        qk.enable_(model)
    if quantization.qat_mode != "qat":
        for layer in report.quantized:
            model.get_submodule(layer.name).requires_grad_(False)


def may_be_selected(run: RunConfig, step: int) -> bool:
    """A quantized method selects among quantized checkpoints only."""
    return run.quantization is None or step >= run.quantization.complete_from(run.steps)


def scale_sizes(model: nn.Module) -> list[tuple[str, float, float, float]]:
    """Name, mean, least and greatest element of each learned scale as it is used, without its sign; in model order."""
    enabled = {name for name, layer in qk.quantized_layers(model) if layer.enabled}
    scales = qk.named_scales(model)
    sizes = ((name, scale.detach().abs()) for name, scale in scales if name.rpartition(".")[0] in enabled)
    return [(name, size.mean().item(), size.min().item(), size.max().item()) for name, size in sizes]
