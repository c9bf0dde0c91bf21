"""`pack`, `unpack`, `quantize`, `dequantize_packed` in every GPU backend against the reference, or emulated."""

import pytest
import torch

from on_gpu import DEVICE, assert_equal, needs_gpu, random_codes, unaligned
from qkernels.ops import reference
from qkernels.ops.packing import packed_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "unaligned"])
def test_pack_and_unpack(backend, bits, layout):
    for shape in [(0,), (1,), (3, 5), (255,), (256,), (257,), (2048, 33), (64, 3, 7, 7), (3, 1000, 1001)]:
        for dtype in (torch.int8, torch.uint8):
            codes = random_codes(shape, dtype)
            if layout == "transposed":
                codes = codes.flip(0).movedim(-1, 0).contiguous().movedim(0, -1)
            elif layout == "unaligned":
                codes = unaligned(codes)
            packed = backend("pack")(codes, bits)
            assert_equal(packed, reference.pack(codes.contiguous(), bits))
            for signed in (True, False):
                expected = reference.unpack(packed, bits, codes.numel(), signed)
                assert_equal(backend("unpack")(packed, bits, codes.numel(), signed), expected)


def test_unpack_many(backend):
    """Any bytes are codes: also behind the last one, and in every member."""
    for bits, count in ((7, 300), (2, 70_001), (8, 64 * 147), (5, 1)):
        packed = random_codes((2, 3, packed_bytes(count, bits)), torch.uint8)
        for t in (packed, unaligned(packed), packed[:, ::2]):
            assert_equal(backend("unpack")(t, bits, count, True), reference.unpack(t, bits, count, True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_packed(backend, dtype):
    for bits, members, channels, depth in ((7, 5, 512, 4608), (4, 2, 1000, 1), (3, 3, 17, 33), (2, 1, 1, 70_001)):
        count = channels * depth
        packed = random_codes((members, packed_bytes(count, bits)), torch.uint8)
        scale = torch.randn(members, channels, device=DEVICE)
        expected = reference.dequantize_packed(packed, scale, bits, count, dtype)
        assert_equal(backend("dequantize_packed")(packed, scale, bits, count, dtype), expected)
        assert_equal(backend("dequantize_packed")(unaligned(packed), scale, bits, count, dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every other", "unaligned"])
def test_quantize(backend, dtype, layout):
    for shape in [(1, 1, 1, 1), (3, 5, 7, 7), (8, 96, 28, 28), (64, 3, 1, 1), (16, 2048, 1, 1), (5, 17, 33, 65)]:
        for axis in (None, 0, 1, 3):
            x = (torch.randn(shape) * 20).to(dtype)
            x.view(-1)[::5] = (torch.randint(-200, 200, x.view(-1)[::5].shape) / 8).to(dtype)  # many of them ties
            x.view(-1)[:: max(7, x.numel() // 9)] = torch.nan
            scale = torch.full((1 if axis is None else shape[axis],), 0.25)
            scale[::3], scale[4::9] = 0.013, torch.nan
            scale = scale.reshape(()) if axis is None else scale
            on_gpu = x.to(DEVICE)
            if layout == "channels_last":
                on_gpu = on_gpu.contiguous(memory_format=torch.channels_last)
            elif layout == "every other":
                on_gpu = torch.stack([on_gpu, on_gpu], -1)[..., 0]
            elif layout == "unaligned":
                on_gpu = unaligned(on_gpu)
            for qmin, qmax in ((-128, 127), (0, 255), (3, 9)):
                codes = backend("quantize")(on_gpu, scale.to(DEVICE), qmin, qmax, axis)
                assert_equal(codes, reference.quantize(x, scale, qmin, qmax, axis))


@needs_gpu
@pytest.mark.xdist_group("tens of gigabytes")
def test_more_than_2_31_codes(backend):
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GB of GPU memory")
    count, bits, tail = 2**31 + 1000, 7, 3 * 256 + 1000 % 256
    codes = torch.empty(count, dtype=torch.int8, device=DEVICE).random_(-64, 64)
    packed = backend("pack")(codes, bits)
    assert torch.equal(packed[-4 * 32 * bits :], reference.pack(codes[-tail:], bits))
    assert torch.equal(backend("unpack")(packed, bits, count, True), codes)
    del codes
    x = torch.empty(count, dtype=torch.float16, device=DEVICE).normal_()
    scale = torch.tensor(0.05, device=DEVICE)
    quantized = backend("quantize")(x, scale, -8, 7, None)
    for part in (slice(0, 1 << 20), slice(count - (1 << 20), count)):
        assert torch.equal(quantized[part], reference.quantize(x[part], scale, -8, 7, None))
