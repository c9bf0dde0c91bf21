"""Packed layers of several members against the quantized layers that they were packed from."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qkernels as qk
from qkernels.ops.packing import packed_bytes
from qkernels.packed.forms import know_libraries, stack
from qkernels.packed.packed_layer import quantize_members, runs_of
from qkernels.quantize.codes import weight_codes
from qkernels.quantize.quantizers import INQ, LSQ, ActivationLSQ


def assert_near(actual, expected):
    """Within 1e-5 of the largest magnitude: two orders of summing float32."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    bound = 1e-5 * expected.abs().max().clamp(min=1e-6)
    assert (actual - expected).abs().max() <= bound if actual.numel() else True


def in_turn(layers, x, shared):
    images = [x] * len(layers) if shared else x
    with torch.no_grad():
        return torch.stack([layer(image) for layer, image in zip(layers, images, strict=True)])


def of_members(layers, shared, *shape):
    """Random images: each member's, or those of all."""
    return torch.randn(*([] if shared else [len(layers)]), *shape)


@st.composite
def convolutions(draw):
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    depthwise = draw(st.booleans())
    in_channels = groups * draw(st.integers(1, 9))
    out_channels = in_channels * draw(st.integers(1, 2)) if depthwise else groups * draw(st.integers(1, 9))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    same = draw(st.sampled_from([False, False, "same", "valid"]))
    return {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "kernel_size": kernel,
        "stride": (1, 1) if same == "same" else draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        "padding": same or draw(st.tuples(st.integers(0, kernel[0] - 1), st.integers(0, kernel[1] - 1))),
        "dilation": draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        "groups": in_channels if depthwise else groups,
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"])),
    }


@given(
    convolutions(),
    st.lists(st.integers(2, 8), min_size=1, max_size=4),
    st.sampled_from(["channel", "tensor"]),
    st.integers(1, 3),
    st.booleans(),
)
def test_convolutions(arguments, bits, granularity, images, shared):
    layers = [qk.QConv2d(**arguments, quantizer=LSQ(b, granularity)) for b in bits]
    packed = qk.PackedConv2d.from_layers(layers)
    packed.shared = shared
    x = of_members(layers, shared, images, arguments["in_channels"], 9, 11)
    assert_near(packed(x), in_turn(layers, x, shared))
    count = layers[0].weight.numel()
    assert packed.weight_packed.numel() == sum(packed_bytes(count, b) for b in bits)
    for member, layer in enumerate(layers):
        dequantized = packed.dequantized_weight()[member].movedim(-1, 1)
        assert torch.equal(dequantized, layer.quantized_weight())


@given(
    st.integers(1, 40),
    st.integers(1, 20),
    st.booleans(),
    st.lists(st.integers(2, 8), min_size=1, max_size=4),
    st.sampled_from([(), (2,), (2, 3), (2, 2, 3)]),
    st.booleans(),
)
def test_linear_layers(inputs, outputs, bias, bits, lead, shared):
    layers = [qk.QLinear(inputs, outputs, bias, quantizer=LSQ(b)) for b in bits]
    packed = qk.PackedLinear.from_layers(layers)
    packed.shared = shared
    x = of_members(layers, shared, *lead, inputs)
    assert_near(packed(x), in_turn(layers, x, shared))


def test_only_convolutions_of_images_are_packed_as_such():
    with pytest.raises(ValueError, match=r"takes pairs of numbers, not \(3,\)"):
        qk.PackedConv2d(3, 4, (3,))


def test_timm_s_padding_depends_on_the_image():
    timm_layers = pytest.importorskip("timm.layers")
    know_libraries()
    layers = []
    for _ in range(2):
        model = nn.Sequential(timm_layers.Conv2dSame(3, 8, 3, stride=2))
        qk.quantize_(model, qk.QConfig(last_layer="same"))
        layers.append(model[0])
    packed = stack(layers)
    for size in (7, 8):
        x = torch.randn(2, 2, 3, size, size + 1)
        assert_near(packed(x), in_turn(layers, x, shared=False))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_learned_activations_stay_as_they_were_trained(signed, shared):
    layers = []
    for _ in range(3):
        layer = qk.QConv2d(4, 6, 3, padding=1, quantizer=LSQ(4), act_quantizer=ActivationLSQ(4))
        layer(torch.randn(2, 4, 8, 8) if signed else torch.rand(2, 4, 8, 8))
        layers.append(layer.eval())
    packed = qk.PackedConv2d.from_layers(layers)
    packed.shared = shared
    assert packed.input_range == ((-8, 7) if signed else (0, 15))
    x = of_members(layers, shared, 2, 4, 8, 8)
    assert_near(packed(x), in_turn(layers, x, shared))


def test_a_residual_that_broadcasts_is_added_all_the_same():
    layers = [qk.QConv2d(3, 4, 1) for _ in range(2)]
    packed = qk.PackedConv2d.from_layers(layers)
    packed.activation = "relu"
    x = torch.randn(2, 2, 3, 5, 5)
    for shape in ((2, 2, 4, 5, 5), (2, 2, 4, 1, 1)):
        residual = torch.randn(shape)
        assert_near(packed(x, residual), (in_turn(layers, x, False) + residual).relu())
    codes = torch.randint(0, 255, (2, 2, 4, 1, 1), dtype=torch.uint8)
    packed.quantize_input_(torch.full((2,), 0.02), (-128, 127))
    packed.residual_scale = torch.tensor([0.01, 0.02])
    packed.output_scale, packed.output_range = torch.tensor([0.03, 0.04]), (0, 255)
    whole = packed(x, codes.expand(2, 2, 4, 5, 5))
    assert whole.dtype == torch.uint8 and (packed(x, codes).int() - whole.int()).abs().max() <= 1


def test_half_precision_keeps_scales_in_float32():
    layers = [qk.QConv2d(8, 8, 3) for _ in range(2)]
    packed = qk.PackedConv2d.from_layers(layers).half()
    assert packed.weight_scale.dtype == packed.bias.dtype == torch.float32
    x = torch.randn(2, 2, 8, 6, 6).half()
    expected = in_turn(layers, x.float(), shared=False)
    assert packed(x).dtype == torch.float16
    assert (packed(x) - expected).abs().max() <= 2e-3 * expected.abs().max()


def test_folding_an_affine_map_does_not_change_the_codes():
    packed = qk.PackedConv2d.from_layers([qk.QConv2d(3, 4, 3, bias=False) for _ in range(2)])
    x = torch.randn(2, 2, 3, 6, 6)
    before, codes = packed(x), packed.weight_packed.clone()
    factor, shift = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    packed.rescale_(factor, shift)
    expected = before * factor[:, None, :, None, None] + shift[:, None, :, None, None]
    assert_near(packed(x), expected.float())
    assert torch.equal(packed.weight_packed, codes)


def test_members_of_equal_bits_run_together():
    runs = runs_of([7, 7, 3, 7], 300)
    assert [(r.members.start, r.members.stop, r.bits) for r in runs] == [(0, 2, 7), (2, 3, 3), (3, 4, 7)]
    assert [r.bytes.stop for r in runs] == [2 * 448, 2 * 448 + 192, 3 * 448 + 192]


def test_codes_are_the_integers_of_the_fake_quantized_weight():
    for granularity in ("channel", "tensor"):
        layer = qk.QConv2d(3, 5, 3, quantizer=LSQ(5, granularity))
        codes, scale = weight_codes(layer)
        assert codes.dtype == torch.int8 and codes.min() >= -16 and codes.max() <= 15
        assert torch.equal(codes * scale[:, None, None, None], layer.quantized_weight())


def test_powers_of_two_are_refused():
    layer = qk.QConv2d(3, 5, 3, quantizer=INQ(5))
    with pytest.raises(TypeError, match="INQ weights are not integers times a scale"):
        qk.PackedConv2d.from_layers([layer])


def test_padding_has_to_be_known():
    with pytest.raises(ValueError, match="padding 'full'"):
        qk.PackedConv2d(3, 4, 3, padding="full")


def test_each_member_has_its_own_scale():
    x = torch.randn(4, 3, 2, 2)
    scale = torch.tensor([0.1, 0.2])
    codes = quantize_members(x, scale, (-128, 127))
    assert torch.equal(codes[:2], (x[:2] / 0.1).round().to(torch.int8))
    assert torch.equal(codes[2:], (x[2:] / 0.2).round().to(torch.int8))


def test_copies_and_compiles():
    packed = qk.PackedConv2d.from_layers([qk.QConv2d(3, 4, 3) for _ in range(2)])
    x = torch.randn(2, 1, 3, 6, 6)
    expected = packed(x)
    assert torch.equal(copy.deepcopy(packed)(x), expected)
    assert_near(torch.compile(packed, fullgraph=True, backend="aot_eager")(x), expected)
    assert "bits=7" in repr(packed)
