"""The Triton kernels compiled for GPUs that need not be here: registers, spills, instructions.

Run as a script it compiles every kernel for one architecture and prints a JSON object; the tests do so in a subprocess,
because TRITON_INTERPRET=1 in this process leaves nothing to compile.
"""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

WIDE_LOAD, WIDE_STORE = "ld.global.v4.b32", "st.global.v4.b32"
UNASKED = r"div\.(full|approx)|fma\.|mad\.\w*f32|rcp|.*ftz"  # less than IEEE arithmetic, or two roundings made one
MAX_REGISTERS = 128  # two programs of 256 threads, or sixteen warps, on a multiprocessor of 65536 registers
MAX_CONV_REGISTERS = 255  # one program of 256 threads; the tile of sums alone takes 64 a thread


def tiles_of(launched_as: str) -> dict[str, dict[str, int]]:
    """Constants of the kernels of one tensor, by how it is laid out."""
    from qkernels.triton import launch

    block = launch._TABLE[None][launched_as].block
    return {
        "rows": {"summed_stride": 1, "BLOCK_KEPT": 1, "BLOCK_SUMMED": block},
        "short rows": {"summed_stride": 1, "BLOCK_KEPT": 16, "BLOCK_SUMMED": block // 16},
        "columns": {"kept_stride": 1, "BLOCK_KEPT": 128, "BLOCK_SUMMED": block // 128},
    }


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
            kernel,
            architecture,
            types,
            {(kernel.arg_names.index(a),): value for a, value in constants.items()},
            [(kernel.arg_names.index(a),) for a in by_16] if aligned else [],
            num_warps=parameters[launched_as].num_warps,
        )

    names = ("x_ptr", "y_ptr", "grad_ptr", "grad_x_ptr")
    for dtype, tl_dtype in (("fp32", tl.float32), ("bf16", tl.bfloat16)):
        scales = ("scale_ptr", "offset_ptr", "scale_sums_ptr", "offset_sums_ptr", "sums_ptr")
        pointers = dict.fromkeys(names, "*" + dtype) | dict.fromkeys(scales, "*fp32")
        no_offset = {"offset_ptr": None, "offset_sums_ptr": None}
        for shape, constants in tiles_of("forward").items():
            forward = fake_quantize._forward_kernel
            add(f"forward {dtype} {shape}", forward, "forward", pointers, constants | {"offset_ptr": None})
            add(f"forward offset {dtype} {shape}", forward, "forward", pointers, constants)
        for shape, constants in tiles_of("backward").items():
            backward = fake_quantize._backward_kernel
            add(f"backward {dtype} {shape}", backward, "backward", pointers, constants | no_offset)
            add(f"backward offset {dtype} {shape}", backward, "backward", pointers, constants)
            no_sums = no_offset | {"scale_sums_ptr": None}
            add(f"backward without sums {dtype} {shape}", backward, "backward", pointers, constants | no_sums)
        for shape, constants in tiles_of("mean_abs").items():
            add(f"mean_abs {dtype} {shape}", mean_abs._abs_sums_kernel, "mean_abs", pointers, constants)
        rows = tiles_of("forward")["rows"] | {"offset_ptr": None}
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


class Recorder:
    """Stands in for a kernel and keeps the arguments of its launches."""

    def __init__(self, kernel) -> None:
        self.kernel = kernel
        self.launches: list[tuple[tuple, dict]] = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append((arguments, options))


def convolve(x_dtype, in_shape, channels, kernel, stride=1, groups=1, residual=True, bits=7, activation="relu6"):
    """Launch one layer of two members, 32 images each, or one of 7x7 or 8x8; padded to the same size.

    Of 32 images the codes are decoded first, of one in each program.
    """
    import torch

    from qkernels.ops.geometry import Geometry
    from qkernels.ops.packing import packed_bytes
    from qkernels.triton import packed_conv2d

    n, pad = 2 * {7: 1, 8: 1}.get(in_shape[1], 32), kernel // 2
    geometry = Geometry((kernel, kernel), (stride, stride), (pad,) * 4, (1, 1), groups)
    x = torch.zeros(n, *in_shape, dtype=x_dtype).to(memory_format=torch.channels_last)
    packed = torch.zeros(2, packed_bytes(channels * kernel**2 * in_shape[0] // groups, bits), dtype=torch.uint8)
    scale, ones = torch.zeros(2, channels), torch.zeros(2)
    out = torch.zeros(n, channels, *geometry.output_size(*in_shape[1:]), dtype=x_dtype) if residual else None
    if x_dtype.is_floating_point:
        packed_conv2d.packed_conv2d(x, packed, scale, scale, out, bits, *geometry.arguments, False, "relu")
    else:
        vectors = (scale, scale, out, ones if residual else None, ones, bits)
        packed_conv2d.packed_conv2d_int8(
            x, ones, packed, *vectors, *geometry.arguments, False, activation, 0, torch.iinfo(x_dtype).max, x_dtype
        )


def compile_packed(architecture: int) -> dict[str, dict]:
    """What `compile_all` gives, of the kernels of packed inference, at the launches of layers of ResNet-50 and others.

    The layers run on CPU tensors, with a recorder in the place of each kernel, as if this were a GPU of 132
    multiprocessors.
    """
    import torch

    from qkernels.ops.packing import packed_bytes
    from qkernels.triton import packed_conv2d, packing, tuning

    tuning._multiprocessors = lambda device: 132
    modules = {
        packed_conv2d: ("conv_kernel", "decode_kernel", "fold_kernel", "depthwise_kernel"),
        packing: ("_pack_kernel", "_unpack_kernel", "_quantize_kernel"),
    }
    recorders = {name: Recorder(getattr(module, name)) for module, names in modules.items() for name in names}
    for module, names in modules.items():
        for name in names:
            setattr(module, name, recorders[name])

    compiled = {}

    def add(name, run):
        run()
        for recorder in recorders.values():
            for arguments, options in recorder.launches:
                other = next((f" {k}" for k in ("decode", "fold") if recorder is recorders[f"{k}_kernel"]), "")
                compiled[name + other] = compile_launch(recorder.kernel, architecture, arguments, dict(options))
            recorder.launches.clear()

    deep, late, few, narrow = (128, 28, 28), (512, 7, 7), (128, 8, 8), (24, 56, 56)
    add("conv int8 shifted decoded", lambda: convolve(torch.uint8, deep, 128, 3))
    add("conv int8 shifted", lambda: convolve(torch.uint8, few, 128, 3))
    add("conv int8 decoded", lambda: convolve(torch.int8, deep, 128, 3))
    add("conv int8", lambda: convolve(torch.int8, few, 128, 3))
    add("conv int8 split", lambda: convolve(torch.uint8, late, 512, 3))
    add("conv int8 narrow", lambda: convolve(torch.uint8, narrow, 144, 1, residual=False))
    add("conv int8 odd words", lambda: convolve(torch.uint8, (20, 28, 28), 64, 1, residual=False))
    add("conv int8 stem", lambda: convolve(torch.uint8, (3, 112, 112), 64, 7, stride=2, residual=False))
    add("conv bf16 decoded", lambda: convolve(torch.bfloat16, deep, 128, 3))
    add("conv bf16", lambda: convolve(torch.bfloat16, few, 128, 3))
    add("conv bf16 stem", lambda: convolve(torch.bfloat16, (3, 112, 112), 64, 7, stride=2, residual=False))
    add("conv fp32", lambda: convolve(torch.float32, deep, 128, 3))
    add("depthwise int8", lambda: convolve(torch.uint8, (144, 56, 56), 144, 3, groups=144, residual=False))
    small = partial(convolve, torch.uint8, (8, 7, 7), 8, 3, groups=8, residual=False)
    for name in ("hardswish", "hardsigmoid", "gelu", "gelu_tanh"):
        add(f"depthwise int8 {name}", partial(small, activation=name))
    add("depthwise bf16", lambda: convolve(torch.bfloat16, (144, 56, 56), 144, 3, groups=144, residual=False))
    packed, scale = torch.zeros(2, packed_bytes(6400, 7), dtype=torch.uint8), torch.ones(2, 64)
    add("pack", lambda: packing.pack(torch.zeros(6400, dtype=torch.int8), 7))
    add("unpack", lambda: packing.unpack(packed, 7, 6400, True))
    add("dequantize", lambda: packing.dequantize_packed(packed, scale, 7, 6400, torch.float32))
    add("quantize", lambda: packing.quantize(torch.zeros(4096), torch.ones(()), 0, 255, None))
    return compiled


def compile_launch(kernel, architecture, arguments, options) -> dict:
    """Compile a kernel as a launch with these arguments would."""
    constants = {(kernel.arg_names.index(a),): options.pop(a) for a in kernel.arg_names if a in options}
    types, by_16 = dict.fromkeys(kernel.arg_names, "constexpr"), []

    def type_of(value, at, specialize):
        """The type of an argument or, of a tuple's, those of its elements; `at` is where it stands."""
        from triton.runtime.jit import mangle_type

        if isinstance(value, tuple):
            return type(value)(*(type_of(each, (*at, i), specialize) for i, each in enumerate(value)))
        found = mangle_type(value, specialize=specialize)
        if found == "constexpr":
            constants[at] = value
        elif found.startswith("*") or (specialize and isinstance(value, int) and value % 16 == 0):
            by_16.append(at)
        return found

    for i, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        types[name] = type_of(value, (i,), name not in kernel.do_not_specialize)
    return compile_kernel(kernel, architecture, types, constants, by_16, **options)


def compile_kernel(kernel, architecture, types, constants, by_16, **options) -> dict:
    """Compile a kernel with arguments of these types; `constants` and `by_16`, what 16 divides, go by places."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attributes = {at: [["tt.divisibility", 16]] for at in by_16}
    binary = triton.compile(
        ASTSource(kernel, types, constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"enable_fp_fusion": False} | options,
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
        "copied_bytes": sorted({int(n, 0) for n in re.findall(r"cp\.async\.c[ag]\..*?\], (\w+)", ptx)}),
        "constants": sorted(set(re.findall(r"0f[0-9A-F]{8}", ptx))),
    }


def compile_elsewhere(which: str, architecture: int, tmp_path_factory) -> dict[str, dict]:
    """What the function `which` of this file returns, in a process without the interpreter: once for all of xdist's."""
    pytest.importorskip("triton")
    base = tmp_path_factory.getbasetemp()
    file = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"{which}_{architecture}.json"
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            file.write_text(_compile_elsewhere(which, architecture, tmp_path_factory))
        return json.loads(file.read_text())


def _compile_elsewhere(which: str, architecture: int, tmp_path_factory) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("QKERNELS_")}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, __file__, which, str(architecture)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


# .ci/run compiles for both, with the oldest Triton.
@pytest.fixture(
    scope="module", params=[pytest.param(80, marks=pytest.mark.nightly, id="sm_80"), pytest.param(90, id="sm_90")]
)
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def compiled(architecture, tmp_path_factory):
    return compile_elsewhere("compile_all", architecture, tmp_path_factory)


@pytest.fixture(scope="module")
def packed(architecture, tmp_path_factory):
    return compile_elsewhere("compile_packed", architecture, tmp_path_factory)


def test_registers_and_spills(compiled):
    for name, kernel in compiled.items():
        assert kernel["stack_bytes"] == 0, f"{name} spills {kernel['stack_bytes']} bytes"
        assert kernel["registers"] <= MAX_REGISTERS, f"{name} takes {kernel['registers']} registers"


def test_arithmetic_is_ieee(compiled):
    """Division rounded to nearest, nothing fused or flushed to zero, and the rounding to integers not folded away.

    The forward corrects its quotients by fused multiplications, which are rounded once.
    """
    for name, kernel in compiled.items():
        instructions = kernel["instructions"]
        own = "fma.rn.f32" if "forward" in name or name.startswith(("unaligned", "huge")) else None
        forbidden = [i for i in instructions if i != own and re.match(UNASKED, i)]
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


def test_packed_registers_and_spills(packed):
    for name, kernel in packed.items():
        assert kernel["stack_bytes"] == 0, f"{name} spills {kernel['stack_bytes']} bytes"
        # A division in the activation takes some that a depthwise convolution would share with another program.
        most = MAX_CONV_REGISTERS if name.startswith(("conv", "depthwise int8 ")) else MAX_REGISTERS
        assert kernel["registers"] <= most, f"{name} takes {kernel['registers']} registers"


def test_convolutions_run_on_tensor_cores(packed, architecture):
    products = {
        80: {"int8": "mma.sync.*.m16n8k32.*.s8.s8", "bf16": "mma.sync.*.bf16.bf16", "fp32": "mma.sync.*.tf32.tf32"},
        90: {"int8": "wgmma.mma_async.*.s8.s8", "bf16": "wgmma.mma_async.*.bf16.bf16", "fp32": "wgmma.*.tf32.tf32"},
    }
    convolutions = {name: kernel for name, kernel in packed.items() if re.match("conv (?!.*(fold|decode$))", name)}
    assert len(convolutions) == 12
    for name, kernel in convolutions.items():
        pattern = products[architecture][name.split()[1]]
        assert any(re.match(pattern, i) for i in kernel["instructions"]), name


def test_convolutions_load_ahead(packed):
    """Codes and x travel to shared memory while the tensor cores work, as wide as their alignment allows.

    Packed codes take 8 bytes at a time, decoded ones 16. A stem has three channels and one of zeros.
    """
    usual = {"odd words": [4], "narrow": [8], "int8 stem": [4], "bf16 stem": [8], "decoded": [16]}
    for name, kernel in packed.items():
        if re.match("conv (?!.*(fold|decode$))", name):
            copies = next((copies for kind, copies in usual.items() if kind in name), [8, 16])
            assert kernel["copied_bytes"] == copies, name
            assert WIDE_STORE in kernel["instructions"], name


def test_packed_arithmetic_is_ieee(packed):
    for name, kernel in packed.items():
        instructions = kernel["instructions"]
        own = "fma.rn.f32" if "int8" in name or name == "quantize" else None  # where results become codes
        forbidden = [i for i in instructions if i != own and re.match(UNASKED, i)]
        assert not forbidden, f"{name}: {forbidden}"
        if name == "quantize" or ("int8" in name and not name.endswith("decode") and f"{name} fold" not in packed):
            assert "div.rn.f32" in instructions, name
            assert {"0f4B400000", "0fCB400000"} <= set(kernel["constants"]), f"{name}: v + 1.5*2**23 - 1.5*2**23"


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](int(sys.argv[2]))))
