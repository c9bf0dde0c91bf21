// float16 as csrc/cuda uses it: the compiler's own.
#pragma once

using __half = _Float16;

inline float __half2float(__half v) { return static_cast<float>(v); }
inline __half __float2half_rn(float v) { return static_cast<__half>(v); }
