"""ONNX Runtime, which many deploy on CPUs with: a network as it is, and quantized to int8 by its own tools."""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from .machine import instructions
from .peers import Forward, require

INPUT = "images"
OPSET = 20  # the first that has GELU
PRODUCTS = ["Conv", "MatMul", "Gemm"]
WITHOUT_SATURATION = ("AMX", "AVX-512 VNNI")  # elsewhere sums of two products uint8 * int8 may exceed int16


def float_session(model: nn.Module, images: Tensor) -> Forward:
    """The network as exported, for as many images as these."""
    with exported(model, images) as file:
        return session(file)


def int8_session(model: nn.Module, images: Tensor, calibration: Tensor, share_cores: bool = False) -> Forward:
    """int8 weights by channel and uint8 activations, their ranges the least and greatest values on `calibration`.

    Networks with attention keep floats between products: about the same speed, several times less error.

    Args:
        images: the session takes as many.
        calibration: images [K * N, ...].
        share_cores: other sessions run right after it.
    """
    with exported(model, images) as file:
        import onnx
        from onnxruntime import quantization

        class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self.batches = iter(calibration.contiguous().split(len(images)))

            def get_next(self) -> dict[str, Any] | None:
                batch = next(self.batches, None)
                return None if batch is None else {INPUT: batch.numpy()}

        prepared, quantized = file.with_name("prepared.onnx"), file.with_name("quantized.onnx")
        quantization.quant_pre_process(str(file), str(prepared))
        attention = any(node.op_type == "Softmax" for node in onnx.load(prepared).graph.node)
        quantization.quantize_static(
            str(prepared),
            str(quantized),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=PRODUCTS if attention else None,
            per_channel=True,
            reduce_range=instructions() not in WITHOUT_SATURATION,
            activation_type=quantization.QuantType.QUInt8,  # twice as fast as QInt8
            weight_type=quantization.QuantType.QInt8,
        )
        return session(quantized, share_cores)


@contextlib.contextmanager
def exported(model: nn.Module, images: Tensor) -> Iterator[Path]:
    """The network in a file of ONNX, which lasts as long as the context.

    Raises:
        Absent: where ONNX or ONNX Runtime are not installed.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "float.onnx"
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # its progress
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (images.contiguous(),),
                file,
                input_names=[INPUT],
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        yield file


def session(file: Path, share_cores: bool = False) -> Forward:
    """What is in a file, on PyTorch's number of threads.

    They spin on after a call, waiting for the next. Of five sessions in turn the threads of four then take cores from
    the fifth, which makes all three times as slow: such sessions are told to stop.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    if share_cores:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    run: Callable[..., Any] = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"]).run

    def forward(x: Tensor) -> Tensor:
        (logits,) = run(None, {INPUT: x.numpy()})
        return torch.from_numpy(logits)

    return forward
