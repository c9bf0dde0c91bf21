"""Packed codes in Triton: the bit layout of csrc/numerics.h (docs/format.md), read by kernels.

A flat code index i is code i % 32 of chunk i // 32 % 8 of block i // 256. The four codes 4n .. 4n+3 are four bytes of
each plane under one shift, so where rows start at a multiple of four codes a kernel reads words and works on four codes
at a time.
"""

import triton
import triton.language as tl

from . import numerics


@triton.constexpr_function
def plane_width(bits, start):
    """The width of the plane that starts at bit `start` of a `bits`-bit code; 0 where none starts."""
    at = 0
    while at < bits:
        width = 4 if bits - at >= 4 else 2 if bits - at >= 2 else 1
        if at == start:
            return width
        at += width
    return 0


@triton.constexpr_function
def bytes_of(value):
    """A word whose four bytes are each `value`."""
    return value * 0x01010101


@triton.jit
def _plane(block, chunk, mask, START: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr, PAIRS: tl.constexpr):
    """What the plane at bit START holds of a code, or with WORDS of four in a word, at its place in the code. uint32.

    block points to a code's byte or word in row 0 of its block.
    """
    at = block + (8 if WORDS else 32) * (START + chunk % WIDTH)
    if PAIRS:
        # A byte holds bits of up to eight chunks. Copies of 16 bytes to shared memory would fetch it as often from the
        # second-level cache; those of 8 bytes go through the first-level one.
        at = tl.max_contiguous(at, [1, 2])
    plane = tl.load(at, mask, other=None if mask is None else 0).to(tl.uint32, bitcast=WORDS)
    FIELD: tl.constexpr = (1 << WIDTH) - 1
    return ((plane >> (chunk // WIDTH * WIDTH).to(tl.uint32)) & (bytes_of(FIELD) if WORDS else FIELD)) << START


@triton.jit
def load_codes(packed_ptr, i, mask, BITS: tl.constexpr):
    """Codes i, any shape and order, as uint8 without sign; 0 where masked. At most three byte loads a code."""
    block = packed_ptr + i // 256 * (32 * BITS) + i % 32
    chunk = i // 32 % 8
    codes = (chunk * 0).to(tl.uint32)
    for start in tl.static_range(BITS):
        if plane_width(BITS, start) > 0:
            codes |= _plane(block, chunk, mask, start, plane_width(BITS, start), False, False)
    return codes.to(tl.uint8)


@triton.jit
def signed(codes, BITS: tl.constexpr):
    """Two's complement of BITS bits in uint8 as int8."""
    return (codes << (8 - BITS)).to(tl.int8, bitcast=True) >> (8 - BITS)


@triton.jit
def quantized(v, scale, qmin, qmax):
    """The code of v as int32; that of NaN, which no integer can hold, is 0 clamped into the range."""
    v = numerics.quotient(v, scale, None, qmin, qmax)
    return numerics.rounded_to_int32(tl.where(v == v, v, numerics.code(0.0, qmin, qmax)))


@triton.jit
def load_signed_words(packed_ptr, n, mask, BITS: tl.constexpr, PAIRS: tl.constexpr):
    """Codes 4n .. 4n+3 as the four int8 of an int32; 0 where masked. `packed_ptr` is int32.

    At most three loads, and about ten operations, for four codes. n is [rows, words], each row of successive words;
    PAIRS: every row starts at an even one.
    """
    block = packed_ptr + n // 64 * (8 * BITS) + n % 8
    chunk = n // 8 % 8
    words = (chunk * 0).to(tl.uint32)
    for start in tl.static_range(BITS):
        if plane_width(BITS, start) > 0:
            words |= _plane(block, chunk, mask, start, plane_width(BITS, start), True, PAIRS)
    # The sign bit times 0b1..10 fills the bits above it and carries into no other byte.
    words += (words & bytes_of(1 << (BITS - 1))) * (2 ** (9 - BITS) - 2)
    return words.to(tl.int32, bitcast=True)


@triton.jit
def bytes_of_words(words):
    """int32 [rows, n] as int8 [rows, 4 * n], the lowest byte first."""
    even = tl.join(words.to(tl.int8), (words >> 16).to(tl.int8))
    odd = tl.join((words >> 8).to(tl.int8), (words >> 24).to(tl.int8))
    return tl.reshape(tl.join(even, odd), [words.shape[0], 4 * words.shape[1]])
