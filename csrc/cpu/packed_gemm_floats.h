// Tiles of float32 products, which attention takes as well.
#pragma once

#include "packed_gemm.h"

namespace qkernels {

using FloatGemm = Gemm<float, float, float, 1>;

FloatGemm float_gemm(Isa isa);

}  // namespace qkernels
