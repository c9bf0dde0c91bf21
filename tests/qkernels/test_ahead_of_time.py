"""The Triton kernels compiled for GPUs that need not be here: registers, spills, instructions.

Run as a script it compiles every kernel for one architecture and prints a JSON object; the tests do so in a subprocess,
because TRITON_INTERPRET=1 in this process leaves nothing to compile.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

WIDE_LOAD, WIDE_STORE = "ld.global.v4.b32", "st.global.v4.b32"
MAX_REGISTERS = 128  # two programs of 256 threads, or sixteen warps, on a multiprocessor of 65536 registers


def compile_all(architecture: int) -> dict[str, dict]:
    """name -> {"registers", "stack_bytes", "instructions"} of each kernel, at the launch parameters of the table."""
    import triton.language as tl

    from qkernels.triton import fake_quantize, fake_quantize_multi, launch, mean_abs

    parameters = launch._TABLE[None]
    compiled = {}

    def add(name, kernel, launched_as, pointers, constants, aligned=True, integer="i32"):
        floats = {"qmin", "qmax", "inside_min", "inside_max", "factor"}
        types = {a: "constexpr" if a in constants else pointers.get(a, integer) for a in kernel.arg_names}
        types |= {a: "fp32" for a in kernel.arg_names if a in floats}
        # What a launch finds out by itself, of arguments it may specialize: addresses and extents that 16 divides.
        may_divide = {*pointers, "kept", "summed", "kept_stride", "summed_stride", "segment"}
        by_16 = [a for a in types if a in may_divide and a not in constants]
        compiled[name] = compile_kernel(
            kernel, architecture, types, constants, by_16 if aligned else [], parameters[launched_as].num_warps
        )

    def tiles(launched_as):
        block = parameters[launched_as].block
        return {
            "rows": {"summed_stride": 1, "BLOCK_KEPT": 1, "BLOCK_SUMMED": block},
            "short rows": {"summed_stride": 1, "BLOCK_KEPT": 16, "BLOCK_SUMMED": block // 16},
            "columns": {"kept_stride": 1, "BLOCK_KEPT": 128, "BLOCK_SUMMED": block // 128},
        }

    names = ("x_ptr", "y_ptr", "grad_ptr", "grad_x_ptr")
    for dtype, tl_dtype in (("fp32", tl.float32), ("bf16", tl.bfloat16)):
        scales = ("scale_ptr", "offset_ptr", "scale_sums_ptr", "offset_sums_ptr", "sums_ptr")
        pointers = dict.fromkeys(names, "*" + dtype) | dict.fromkeys(scales, "*fp32")
        no_offset = {"offset_ptr": None, "offset_sums_ptr": None}
        for shape, constants in tiles("forward").items():
            forward = fake_quantize._forward_kernel
            add(f"forward {dtype} {shape}", forward, "forward", pointers, constants | {"offset_ptr": None})
            add(f"forward offset {dtype} {shape}", forward, "forward", pointers, constants)
        for shape, constants in tiles("backward").items():
            backward = fake_quantize._backward_kernel
            add(f"backward {dtype} {shape}", backward, "backward", pointers, constants | no_offset)
            add(f"backward offset {dtype} {shape}", backward, "backward", pointers, constants)
            no_sums = no_offset | {"scale_sums_ptr": None}
            add(f"backward without sums {dtype} {shape}", backward, "backward", pointers, constants | no_sums)
        for shape, constants in tiles("mean_abs").items():
            add(f"mean_abs {dtype} {shape}", mean_abs._abs_sums_kernel, "mean_abs", pointers, constants)
        rows = tiles("forward")["rows"] | {"offset_ptr": None}
        add(f"unaligned {dtype}", fake_quantize._forward_kernel, "forward", pointers, rows, aligned=False)
        add(f"huge {dtype}", fake_quantize._forward_kernel, "forward", pointers, rows, integer="i64")
        table = {"table_ptr": "*i64", "partials_ptr": "*fp32"}
        types = {"X_TYPE": tl_dtype, "LAYERS": 64, "BLOCK": parameters["multi_forward"].block}
        forward, backward = fake_quantize_multi._forward_kernel, fake_quantize_multi._backward_kernel
        add(f"multi forward {dtype}", forward, "multi_forward", table, types | {"OUT_TYPE": tl_dtype})
        types |= {"GRAD_TYPE": tl_dtype, "PARAM_GRADS": True, "BLOCK": parameters["multi_backward"].block}
        add(f"multi backward {dtype}", backward, "multi_backward", table, types | {"partials_ptr": None})
        add(f"multi backward partials {dtype}", backward, "multi_backward", table, types)
    fold = {"BLOCK": parameters["multi_fold"].block}
    add("multi fold", fake_quantize_multi._fold_kernel, "multi_fold", table, fold)
    return compiled


def compile_kernel(kernel, architecture, types, constants, by_16, num_warps) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attributes = {(kernel.arg_names.index(a),): [["tt.divisibility", 16]] for a in by_16}
    binary = triton.compile(
        ASTSource(kernel, types, constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": num_warps, "enable_fp_fusion": False},
    )
    beside_triton = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    cuobjdump = str(beside_triton) if beside_triton.exists() else shutil.which("cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    ptx = binary.asm["ptx"]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "instructions": sorted(set(re.findall(r"^\s*(?:@%?!?%?\w+ )?([a-z]\w*(?:\.\w+)+)", ptx, re.MULTILINE))),
        "constants": sorted(set(re.findall(r"0f[0-9A-F]{8}", ptx))),
    }


@pytest.fixture(scope="module", params=[80, 90], ids=["sm_80", "sm_90"])
def compiled(request, tmp_path_factory):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("QKERNELS_")}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    run = subprocess.run(
        [sys.executable, __file__, str(request.param)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_registers_and_spills(compiled):
    for name, kernel in compiled.items():
        assert kernel["stack_bytes"] == 0, f"{name} spills {kernel['stack_bytes']} bytes"
        assert kernel["registers"] <= MAX_REGISTERS, f"{name} takes {kernel['registers']} registers"


def test_arithmetic_is_ieee(compiled):
    """Division rounded to nearest, nothing fused or flushed to zero, and the rounding to integers not folded away."""
    for name, kernel in compiled.items():
        instructions = kernel["instructions"]
        forbidden = [i for i in instructions if re.match(r"div\.(full|approx)|fma\.|mad\.\w*f32|rcp|.*ftz", i)]
        assert not forbidden, f"{name}: {forbidden}"
        if "mean_abs" not in name and "fold" not in name:
            assert "div.rn.f32" in instructions, name
        if "without sums" not in name and "mean_abs" not in name and "fold" not in name:
            assert {"0f4B400000", "0fCB400000"} <= set(kernel["constants"]), f"{name}: v + 1.5*2**23 - 1.5*2**23"


def test_accesses_are_16_bytes_wide(compiled):
    for name, kernel in compiled.items():
        if "fold" in name or "unaligned" in name:
            continue
        assert WIDE_LOAD in kernel["instructions"], name
        assert WIDE_STORE in kernel["instructions"] or "mean_abs" in name, name


def test_unaligned_accesses_are_narrow(compiled):
    for name, kernel in compiled.items():
        if "unaligned" in name:
            assert not [i for i in kernel["instructions"] if re.match(r"(ld|st)\.global.*\.v\d", i)], name


def test_bfloat16_is_rounded_to_nearest_even(compiled):
    for name, kernel in compiled.items():
        if "bf16" in name and "forward" in name:
            assert any(re.match(r"cvt\.rn\.bf16(x2)?\.f32", i) for i in kernel["instructions"]), name


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]))))
