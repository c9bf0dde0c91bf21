// Attention between packed layers, in float32: two products of matrices, by the tiles of the float convolution, and a
// softmax.
//
// A chunk has some queries of one head of an image. Its keys and values are laid out as the tiles' panels, then a few
// queries at a time meet all keys, and what comes of the softmax all values; scores stay in the caches.

#include "../activation.h"
#include "lanes.h"
#include "packed_gemm_floats.h"
#include "packed_network.h"

#include <algorithm>

namespace qkernels {
namespace {

constexpr int64_t kQueries = 24;  // at a time: whole tiles of any height

// A matrix [steps, columns] as panels.
struct Panels {
  float* data;
  int64_t steps, columns;
};

int64_t panel_floats(int64_t steps, int64_t columns) { return steps * ((columns + kLanes - 1) / kLanes * kLanes); }

// Calls f(first column, columns, columns with those that fill up a vector, panel) for each panel.
template <class F>
void for_each_panel(const FloatGemm& gemm, const Panels& panels, const F& f) {
  const int64_t widest = gemm.most_vectors() * kLanes;
  float* panel = panels.data;
  for (int64_t first = 0; first < panels.columns; first += widest) {
    const int64_t n = std::min(widest, panels.columns - first), width = (n + kLanes - 1) / kLanes * kLanes;
    f(first, n, width, panel);
    panel += panels.steps * width;
  }
}

// Column c of the matrix is the vector at x + c * stride.
void fill_columns(const FloatGemm& gemm, const float* x, int64_t stride, const Panels& panels) {
  for_each_panel(gemm, panels, [&](int64_t first, int64_t n, int64_t width, float* panel) {
    for (int64_t c = 0; c < width; ++c) {
      const float* column = x + (first + c) * stride;
      for (int64_t k = 0; k < panels.steps; ++k) panel[k * width + c] = c < n ? column[k] : 0.0f;
    }
  });
}

// Row k of the matrix is the vector at x + k * stride.
void fill_rows(const FloatGemm& gemm, const float* x, int64_t stride, const Panels& panels) {
  for_each_panel(gemm, panels, [&](int64_t first, int64_t n, int64_t width, float* panel) {
    for (int64_t k = 0; k < panels.steps; ++k, panel += width) {
      std::copy_n(x + k * stride + first, n, panel);
      std::fill(panel + n, panel + width, 0.0f);
    }
  });
}

// Rows of x, `stride` apart, times the matrix; store(row, first column, columns, sums).
template <class Store>
void multiply(
    const FloatGemm& gemm, const float* x, int64_t stride, int64_t rows, const Panels& panels, const Store& store) {
  alignas(64) static constexpr float zeros[kBlockChannels] = {};
  alignas(64) float sums[kMostPixels * kBlockChannels];
  const int64_t run = 0;
  for_each_panel(gemm, panels, [&](int64_t first, int64_t n, int64_t width, const float* panel) {
    const int64_t vectors = width / kLanes, height = gemm.tile_pixels(vectors);
    for (int64_t row = 0; row < rows; row += height) {
      const int64_t here = std::min(height, rows - row);
      FloatGemm::Arguments tile{{}, &run, 1, panels.steps, panel, zeros, sums};
      for (int64_t r = 0; r < here; ++r) tile.pixels[r] = x + (row + r) * stride;
      gemm.run(tile, here, vectors);
      for (int64_t r = 0; r < here; ++r) store(row + r, first, n, sums + r * kBlockChannels);
    }
  });
}

QK_VECTORIZED void scaled(const float* x, float factor, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * factor;
}

// exp(x - the largest) in place; returns one over their sum.
QK_VECTORIZED float exponentials(float* x, int64_t n) {
  float largest = x[0];
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] = exponential(x[i] - largest);
  return 1.0f / sum_in_lanes(x, n, [](FloatLanes v) { return v; });
}

void attend(const FloatGemm& gemm, const float* x, const Attention& a, int64_t first, int64_t last, float* out) {
  Scratch scratch;
  const Panels keys{scratch.take<float>(panel_floats(a.depth, a.tokens)), a.depth, a.tokens};
  const Panels values{scratch.take<float>(panel_floats(a.tokens, a.depth)), a.tokens, a.depth};
  fill_columns(gemm, x + a.key, a.width, keys);
  fill_rows(gemm, x + a.value, a.width, values);
  float* scores = scratch.take<float>(kQueries * a.tokens);
  float factors[kQueries];
  for (int64_t query = first; query < last; query += kQueries) {
    const int64_t n = std::min(kQueries, last - query);
    multiply(gemm, x + query * a.width + a.query, a.width, n, keys, [&](int64_t r, int64_t c, int64_t m, float* sums) {
      scaled(sums, a.scale, m, scores + r * a.tokens + c);
    });
    for (int64_t r = 0; r < n; ++r) factors[r] = exponentials(scores + r * a.tokens, a.tokens);
    multiply(gemm, scores, a.tokens, n, values, [&](int64_t r, int64_t c, int64_t m, float* sums) {
      scaled(sums, factors[r], m, out + (query + r) * a.heads * a.depth + c);
    });
  }
}

}  // namespace

Stage attention_of(const float* x, const Attention& a, float* out) {
  const int64_t parts = a.images * a.heads, products = a.tokens * a.tokens * a.depth / 8;
  // Keys and values are laid out once for each slice, so there are no more slices than threads need.
  const int64_t slices = std::clamp<int64_t>((wanted_chunks() / 2 + parts - 1) / parts, 1, (a.tokens + 63) / 64);
  return {parts * slices, parts * products, [=, gemm = float_gemm(cpu_isa())](int64_t chunk) {
            const int64_t slice = chunk % slices, head = chunk / slices % a.heads, image = chunk / slices / a.heads;
            const int64_t channel = head * a.depth;
            attend(
                gemm, x + image * a.tokens * a.width + channel, a, slice * a.tokens / slices,
                (slice + 1) * a.tokens / slices, out + image * a.tokens * a.heads * a.depth + channel);
          }};
}

}  // namespace qkernels
