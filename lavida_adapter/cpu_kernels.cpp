// Matrix products with packed weights and softmax attention, in float32 on a CPU with AVX-512.
// lavida_adapter/cpu_kernels.py compiles this file and says when they are used.
//
// Both are outer products of two panels. A tile of a few rows and 32 columns stays in registers while one row of a
// panel of 32 columns after the other is read in the order in which it is stored.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

namespace {

using torch::stable::Tensor;
using Vector = float __attribute__((vector_size(64)));
using Integers = int32_t __attribute__((vector_size(64)));

constexpr int LANES = 16;
constexpr int PANEL = 32;  // columns of a panel of weights, as in cpu_kernels.py
constexpr int ROWS = 12;   // with two vectors of columns, 24 of the 32 registers
constexpr int QUERIES = 32;
constexpr int KEYS = 120;  // their scores for 32 queries take 15 KiB, half of a first-level cache

inline Vector load(const float* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, Vector v) { std::memcpy(to, &v, sizeof v); }

// out[r, c] (+)= the sum over k of a[r * a_row + k * a_k] * b[k * b_k + c], for N rows and V vectors of columns.
template <int N, int V, bool ADD>
inline void tile(const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_k, int64_t n_k, float* out,
                 int64_t out_row) {
  Vector sum[N][V];
  for (int r = 0; r < N; r++)
    for (int v = 0; v < V; v++) sum[r][v] = ADD ? load(out + r * out_row + v * LANES) : Vector{};
  for (int64_t k = 0; k < n_k; k++) {
    Vector columns[V];
    for (int v = 0; v < V; v++) columns[v] = load(b + k * b_k + v * LANES);
#pragma GCC unroll 12
    for (int r = 0; r < N; r++)
      for (int v = 0; v < V; v++) sum[r][v] += a[r * a_row + k * a_k] * columns[v];
  }
  for (int r = 0; r < N; r++)
    for (int v = 0; v < V; v++) store(out + r * out_row + v * LANES, sum[r][v]);
}

template <int N, int V, bool ADD>
void some_rows(int64_t rows, const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_k, int64_t n_k,
               float* out, int64_t out_row) {
  if (rows == N) return tile<N, V, ADD>(a, a_row, a_k, b, b_k, n_k, out, out_row);
  if constexpr (N > 1) some_rows<N - 1, V, ADD>(rows, a, a_row, a_k, b, b_k, n_k, out, out_row);
}

// The same for any number of rows.
template <int V, bool ADD>
void tiles(int64_t rows, const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_k, int64_t n_k,
           float* out, int64_t out_row) {
  for (int64_t r = 0; r < rows; r += ROWS)
    some_rows<ROWS, V, ADD>(std::min<int64_t>(ROWS, rows - r), a + r * a_row, a_row, a_k, b, b_k, n_k,
                            out + r * out_row, out_row);
}

// x [R, K] times packed weights [ceil(N / 32), K, 32], plus a bias [N] -> [R, N].
Tensor packed_linear(const Tensor x, const Tensor weight, const std::optional<Tensor> bias, int64_t n_out) {
  const int64_t rows = x.size(0), n_k = x.size(1), panels = weight.size(0);
  Tensor out = torch::stable::new_empty(x, {rows, n_out});
  const float *from = x.const_data_ptr<float>(), *packed = weight.const_data_ptr<float>();
  const float* added = bias.has_value() ? bias->const_data_ptr<float>() : nullptr;
  float* to = out.mutable_data_ptr<float>();
  const int64_t x_row = x.stride(0), x_k = x.stride(1);
  torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> partial;
    for (int64_t p = begin; p < end; p++) {
      const int64_t column = p * PANEL, width = std::min<int64_t>(PANEL, n_out - column);
      float* target = to + column;
      int64_t target_row = n_out;
      if (width < PANEL) {
        partial.resize(rows * PANEL);
        target = partial.data(), target_row = PANEL;
      }
      tiles<2, false>(rows, from, x_row, x_k, packed + p * n_k * PANEL, PANEL, n_k, target, target_row);
      if (width == PANEL && added == nullptr) continue;
      for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < width; c++)
          to[r * n_out + column + c] = target[r * target_row + c] + (added == nullptr ? 0.0f : added[column + c]);
    }
  });
  return out;
}

// Two to the power of numbers up to 0, by the polynomial of Cephes: within 2 units in the last place.
inline Vector power_of_two(Vector x) {
  x = x < -126.0f ? Vector{} - 126.0f : x;
  const Integers whole = __builtin_convertvector(x - 0.5f, Integers);  // rounds to the nearest: x is not positive
  const Vector r = x - __builtin_convertvector(whole, Vector);
  Vector p = r * 1.535336188319500e-4f + 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  p = p * r + 1.0f;
  const Integers bits = (whole + 127) << 23;
  Vector factor;
  std::memcpy(&factor, &bits, sizeof factor);
  return p * factor;
}

struct Rows {
  const float* at;
  int64_t row, column;
};

// Into the second-level cache, while something else is computed.
inline void bring_near(Rows rows, int64_t first, int64_t count, int64_t width) {
  for (int64_t r = first; r < first + count; r++)
    for (int64_t d = 0; d < width; d += LANES) __builtin_prefetch(rows.at + r * rows.row + d, 0, 2);
}

// Attention of up to 16 * V queries of one head to all keys; scores are kept key by key, so that the softmax needs no
// sum across lanes.
template <int V>
void attend_block(Rows q, int64_t n_queries, Rows k, Rows v, int64_t n_keys, int64_t width, float* out, int64_t out_row,
                  std::vector<float>& scratch) {
  constexpr int LINE = V * LANES;
  scratch.assign(2 * width * LINE + KEYS * LINE, 0.0f);
  float *queries = scratch.data(), *sums = queries + width * LINE, *scores = sums + width * LINE;
  const float scale = 1.44269504f / std::sqrt(float(width));  // times the binary logarithm of e
  for (int64_t r = 0; r < n_queries; r++)
    for (int64_t d = 0; d < width; d++) queries[d * LINE + r] = q.at[r * q.row + d * q.column] * scale;
  Vector peak[V], total[V];
  float factor[LINE];
  for (int i = 0; i < V; i++) peak[i] = Vector{} - INFINITY, total[i] = Vector{};
  for (int64_t first = 0; first < n_keys; first += KEYS) {
    const int64_t keys = std::min<int64_t>(KEYS, n_keys - first);
    for (int64_t j = 0; j < keys; j += ROWS) {
      const int64_t count = std::min<int64_t>(ROWS, keys - j);
      bring_near(v, first + j, count, width);
      bring_near(k, first + j + KEYS, std::min(count, n_keys - first - j - KEYS), width);
      const float* from = k.at + (first + j) * k.row;
      tiles<V, false>(count, from, k.row, k.column, queries, LINE, width, scores + j * LINE, LINE);
    }
    for (int i = 0; i < V; i++) {
      Vector highest = peak[i];
      for (int64_t j = 0; j < keys; j++) {
        const Vector score = load(scores + j * LINE + i * LANES);
        highest = score > highest ? score : highest;
      }
      const Vector shrink = power_of_two(peak[i] - highest);
      Vector sum = total[i] * shrink;
      for (int64_t j = 0; j < keys; j++) {
        float* at = scores + j * LINE + i * LANES;
        const Vector weight = power_of_two(load(at) - highest);
        store(at, weight);
        sum += weight;
      }
      store(factor + i * LANES, shrink);
      peak[i] = highest, total[i] = sum;
    }
    for (int64_t r = 0; r < n_queries; r++)
      for (int64_t d = 0; d < width; d++) sums[r * width + d] *= factor[r];
    int64_t d = 0;
    for (; d + 2 * LANES <= width; d += 2 * LANES)
      tiles<2, true>(n_queries, scores, 1, LINE, v.at + first * v.row + d, v.row, keys, sums + d, width);
    if (d < width) tiles<1, true>(n_queries, scores, 1, LINE, v.at + first * v.row + d, v.row, keys, sums + d, width);
  }
  for (int i = 0; i < V; i++) store(factor + i * LANES, 1.0f / total[i]);
  for (int64_t r = 0; r < n_queries; r++)
    for (int64_t d = 0; d < width; d++) out[r * out_row + d] = sums[r * width + d] * factor[r];
}

// Queries [B, H, Q, D], keys and values [B, G, K, D] with D a multiple of 16 -> [B, Q, H, D]; all keys are seen.
Tensor attend(const Tensor q, const Tensor k, const Tensor v) {
  const int64_t batch = q.size(0), heads = q.size(1), n_queries = q.size(2), width = q.size(3);
  const int64_t groups = heads / k.size(1), n_keys = k.size(2);
  STD_TORCH_CHECK(width % LANES == 0 && v.stride(3) == 1, "attend: heads of a multiple of 16, values in order");
  Tensor out = torch::stable::new_empty(q, {batch, n_queries, heads, width});
  const float *queries = q.const_data_ptr<float>(), *keys = k.const_data_ptr<float>();
  const float* values = v.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  const auto q_stride = q.strides(), k_stride = k.strides(), v_stride = v.strides();
  const int64_t blocks = (n_queries + QUERIES - 1) / QUERIES;
  torch::stable::parallel_for(0, batch * heads * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch;
    for (int64_t task = begin; task < end; task++) {
      const int64_t b = task / (heads * blocks), h = task / blocks % heads, first = task % blocks * QUERIES;
      const int64_t count = std::min<int64_t>(QUERIES, n_queries - first);
      const Rows own{queries + b * q_stride[0] + h * q_stride[1] + first * q_stride[2], q_stride[2], q_stride[3]};
      const Rows seen{keys + b * k_stride[0] + h / groups * k_stride[1], k_stride[2], k_stride[3]};
      const Rows read{values + b * v_stride[0] + h / groups * v_stride[1], v_stride[2], v_stride[3]};
      float* target = to + ((b * n_queries + first) * heads + h) * width;
      auto block = count > LANES ? attend_block<2> : attend_block<1>;
      block(own, count, seen, read, n_keys, width, target, heads * width, scratch);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(shirg_cpu, library) {
  library.def("packed_linear(Tensor x, Tensor weight, Tensor? bias, int n_out) -> Tensor");
  library.def("attend(Tensor q, Tensor k, Tensor v) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(shirg_cpu, CPU, library) {
  library.impl("packed_linear", TORCH_BOX(&packed_linear));
  library.impl("attend", TORCH_BOX(&attend));
}
