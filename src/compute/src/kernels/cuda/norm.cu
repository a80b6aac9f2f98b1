// LayerNorm with modulation, and RMSNorm of heads; forward and backward. Statistics and sums in f32.
//
// A warp has a row: block 256, grid ⌈rows / 8⌉. Rows are read again from the cache for every pass over them. Modulations and
// their gradients are f32: what is wrong in them is wrong in every token of a sample.

#include "values.cuh"

constexpr float kEpsilon = 1e-6f;

#define ROW(rows)                                                     \
  const int lane = threadIdx.x % 32;                                  \
  const int64_t row = blockIdx.x * int64_t(8) + threadIdx.x / 32;     \
  if (row >= (rows)) return;

// Packs of a row that a lane keeps in registers.
constexpr int kPacks = 8;

// The normalised and modulated row from its values: all that a lane has of it, its first value at `lane * V`.
template <typename T, int V>
__device__ __forceinline__ void modulate_row(T* y, float2* statistics, const float (&a)[kPacks][V], float sum, const float* shift, const float* scale, int width, int lane) {
  const float mean = warp_sum(sum) / width;
  float square = 0.0f;
#pragma unroll
  for (int p = 0; p < kPacks; ++p)
    if ((p * 32 + lane) * V < width)
#pragma unroll
      for (int j = 0; j < V; ++j) square = fmaf(a[p][j] - mean, a[p][j] - mean, square);
  const float rstd = 1.0f / sqrtf(warp_sum(square) / width + kEpsilon);
  if (lane == 0) *statistics = make_float2(mean, rstd);
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int i = (p * 32 + lane) * V;
    if (i >= width) break;
    float s[V], b[V];
    load<float, V>(s, scale + i);
    load<float, V>(b, shift + i);
#pragma unroll
    for (int j = 0; j < V; ++j) b[j] = fmaf((a[p][j] - mean) * rstd, 1.0f + s[j], b[j]);
    store<T, V>(y + i, b);
  }
}

// y = (x - mean) · rstd · (1 + scale) + shift; statistics [rows, 2] = (mean, rstd).
template <typename T, int V>
__device__ __forceinline__ void modulate(T* y, float2* statistics, const T* x, const float* shift, const float* scale, int64_t rows, int width, int tokens, int64_t stride) {
  ROW(rows)
  x += row * width;
  y += row * width;
  shift += row / tokens * stride;
  scale += row / tokens * stride;
  float sum = 0.0f;
  if (width <= 32 * V * kPacks) {
    float a[kPacks][V];
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int i = (p * 32 + lane) * V;
      if (i >= width) break;
      load<T, V>(a[p], x + i);
#pragma unroll
      for (int j = 0; j < V; ++j) sum += a[p][j];
    }
    modulate_row<T, V>(y, statistics + row, a, sum, shift, scale, width, lane);
    return;
  }
  float a[V], square = 0.0f;
  for (int i = lane * V; i < width; i += 32 * V) {
    load<T, V>(a, x + i);
#pragma unroll
    for (int j = 0; j < V; ++j) sum += a[j];
  }
  const float mean = warp_sum(sum) / width;
  for (int i = lane * V; i < width; i += 32 * V) {
    load<T, V>(a, x + i);
#pragma unroll
    for (int j = 0; j < V; ++j) square = fmaf(a[j] - mean, a[j] - mean, square);
  }
  const float rstd = 1.0f / sqrtf(warp_sum(square) / width + kEpsilon);
  if (lane == 0) statistics[row] = make_float2(mean, rstd);
  for (int i = lane * V; i < width; i += 32 * V) {
    float s[V], b[V];
    load<T, V>(a, x + i);
    load<float, V>(s, scale + i);
    load<float, V>(b, shift + i);
#pragma unroll
    for (int j = 0; j < V; ++j) a[j] = fmaf((a[j] - mean) * rstd, 1.0f + s[j], b[j]);
    store<T, V>(y + i, a);
  }
}
#define MODULATE(T) \
  (T* y, float2* statistics, const T* x, const float* shift, const float* scale, int64_t rows, int width, int tokens, int64_t stride)
KERNELS(modulate, MODULATE, (y, statistics, x, shift, scale, rows, width, tokens, stride))

// out = x + gate · branch, then `modulate` of out into y; width at most 256 · V.
template <typename T, int V>
__device__ __forceinline__ void gate_modulate(T* out, T* y, float2* statistics, const T* x, const T* branch, const float* gate, const float* shift, const float* scale, int64_t rows, int width, int tokens, int64_t stride) {
  ROW(rows)
  const int64_t sample = row / tokens * stride;
  x += row * width;
  branch += row * width;
  out += row * width;
  gate += sample;
  float a[kPacks][V], sum = 0.0f;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int i = (p * 32 + lane) * V;
    if (i >= width) break;
    float g[V], b[V];
    load<T, V>(a[p], x + i);
    load<T, V>(b, branch + i);
    load<float, V>(g, gate + i);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      // What the backward will read.
      a[p][j] = widen(narrow<T>(fmaf(g[j], b[j], a[p][j])));
      sum += a[p][j];
    }
    store<T, V>(out + i, a[p]);
  }
  modulate_row<T, V>(y + row * width, statistics + row, a, sum, shift + sample, scale + sample, width, lane);
}
#define GATE_MODULATE(T)                                                                                                      \
  (T* out, T* y, float2* statistics, const T* x, const T* branch, const float* gate, const float* shift, const float* scale, int64_t rows, \
   int width, int tokens, int64_t stride)
KERNELS(gate_modulate, GATE_MODULATE, (out, y, statistics, x, branch, gate, shift, scale, rows, width, tokens, stride))

// dx += rstd · (g - mean(g) - x̂ · mean(g · x̂)), g = dy · (1 + scale). Then, if there is a gate, gated = gate · dx.
template <typename T, int V>
__device__ __forceinline__ void modulate_backward(T* dx, const T* dy, const T* x, const float2* statistics, const float* scale, T* gated, const float* gate, int64_t rows, int width, int tokens, int64_t stride) {
  ROW(rows)
  x += row * width;
  dx += row * width;
  dy += row * width;
  scale += row / tokens * stride;
  const float mean = statistics[row].x, rstd = statistics[row].y;
  float a[V], d[V], s[V], sum = 0.0f, product = 0.0f;
  for (int i = lane * V; i < width; i += 32 * V) {
    load<T, V>(a, x + i);
    load<T, V>(d, dy + i);
    load<float, V>(s, scale + i);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float g = d[j] * (1.0f + s[j]);
      sum += g;
      product = fmaf(g, (a[j] - mean) * rstd, product);
    }
  }
  sum = warp_sum(sum) / width;
  product = warp_sum(product) / width;
  for (int i = lane * V; i < width; i += 32 * V) {
    float to[V];
    load<T, V>(a, x + i);
    load<T, V>(d, dy + i);
    load<float, V>(s, scale + i);
    load<T, V>(to, dx + i);
#pragma unroll
    for (int j = 0; j < V; ++j) to[j] += rstd * (d[j] * (1.0f + s[j]) - sum - (a[j] - mean) * rstd * product);
    store<T, V>(dx + i, to);
    if (gate) {
      load<float, V>(s, gate + row / tokens * stride + i);
#pragma unroll
      for (int j = 0; j < V; ++j) to[j] = widen(narrow<T>(to[j])) * s[j];
      store<T, V>(gated + row * width + i, to);
    }
  }
}
#define MODULATE_BACKWARD(T)                                                                                              \
  (T* dx, const T* dy, const T* x, const float2* statistics, const float* scale, T* gated, const float* gate, int64_t rows, int width, \
   int tokens, int64_t stride)
KERNELS(modulate_backward, MODULATE_BACKWARD, (dx, dy, x, statistics, scale, gated, gate, rows, width, tokens, stride))

// d_shift_b += Σ_t dy, d_scale_b += Σ_t dy · x̂. A thread has one column of one sample: grid (⌈width / 256⌉, batch).
template <typename T, int V>
__device__ __forceinline__ void modulation_gradient(float* d_shift, float* d_scale, const T* dy, const T* x, const float2* statistics, int tokens, int width, int64_t stride) {
  const int column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= width) return;
  float shift = 0.0f, scale = 0.0f;
  for (int t = 0; t < tokens; ++t) {
    const int64_t row = int64_t(blockIdx.y) * tokens + t, at = row * width + column;
    const float d = widen(dy[at]);
    shift += d;
    scale = fmaf(d, (widen(x[at]) - statistics[row].x) * statistics[row].y, scale);
  }
  d_shift += blockIdx.y * stride + column;
  d_scale += blockIdx.y * stride + column;
  *d_shift += shift;
  *d_scale += scale;
}
#define MODULATION_GRADIENT(T) \
  (float* d_shift, float* d_scale, const T* dy, const T* x, const float2* statistics, int tokens, int width, int64_t stride)
KERNELS(modulation_gradient, MODULATION_GRADIENT, (d_shift, d_scale, dy, x, statistics, tokens, width, stride))

// y = x · r · weight, r = 1 / √(mean(x²) + ε), for each of a token's heads of `width` values; statistics [rows] = r. From one
// token to the next: x_stride, y_stride.
template <typename T, int V>
__device__ __forceinline__ void rms_norm(T* y, float* statistics, const T* x, const T* weight, int64_t rows, int width, int heads, int64_t x_stride, int64_t y_stride) {
  ROW(rows)
  const int64_t token = row / heads, head = row - token * heads;
  x += token * x_stride + head * width;
  y += token * y_stride + head * width;
  float a[V], square = 0.0f;
  for (int i = lane * V; i < width; i += 32 * V) {
    load<T, V>(a, x + i);
#pragma unroll
    for (int j = 0; j < V; ++j) square = fmaf(a[j], a[j], square);
  }
  square = warp_sum(square);
  const float r = 1.0f / sqrtf(square / width + kEpsilon);
  if (lane == 0) statistics[row] = r;
  for (int i = lane * V; i < width; i += 32 * V) {
    float w[V];
    load<T, V>(a, x + i);
    load<T, V>(w, weight + i);
#pragma unroll
    for (int j = 0; j < V; ++j) a[j] = a[j] * r * w[j];
    store<T, V>(y + i, a);
  }
}
#define RMS_NORM(T) \
  (T* y, float* statistics, const T* x, const T* weight, int64_t rows, int width, int heads, int64_t x_stride, int64_t y_stride)
KERNELS(rms_norm, RMS_NORM, (y, statistics, x, weight, rows, width, heads, x_stride, y_stride))

// dy becomes dx = r · (g - x · r² · mean(g · x)), g = dy · weight.
template <typename T, int V>
__device__ __forceinline__ void rms_norm_backward(T* dy, const T* x, const T* weight, const float* statistics, int64_t rows, int width, int heads, int64_t x_stride, int64_t y_stride) {
  ROW(rows)
  const int64_t token = row / heads, head = row - token * heads;
  x += token * x_stride + head * width;
  dy += token * y_stride + head * width;
  const float r = statistics[row];
  float a[V], d[V], w[V], product = 0.0f;
  for (int i = lane * V; i < width; i += 32 * V) {
    load<T, V>(a, x + i);
    load<T, V>(d, dy + i);
    load<T, V>(w, weight + i);
#pragma unroll
    for (int j = 0; j < V; ++j) product = fmaf(d[j] * w[j], a[j], product);
  }
  product = warp_sum(product);
  product = product / width * r * r;
  for (int i = lane * V; i < width; i += 32 * V) {
    load<T, V>(a, x + i);
    load<T, V>(d, dy + i);
    load<T, V>(w, weight + i);
#pragma unroll
    for (int j = 0; j < V; ++j) d[j] = r * (d[j] * w[j] - a[j] * product);
    store<T, V>(dy + i, d);
  }
}
#define RMS_NORM_BACKWARD(T) \
  (T* dy, const T* x, const T* weight, const float* statistics, int64_t rows, int width, int heads, int64_t x_stride, int64_t y_stride)
KERNELS(rms_norm_backward, RMS_NORM_BACKWARD, (dy, x, weight, statistics, rows, width, heads, x_stride, y_stride))
