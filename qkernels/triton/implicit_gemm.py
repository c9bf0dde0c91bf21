"""A convolution of M members as one matrix product on tensor cores: out^T [channels, pixels] = codes @ patches.

The sum runs over depth = (tap, input channel), in the order in which a weight is packed, and x is [pixels, channels] in
memory (channels_last). The weights are the left operand because Hopper's wgmma takes that one from registers, where the
codes are unpacked; x goes from memory to shared memory as it is.
"""

import triton
import triton.language as tl

from .codes import bytes_of_words, load_codes, load_signed_words, signed
from .packed_epilogue import finish


@triton.jit
def _weights(packed_ptr, channel, tile, depth, BITS, ALIGNED, EVEN, BLOCK_DEPTH):
    """Codes int8 [channels, BLOCK_DEPTH] of one member at depth tile * BLOCK_DEPTH; 0 beyond `depth`."""
    if ALIGNED >= 4:
        words = (depth // ALIGNED * (ALIGNED // 4)).to(channel.dtype)
        n = (tile * (BLOCK_DEPTH // 4) + tl.arange(0, BLOCK_DEPTH // 4)).to(channel.dtype)
        mask = None if EVEN else (n < words)[None, :]
        n = channel[:, None] * words + n[None, :]
        return bytes_of_words(load_signed_words(packed_ptr, n, mask, BITS, ALIGNED >= 8))
    k = (tile * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)).to(channel.dtype)
    depth = depth.to(channel.dtype)
    mask = None if EVEN else (k < depth)[None, :]
    return signed(load_codes(packed_ptr, channel[:, None] * depth + k[None, :], mask, BITS), BITS)


@triton.jit
def _decoded_weights(codes_ptr, channel, tile, depth, ALIGNED, EVEN, BLOCK_DEPTH):
    """The same of what `decode_kernel` wrote, in its type."""
    k = (tile * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)).to(channel.dtype)
    depth = (depth // ALIGNED * ALIGNED).to(channel.dtype)
    mask = None if EVEN else (k < depth)[None, :]
    return tl.load(codes_ptr + (channel[:, None] * depth + k[None, :]), mask, other=None if EVEN else 0)


@triton.jit
def _split_to_tf32(x):
    """float32 x = high + low, both of them tf32 but for the last bit of low.

    A code is exact in tf32, so two products on tensor cores are accurate to 2**-23 of each term: what float32 gives.
    One tf32 product would be accurate to 2**-11, and tf32x3 spends a third product on the low part of the codes, which
    is zero. Values that rounding could overflow, infinity and NaN are left whole.
    """
    high = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    splits = tl.abs(x) < 2.0**127
    return tl.where(splits, high, x), tl.where(splits, x - high, 0.0)


@triton.jit(do_not_specialize=["channels", "depth", "depth_per_tap", "packed_member"])
def decode_kernel(
    packed_ptr,
    codes_ptr,
    code_sums_ptr,
    channels,
    depth,
    depth_per_tap,
    packed_member,
    BITS: tl.constexpr,
    PAD: tl.constexpr,
    DEPTH_ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """BLOCK_CHANNELS channels of a member a program: reads BITS / 8 B and writes one element a code.

    PAD: codes of 0 that follow those of each tap; depth and depth_per_tap count them. code_sums: int32
    [members, channels], the sum of each channel's codes, or None. The rest is as in `conv_kernel`.
    """
    depth = depth // DEPTH_ALIGNED * DEPTH_ALIGNED
    member = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    row = tl.minimum(channel, channels - 1).to(tl.uint64 if WIDE else tl.uint32)
    packed_ptr += member.to(tl.int64) * (packed_member // 8 * 8)
    codes_ptr += member.to(tl.int64) * channels * depth
    sums = tl.zeros([BLOCK_CHANNELS], tl.int32)
    for tile in range(tl.cdiv(depth, BLOCK_DEPTH)):
        k = tile * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)
        if PAD:
            tap, in_channel = k // depth_per_tap, k % depth_per_tap
            taps, in_channels = depth // depth_per_tap, depth_per_tap - PAD
            packed_at = row[:, None] * (taps * in_channels).to(row.dtype)
            packed_at += (tap * in_channels + in_channel)[None, :].to(row.dtype)
            mask = ((in_channel < in_channels) & (k < depth))[None, :]
            codes = signed(load_codes(packed_ptr, packed_at, mask, BITS), BITS)
        else:
            codes = _weights(packed_ptr, row, tile, depth, BITS, DEPTH_ALIGNED, EVEN, BLOCK_DEPTH)
        at = row[:, None] * depth.to(row.dtype) + k[None, :].to(row.dtype)
        mask = (channel < channels)[:, None] & (k < depth)[None, :]
        tl.store(codes_ptr + at, codes.to(codes_ptr.dtype.element_ty), mask)
        sums += tl.sum(codes.to(tl.int32), 1)
    if code_sums_ptr is not None:
        tl.store(code_sums_ptr + member * channels + channel, sums, channel < channels)


@triton.jit(
    do_not_specialize=[
        "channel_tiles",
        "pixel_tiles",
        "groups",
        "walked",
        "packed_member",
        "x_member",
        "pixels",
        "channels",
        "depth",
        "depth_per_tap",
        "in_channels",
        "height",
        "width",
        "out_height",
        "out_width",
        "stride_h",
        "stride_w",
        "pad_top",
        "pad_left",
        "dilation_h",
        "dilation_w",
    ]
)
def conv_kernel(
    x_ptr,
    packed_ptr,
    code_sums_ptr,
    partials_ptr,
    epilogue,
    channel_tiles,
    pixel_tiles,
    groups,
    walked,
    packed_member,
    x_member,
    pixels,
    channels,
    depth,
    depth_per_tap,
    in_channels,
    height,
    width,
    out_height,
    out_width,
    stride_h,
    stride_w,
    pad_top,
    pad_left,
    dilation_h,
    dilation_w,
    BITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DOT: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    PADDED: tl.constexpr,
    ONE_TAP: tl.constexpr,
    DEPTH_ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    IN_ALIGNED: tl.constexpr,
    OUT_ALIGNED: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """A program computes a tile [BLOCK_CHANNELS, BLOCK_PIXELS] of a member's output, or one split of its sum.

    Reads the tile's weights and patches once and writes its outputs once: depth * (BLOCK_CHANNELS * BITS / 8 +
    BLOCK_PIXELS * itemsize) B for depth * BLOCK_CHANNELS * BLOCK_PIXELS multiply-adds. Programs side by side share
    their patches, then come the other pixels, whose programs find the member's weights in the second-level cache.

    pixels: of a member's output, images included; channels: of all groups; walked: tiles of depth a program; x_member,
    packed_member: elements from one member's x and packed codes to the next; BITS: None where `packed_ptr` and
    `code_sums_ptr` have what `decode_kernel` wrote; DOT: the type of the product, int8 for codes; PADDED: some taps
    fall outside the image; ONE_TAP: no tile of depth has two of them; EVEN: BLOCK_DEPTH divides depth; WIDE: offsets
    need 64 bits. ALIGNED: powers of two that divide the depth (where 4 does, packed is int32), the input channels of a
    group, and its output channels.
    """
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    # These change nothing, but tell the compiler how wide its accesses may be.
    depth = depth // DEPTH_ALIGNED * DEPTH_ALIGNED
    MEMBER_ALIGNED: tl.constexpr = DEPTH_ALIGNED if BITS is None else 8
    packed_member = packed_member // MEMBER_ALIGNED * MEMBER_ALIGNED
    x_member = x_member // IN_ALIGNED * IN_ALIGNED
    depth_per_tap = depth_per_tap // IN_ALIGNED * IN_ALIGNED
    in_channels = in_channels // IN_ALIGNED * IN_ALIGNED
    channels = channels // OUT_ALIGNED * OUT_ALIGNED

    pid = tl.program_id(0)
    group_channels = channels // groups // OUT_ALIGNED * OUT_ALIGNED
    channel = pid % channel_tiles * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    pid = pid // channel_tiles
    pixel = (pid % pixel_tiles * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)).to(INDEX)
    pid = pid // pixel_tiles
    group = pid % groups
    member = pid // groups
    split = tl.program_id(1)
    mask = (channel < group_channels)[:, None] & (pixel < pixels)[None, :]
    # Rows and columns beyond the edge load the last one again, so that their loads need no mask.
    weight = (group * group_channels + tl.minimum(channel, group_channels - 1)).to(tl.uint64 if WIDE else tl.uint32)
    patch = tl.minimum(pixel, pixels - 1)

    image = patch // out_width // out_height
    top = (patch // out_width % out_height * stride_h - pad_top).to(tl.int32)
    left = (patch % out_width * stride_w - pad_left).to(tl.int32)
    first = ((image * height + top) * width + left) * in_channels
    x_ptr += member.to(tl.int64) * x_member + group * depth_per_tap
    packed_ptr += member.to(tl.int64) * packed_member

    SUM: tl.constexpr = tl.int32 if DOT.is_int8() else tl.float32
    SHIFTED: tl.constexpr = x_ptr.dtype.element_ty == tl.uint8
    sums = tl.zeros([BLOCK_CHANNELS, BLOCK_PIXELS], SUM)
    ADDS_CODES: tl.constexpr = SHIFTED and BITS is not None
    if ADDS_CODES:
        ones = tl.full([BLOCK_DEPTH, 16], 1, tl.int8)
        code_sums = tl.zeros([BLOCK_CHANNELS, 16], tl.int32)
    for tile in range(split * walked, tl.minimum((split + 1) * walked, tl.cdiv(depth, BLOCK_DEPTH))):
        if BITS is None:
            codes = _decoded_weights(packed_ptr, weight, tile, depth, DEPTH_ALIGNED, EVEN, BLOCK_DEPTH)
        else:
            codes = _weights(packed_ptr, weight, tile, depth, BITS, DEPTH_ALIGNED, EVEN, BLOCK_DEPTH)

        k = tile * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)
        if KERNEL_H * KERNEL_W == 1:
            tap = 0
            in_channel = k
        elif ONE_TAP:
            tap = tile * BLOCK_DEPTH // depth_per_tap
            in_channel = k - tap * depth_per_tap
        else:
            tap = tl.max_constancy(k // depth_per_tap, IN_ALIGNED)[:, None]
            in_channel = k % depth_per_tap
        in_channel = tl.max_contiguous(tl.multiple_of(in_channel, IN_ALIGNED), IN_ALIGNED)[:, None]
        down, right = tap // KERNEL_W * dilation_h, tap % KERNEL_W * dilation_w
        at = first[None, :] + ((down * width + right).to(INDEX) * in_channels + in_channel)
        inside = None if EVEN else (k < depth)[:, None]
        if PADDED:
            row, column = top[None, :] + down, left[None, :] + right
            in_image = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            inside = in_image if EVEN else in_image & inside
        x = tl.load(x_ptr + at, inside, other=None if inside is None else 0)

        if SHIFTED:
            # Tensor cores take two int8: x - 128, at padding too, and 128 times the sum of the codes afterwards.
            x = (x ^ 128).to(tl.int8, bitcast=True)
        if ADDS_CODES:
            code_sums = tl.dot(codes, ones, code_sums, out_dtype=tl.int32)
        if DOT.is_fp32():
            high, low = _split_to_tf32(x.to(tl.float32))
            sums = tl.dot(codes.to(tl.float32), low, sums, input_precision="tf32")
            sums = tl.dot(codes.to(tl.float32), high, sums, input_precision="tf32")
        else:
            sums = tl.dot(codes.to(DOT), x, sums, out_dtype=SUM)
    if ADDS_CODES:
        sums += 128 * tl.max(code_sums, 1)[:, None]  # its columns are equal
    elif SHIFTED:
        of_channel = tl.load(code_sums_ptr + member * channels + weight.to(tl.int32))
        sums += tl.where(split == 0, 128 * of_channel, 0)[:, None]  # of the whole depth: not once a split

    channel, pixel = (group * group_channels + channel)[:, None].to(INDEX), pixel[None, :]
    if partials_ptr is None:
        finish(sums, member, pixel, channel, mask, epilogue, pixels, channels, ACTIVATION)
    else:
        members = tl.num_programs(0) // (channel_tiles * pixel_tiles * groups)
        partials_ptr += (split * members + member).to(tl.int64) * pixels * channels
        tl.store(partials_ptr + pixel * channels + channel, sums, mask)


@triton.jit(do_not_specialize=["splits", "members", "channel_tiles", "pixels", "channels"])
def fold_kernel(
    partials_ptr,
    epilogue,
    splits,
    members,
    channel_tiles,
    pixels,
    channels,
    ACTIVATION: tl.constexpr,
    OUT_ALIGNED: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """Add the splits [splits, members, pixels, channels] in order, then the epilogue. Reads 4 B a split and element."""
    channels = channels // OUT_ALIGNED * OUT_ALIGNED
    member = tl.program_id(1)
    channel = tl.program_id(0) % channel_tiles * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None, :]
    pixel = (tl.program_id(0) // channel_tiles).to(tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)[:, None]
    mask = (channel < channels) & (pixel < pixels)
    partials_ptr += member.to(tl.int64) * pixels * channels
    sums = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], partials_ptr.dtype.element_ty)
    for _ in range(splits):
        sums += tl.load(partials_ptr + pixel * channels + channel, mask, other=0)
        partials_ptr += members.to(tl.int64) * pixels * channels
    finish(sums, member, pixel, channel, mask, epilogue, pixels, channels, ACTIVATION)
