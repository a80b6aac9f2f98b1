// Operations on single values. Block 256; one pack of values a thread, grid over all packs.
//
// Where rows of samples are meant, a tensor is [batch * tokens, width] and its modulation [batch, stride] in f32;
// `packs` is width / V.

#include "values.cuh"

#define INDEX(count)                                               \
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; \
  if (i >= (count)) return;

template <typename T, int V>
__device__ __forceinline__ void multiply(T* x, const T* y, int64_t count) {
  INDEX(count)
  float a[V], b[V];
  load<T, V>(a, x + i * V);
  load<T, V>(b, y + i * V);
#pragma unroll
  for (int j = 0; j < V; ++j) a[j] *= b[j];
  store<T, V>(x + i * V, a);
}
#define MULTIPLY(T) (T* x, const T* y, int64_t count)
KERNELS(multiply, MULTIPLY, (x, y, count))

// y [period] is repeated.
template <typename T, int V>
__device__ __forceinline__ void add(T* x, const T* y, int64_t count, int64_t period) {
  INDEX(count)
  float a[V], b[V];
  load<T, V>(a, x + i * V);
  load<T, V>(b, y + i % period * V);
#pragma unroll
  for (int j = 0; j < V; ++j) a[j] += b[j];
  store<T, V>(x + i * V, a);
}
#define ADD(T) (T* x, const T* y, int64_t count, int64_t period)
KERNELS(add, ADD, (x, y, count, period))

// tanh from one exponential: exact to f32's rounding where it matters, saturating at the ends.
__device__ __forceinline__ float tanh_of(float u) {
  const float e = __expf(-2.0f * fabsf(u));
  return copysignf((1.0f - e) / (1.0f + e), u);
}

constexpr float kGelu = 0.7978845608028654f;  // √(2/π)

__device__ __forceinline__ float gelu_of(float x, bool exact) {
  const float u = kGelu * (x + 0.044715f * x * x * x);
  return 0.5f * x * (1.0f + (exact ? tanhf(u) : tanh_of(u)));
}

__device__ __forceinline__ float gelu_slope(float x, bool exact) {
  const float u = kGelu * (x + 0.044715f * x * x * x);
  const float t = exact ? tanhf(u) : tanh_of(u);
  return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * kGelu * (1.0f + 3.0f * 0.044715f * x * x);
}

template <typename T, int V>
__device__ __forceinline__ void gelu(T* y, const T* x, int64_t count) {
  INDEX(count)
  float a[V];
  load<T, V>(a, x + i * V);
#pragma unroll
  for (int j = 0; j < V; ++j) a[j] = gelu_of(a[j], sizeof(T) == 4);
  store<T, V>(y + i * V, a);
}
#define UNARY(T) (T* y, const T* x, int64_t count)
KERNELS(gelu, UNARY, (y, x, count))

// dy becomes dx.
template <typename T, int V>
__device__ __forceinline__ void gelu_backward(T* dy, const T* x, int64_t count) {
  INDEX(count)
  float a[V], d[V];
  load<T, V>(a, x + i * V);
  load<T, V>(d, dy + i * V);
#pragma unroll
  for (int j = 0; j < V; ++j) d[j] *= gelu_slope(a[j], sizeof(T) == 4);
  store<T, V>(dy + i * V, d);
}
KERNELS(gelu_backward, UNARY, (y, x, count))

template <typename T, int V>
__device__ __forceinline__ void silu(T* y, const T* x, int64_t count) {
  INDEX(count)
  float a[V];
  load<T, V>(a, x + i * V);
#pragma unroll
  for (int j = 0; j < V; ++j) a[j] = a[j] / (1.0f + expf(-a[j]));
  store<T, V>(y + i * V, a);
}
KERNELS(silu, UNARY, (y, x, count))

template <typename T, int V>
__device__ __forceinline__ void silu_backward(T* dy, const T* x, int64_t count) {
  INDEX(count)
  float a[V], d[V];
  load<T, V>(a, x + i * V);
  load<T, V>(d, dy + i * V);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const float s = 1.0f / (1.0f + expf(-a[j]));
    d[j] *= s * (1.0f + a[j] * (1.0f - s));
  }
  store<T, V>(dy + i * V, d);
}
KERNELS(silu_backward, UNARY, (y, x, count))

// out = x + gate_b · y; `gate` points at the gate of the first sample.
template <typename T, int V>
__device__ __forceinline__ void gate_residual(T* out, const T* x, const T* y, const float* gate, int64_t count, int packs, int tokens, int64_t stride) {
  INDEX(count)
  const int64_t row = i / packs;
  float a[V], b[V], g[V];
  load<T, V>(a, x + i * V);
  load<T, V>(b, y + i * V);
  load<float, V>(g, gate + row / tokens * stride + (i - row * packs) * V);
#pragma unroll
  for (int j = 0; j < V; ++j) a[j] = fmaf(g[j], b[j], a[j]);
  store<T, V>(out + i * V, a);
}
#define GATE_RESIDUAL(T) (T* out, const T* x, const T* y, const float* gate, int64_t count, int packs, int tokens, int64_t stride)
KERNELS(gate_residual, GATE_RESIDUAL, (out, x, y, gate, count, packs, tokens, stride))

// dy = gate_b · d_out.
template <typename T, int V>
__device__ __forceinline__ void gate_backward(T* dy, const T* d_out, const float* gate, int64_t count, int packs, int tokens, int64_t stride) {
  INDEX(count)
  const int64_t row = i / packs;
  float a[V], g[V];
  load<T, V>(a, d_out + i * V);
  load<float, V>(g, gate + row / tokens * stride + (i - row * packs) * V);
#pragma unroll
  for (int j = 0; j < V; ++j) a[j] *= g[j];
  store<T, V>(dy + i * V, a);
}
#define GATE_BACKWARD(T) (T* dy, const T* d_out, const float* gate, int64_t count, int packs, int tokens, int64_t stride)
KERNELS(gate_backward, GATE_BACKWARD, (dy, d_out, gate, count, packs, tokens, stride))

// d_gate_b += Σ_t y · d_out. A thread has one column of one sample: grid (⌈width / 256⌉, batch).
template <typename T, int V>
__device__ __forceinline__ void gate_gradient(float* d_gate, const T* y, const T* d_out, int tokens, int width, int64_t stride) {
  const int column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= width) return;
  const int64_t first = int64_t(blockIdx.y) * tokens * width + column;
  float sum = 0.0f;
  for (int t = 0; t < tokens; ++t) sum = fmaf(widen(y[first + int64_t(t) * width]), widen(d_out[first + int64_t(t) * width]), sum);
  d_gate[blockIdx.y * stride + column] += sum;
}
#define GATE_GRADIENT(T) (float* d_gate, const T* y, const T* d_out, int tokens, int width, int64_t stride)
KERNELS(gate_gradient, GATE_GRADIENT, (d_gate, y, d_out, tokens, width, stride))

// Between f32 and T.
template <typename T, int V>
__device__ __forceinline__ void from_f32(T* y, const float* x, int64_t count) {
  INDEX(count)
  float a[V];
  load<float, V>(a, x + i * V);
  store<T, V>(y + i * V, a);
}
#define FROM_F32(T) (T* y, const float* x, int64_t count)
KERNELS(from_f32, FROM_F32, (y, x, count))

template <typename T, int V>
__device__ __forceinline__ void to_f32(float* y, const T* x, int64_t count) {
  INDEX(count)
  float a[V];
  load<T, V>(a, x + i * V);
  store<float, V>(y + i * V, a);
}
#define TO_F32(T) (float* y, const T* x, int64_t count)
KERNELS(to_f32, TO_F32, (y, x, count))

// Between two stored types, as raw bits of the source: 0 f32, 1 f16, 2 bf16.
template <typename T, int V>
__device__ __forceinline__ void convert(T* y, const void* x, int64_t count, int kind) {
  INDEX(count)
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const int64_t at = i * V + j;
    float v;
    if (kind == 0) {
      v = static_cast<const float*>(x)[at];
    } else if (kind == 1) {
      v = __half2float(static_cast<const __half*>(x)[at]);
    } else {
      v = __uint_as_float(uint32_t(static_cast<const uint16_t*>(x)[at]) << 16);
    }
    y[at] = narrow<T>(v);
  }
}
#define CONVERT(T) (T* y, const void* x, int64_t count, int kind)
KERNELS(convert, CONVERT, (y, x, count, kind))

// x in two parts of half the width each, whose sum has twice T's digits: y [2, count].
template <typename T, int V>
__device__ __forceinline__ void split(T* y, const float* x, int64_t count) {
  INDEX(count)
  const T high = narrow<T>(x[i]);
  y[i] = high;
  y[count + i] = narrow<T>(x[i] - widen(high));
}
#define SPLIT(T) (T* y, const float* x, int64_t count)
KERNELS(split, SPLIT, (y, x, count))

// y = x[0] + x[1] + bias (if there is one) + y (if it accumulates); x [2, count], bias [width].
extern "C" __global__ void __launch_bounds__(256) join(float* y, const float* x, const float* bias, int64_t count, int width, int accumulates) {
  INDEX(count)
  float sum = x[i] + x[count + i];
  if (bias) sum += bias[i % width];
  y[i] = accumulates ? y[i] + sum : sum;
}

// LoRA's factors beside each other: y [rows, to] = factor · x [rows, from], padded with zeros; grid over rows · to.
template <typename T, int V>
__device__ __forceinline__ void pad(T* y, const float* x, int64_t count, int from, int to, float factor) {
  INDEX(count)
  const int64_t row = i / to;
  const int column = int(i - row * to);
  y[i] = narrow<T>(column < from ? x[row * from + column] * factor : 0.0f);
}
#define PAD(T) (T* y, const float* x, int64_t count, int from, int to, float factor)
KERNELS(pad, PAD, (y, x, count, from, to, factor))

// Philox 4x32-10, as src/common/src/rng.rs.
__device__ __forceinline__ uint4 philox(uint4 c, uint2 k) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    if (round > 0) k = make_uint2(k.x + 0x9E3779B9u, k.y + 0xBB67AE85u);
    const uint32_t h0 = __umulhi(0xD2511F53u, c.x), l0 = 0xD2511F53u * c.x;
    const uint32_t h1 = __umulhi(0xCD9E8D57u, c.z), l1 = 0xCD9E8D57u * c.z;
    c = make_uint4(h1 ^ c.y ^ k.x, l1, h0 ^ c.w ^ k.y, l0);
  }
  return c;
}

// mask [batch, values]: 0 with probability p, else `kept`. streams [batch]: {key, key, counter 1, 2, 3}. A thread has four
// values; grid (⌈values / 1024⌉, batch).
template <typename T, int V>
__device__ __forceinline__ void dropout_mask(T* mask, const uint32_t* streams, int64_t values, float p, float kept) {
  const uint32_t* s = streams + blockIdx.y * 5;
  const int64_t group = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (group * 4 >= values) return;
  const uint4 bits = philox(make_uint4(uint32_t(group), s[2], s[3], s[4]), make_uint2(s[0], s[1]));
  const uint32_t all[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int64_t at = group * 4 + j;
    if (at < values) mask[blockIdx.y * values + at] = narrow<T>(float(all[j] >> 8) * (1.0f / 16777216.0f) < p ? 0.0f : kept);
  }
}
#define DROPOUT_MASK(T) (T* mask, const uint32_t* streams, int64_t values, float p, float kept)
KERNELS(dropout_mask, DROPOUT_MASK, (mask, streams, values, p, kept))
