// Text encoders: norms over rows of the f32 residual stream, activations, attention with a bias. The autoencoder: columns of a convolution, the
// norm before it, group statistics, softmax of scores. Forward only.
//
// Rows of norms: a warp each, block 256, grid ⌈rows / 8⌉. Elsewhere block 256 unless said otherwise. Pictures are [pixels, channels].

#include "values.cuh"

#define ROW(rows)                                                 \
  const int lane = threadIdx.x % 32;                              \
  const int64_t row = blockIdx.x * int64_t(8) + threadIdx.x / 32; \
  if (row >= (rows)) return;

#define INDEX(count)                                                \
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; \
  if (i >= (count)) return;

// f16 ends at 65504: what is larger stays the largest number.
template <typename T>
__device__ __forceinline__ float within(float x) {
  return x;
}
template <>
__device__ __forceinline__ float within<__half>(float x) {
  return fminf(fmaxf(x, -65504.0f), 65504.0f);
}

// exp of sufficient accuracy: f32's own, or the fast one for shorter types.
template <typename T>
__device__ __forceinline__ float exp_of(float x) {
  return __expf(x);
}
template <>
__device__ __forceinline__ float exp_of<float>(float x) {
  return expf(x);
}

// T5's norm: y = x / √(mean(x²) + ε) · weight.
template <typename T, int V>
__device__ __forceinline__ void text_rms_norm(T* y, const float* x, const float* weight, int64_t rows, int width, float epsilon) {
  ROW(rows)
  x += row * width;
  y += row * width;
  float a[V], w[V], square = 0.0f;
  for (int i = lane * V; i < width; i += 32 * V) {
    load<float, V>(a, x + i);
#pragma unroll
    for (int j = 0; j < V; ++j) square = fmaf(a[j], a[j], square);
  }
  const float rstd = 1.0f / sqrtf(warp_sum(square) / width + epsilon);
  for (int i = lane * V; i < width; i += 32 * V) {
    load<float, V>(a, x + i);
    load<float, V>(w, weight + i);
#pragma unroll
    for (int j = 0; j < V; ++j) a[j] = within<T>(a[j] * rstd * w[j]);
    store<T, V>(y + i, a);
  }
}
#define TEXT_RMS_NORM(T) (T* y, const float* x, const float* weight, int64_t rows, int width, float epsilon)
KERNELS(text_rms_norm, TEXT_RMS_NORM, (y, x, weight, rows, width, epsilon))

// CLIP's norm: y = (x - mean) / √(var + ε) · weight + bias.
template <typename T, int V>
__device__ __forceinline__ void text_layer_norm(T* y, const float* x, const float* weight, const float* bias, int64_t rows, int width, float epsilon) {
  ROW(rows)
  x += row * width;
  y += row * width;
  float a[V], w[V], b[V], sum = 0.0f, square = 0.0f;
  for (int i = lane * V; i < width; i += 32 * V) {
    load<float, V>(a, x + i);
#pragma unroll
    for (int j = 0; j < V; ++j) sum += a[j];
  }
  const float mean = warp_sum(sum) / width;
  for (int i = lane * V; i < width; i += 32 * V) {
    load<float, V>(a, x + i);
#pragma unroll
    for (int j = 0; j < V; ++j) square = fmaf(a[j] - mean, a[j] - mean, square);
  }
  const float rstd = 1.0f / sqrtf(warp_sum(square) / width + epsilon);
  for (int i = lane * V; i < width; i += 32 * V) {
    load<float, V>(a, x + i);
    load<float, V>(w, weight + i);
    load<float, V>(b, bias + i);
#pragma unroll
    for (int j = 0; j < V; ++j) a[j] = fmaf((a[j] - mean) * rstd, w[j], b[j]);
    store<T, V>(y + i, a);
  }
}
#define TEXT_LAYER_NORM(T) (T* y, const float* x, const float* weight, const float* bias, int64_t rows, int width, float epsilon)
KERNELS(text_layer_norm, TEXT_LAYER_NORM, (y, x, weight, bias, rows, width, epsilon))

// y [rows, width] = gelu(a) · b with (a, b) = the halves of x's rows [rows, 2 · width]; gelu in its tanh form. `packs` is width / V.
template <typename T, int V>
__device__ __forceinline__ void gated_gelu(T* y, const T* x, int64_t count, int packs) {
  INDEX(count)
  const int64_t row = i / packs, at = i % packs;
  float a[V], b[V];
  load<T, V>(a, x + (row * 2 * packs + at) * V);
  load<T, V>(b, x + (row * 2 * packs + packs + at) * V);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const float u = 0.7978845608028654f * (a[j] + 0.044715f * a[j] * a[j] * a[j]);
    a[j] = within<T>(0.5f * a[j] * (1.0f + tanhf(u)) * b[j]);
  }
  store<T, V>(y + i * V, a);
}
#define GATED_GELU(T) (T* y, const T* x, int64_t count, int packs)
KERNELS(gated_gelu, GATED_GELU, (y, x, count, packs))

// CLIP's activations in place: x · σ(1.702 x), or x · Φ(x) with the error function.
template <typename T, int V>
__device__ __forceinline__ void clip_activation(T* x, int64_t count, int exact) {
  INDEX(count)
  float a[V];
  load<T, V>(a, x + i * V);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    a[j] = exact ? 0.5f * a[j] * (1.0f + erff(a[j] * 0.70710678118654752f)) : a[j] / (1.0f + exp_of<T>(-1.702f * a[j]));
  }
  store<T, V>(x + i * V, a);
}
#define CLIP_ACTIVATION(T) (T* x, int64_t count, int exact)
KERNELS(clip_activation, CLIP_ACTIVATION, (x, count, exact))

// softmax(scale · q kᵀ + bias) v of every caption and head. qkv [captions · tokens, 3 · heads · dim], out [captions · tokens, heads · dim],
// bias [heads, tokens, tokens] or none; `causal` hides later keys. dim <= 128.
//
// Block 128, grid (⌈tokens / 32⌉, heads, captions). A warp has 8 queries, four at a time; keys and values pass in tiles of 64. Shared memory:
// 32 · dim of queries and 2 · 64 · (dim + 1) of keys and values in f32.
constexpr int kQueries = 32, kKeys = 64, kAtOnce = 4;
template <typename T, int V>
__device__ __forceinline__ void text_attention(T* out, const T* qkv, const float* bias, int tokens, int heads, int dim, float scale, int causal) {
  extern __shared__ float shared[];
  const int stride = dim + 1, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* const queries = shared;                    // [kQueries, dim]
  float* const keys = queries + kQueries * dim;     // [kKeys, stride]
  float* const values = keys + kKeys * stride;      // [kKeys, stride]
  const int first = blockIdx.x * kQueries, head = blockIdx.y, inner = heads * dim;
  const T* const base = qkv + int64_t(blockIdx.z) * tokens * 3 * inner + head * dim;
  for (int i = threadIdx.x; i < kQueries * dim; i += blockDim.x) {
    const int q = first + i / dim;
    queries[i] = q < tokens ? widen(base[int64_t(q) * 3 * inner + i % dim]) * scale : 0.0f;
  }
  constexpr int kGroups = kQueries / 4 / kAtOnce;
  float most[kGroups][kAtOnce], sum[kGroups][kAtOnce], result[kGroups][kAtOnce][4];
#pragma unroll
  for (int g = 0; g < kGroups; ++g)
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      most[g][n] = -INFINITY;
      sum[g][n] = 0.0f;
#pragma unroll
      for (int d = 0; d < 4; ++d) result[g][n][d] = 0.0f;
    }
  const int end = causal ? min(tokens, first + kQueries) : tokens;
  for (int tile = 0; tile < end; tile += kKeys) {
    __syncthreads();
    for (int i = threadIdx.x; i < kKeys * dim; i += blockDim.x) {
      const int key = i / dim, d = i % dim;
      const bool there = tile + key < tokens;
      const T* const from = base + int64_t(tile + key) * 3 * inner + d;
      keys[key * stride + d] = there ? widen(from[inner]) : 0.0f;
      values[key * stride + d] = there ? widen(from[2 * inner]) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int local = warp * (kQueries / 4) + g * kAtOnce;
      float score[kAtOnce][2];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) score[n][0] = score[n][1] = 0.0f;
      const float* const k0 = keys + lane * stride;
      const float* const k1 = keys + (lane + 32) * stride;
      for (int d = 0; d < dim; ++d) {
        const float a = k0[d], b = k1[d];
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
          const float q = queries[(local + n) * dim + d];
          score[n][0] = fmaf(q, a, score[n][0]);
          score[n][1] = fmaf(q, b, score[n][1]);
        }
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int q = first + local + n;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int key = tile + lane + 32 * h;
          if (key >= tokens || q >= tokens || (causal && key > q)) {
            score[n][h] = -INFINITY;
          } else if (bias != nullptr) {
            score[n][h] += bias[(int64_t(head) * tokens + q) * tokens + key];
          }
        }
        float largest = fmaxf(score[n][0], score[n][1]);
#pragma unroll
        for (int d = 16; d; d >>= 1) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, d));
        const float now = fmaxf(most[g][n], largest);
        // A row without keys so far has nothing to rescale.
        const float factor = now == -INFINITY ? 1.0f : exp_of<T>(most[g][n] - now);
        const float shift = now == -INFINITY ? 0.0f : now;
        score[n][0] = exp_of<T>(score[n][0] - shift);
        score[n][1] = exp_of<T>(score[n][1] - shift);
        sum[g][n] = sum[g][n] * factor + warp_sum(score[n][0] + score[n][1]);
        most[g][n] = now;
#pragma unroll
        for (int d = 0; d < 4; ++d) result[g][n][d] *= factor;
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        for (int key = 0; key < 32; ++key) {
          float p[kAtOnce];
#pragma unroll
          for (int n = 0; n < kAtOnce; ++n) p[n] = __shfl_sync(0xffffffffu, score[n][h], key);
          const float* const row = values + (key + 32 * h) * stride;
#pragma unroll
          for (int d = 0; d < 4; ++d) {
            if (d * 32 >= dim) break;
            const float v = lane + 32 * d < dim ? row[lane + 32 * d] : 0.0f;
#pragma unroll
            for (int n = 0; n < kAtOnce; ++n) result[g][n][d] = fmaf(p[n], v, result[g][n][d]);
          }
        }
      }
    }
  }
#pragma unroll
  for (int g = 0; g < kGroups; ++g)
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int q = first + warp * (kQueries / 4) + g * kAtOnce + n;
      if (q >= tokens) continue;
#pragma unroll
      for (int d = 0; d < 4; ++d) {
        if (lane + 32 * d < dim) {
          out[(int64_t(blockIdx.z) * tokens + q) * inner + head * dim + lane + 32 * d] = narrow<T>(result[g][n][d] / sum[g][n]);
        }
      }
    }
}
#define TEXT_ATTENTION(T) (T* out, const T* qkv, const float* bias, int tokens, int heads, int dim, float scale, int causal)
KERNELS(text_attention, TEXT_ATTENTION, (out, qkv, bias, tokens, heads, dim, scale, causal))

// Columns [rows, kernel², channels] of a convolution over rows `first`.. of its output. Input [height, width, channels] (doubled each way where
// `doubled`), padded with zeros. One pack a thread; all counts are below 2³¹, for divisions of 64 bits would take longer than the copies.
struct Conv {
  int height, width, packs, out_width, kernel, stride, pad, doubled;
};
template <typename T, int V>
__device__ __forceinline__ void columns(T* to, const T* x, int first, int count, Conv conv) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, taps = conv.kernel * conv.kernel;
  if (i >= uint32_t(count)) return;
  const uint32_t whole = i / conv.packs, pack = i - whole * conv.packs;
  const uint32_t row = whole / taps, tap = whole - row * taps;
  const uint32_t pixel = first + row, line = pixel / conv.out_width, tap_line = tap / conv.kernel;
  int y = int(line) * conv.stride - conv.pad + int(tap_line);
  int z = int(pixel - line * conv.out_width) * conv.stride - conv.pad + int(tap - tap_line * conv.kernel);
  const int height = conv.height << conv.doubled, width = conv.width << conv.doubled;
  float a[V];
  if (y < 0 || z < 0 || y >= height || z >= width) {
#pragma unroll
    for (int j = 0; j < V; ++j) a[j] = 0.0f;
  } else {
    y >>= conv.doubled;
    z >>= conv.doubled;
    load<T, V>(a, x + ((int64_t(y) * conv.width + z) * conv.packs + pack) * V);
  }
  store<T, V>(to + int64_t(i) * V, a);
}
#define COLUMNS(T) (T* to, const T* x, int first, int count, Conv conv)
KERNELS(columns, COLUMNS, (to, x, first, count, conv))

// y = x · scale + shift with affine [2, channels], or its SiLU; `packs` is channels / V.
template <typename T, int V>
__device__ __forceinline__ void apply_affine(T* y, const T* x, const float* affine, int64_t count, int packs, int activate) {
  INDEX(count)
  const int pack = i % packs;
  float a[V], scale[V], shift[V];
  load<T, V>(a, x + i * V);
  load<float, V>(scale, affine + pack * V);
  load<float, V>(shift, affine + (packs + pack) * V);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const float u = fmaf(a[j], scale[j], shift[j]);
    a[j] = activate ? u / (1.0f + exp_of<T>(-u)) : u;
  }
  store<T, V>(y + i * V, a);
}
#define APPLY_AFFINE(T) (T* y, const T* x, const float* affine, int64_t count, int packs, int activate)
KERNELS(apply_affine, APPLY_AFFINE, (y, x, affine, count, packs, activate))

// Sums of x [pixels, channels] by channel over each of `chunks` runs of pixels: sums [chunks, 2, channels] = Σ(x - x₀), Σ(x - x₀)², x₀ the channel's value at
// the run's first pixel, so that nothing cancels. Grid (chunks, ⌈packs / 32⌉): 32 packs of channels by 8 pixels.
template <typename T, int V>
__device__ __forceinline__ void channel_sums(float* sums, const T* x, int64_t pixels, int channels, int64_t run) {
  __shared__ float shared[8][32][2 * V];
  const int lane = threadIdx.x % 32, part = threadIdx.x / 32;
  const int channel = (blockIdx.y * 32 + lane) * V;
  const int64_t first = blockIdx.x * run, last = min(pixels, first + run);
  float a[V], origin[V], sum[V], square[V];
#pragma unroll
  for (int j = 0; j < V; ++j) sum[j] = square[j] = 0.0f;
  if (channel < channels) {
    load<T, V>(origin, x + first * channels + channel);
    for (int64_t p = first + part; p < last; p += 8) {
      load<T, V>(a, x + p * channels + channel);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float d = a[j] - origin[j];
        sum[j] += d;
        square[j] = fmaf(d, d, square[j]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < V; ++j) {
    shared[part][lane][j] = sum[j];
    shared[part][lane][V + j] = square[j];
  }
  __syncthreads();
  if (part == 0 && channel < channels) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      float s = 0.0f, q = 0.0f;
      for (int k = 0; k < 8; ++k) {
        s += shared[k][lane][j];
        q += shared[k][lane][V + j];
      }
      sums[(blockIdx.x * int64_t(2)) * channels + channel + j] = s;
      sums[(blockIdx.x * int64_t(2) + 1) * channels + channel + j] = q;
    }
  }
}
#define CHANNEL_SUMS(T) (float* sums, const T* x, int64_t pixels, int channels, int64_t run)
KERNELS(channel_sums, CHANNEL_SUMS, (sums, x, pixels, channels, run))

// From the sums to each channel's scale and shift: affine [2, channels] = (weight · rstd, bias - mean · weight · rstd) of its group, in f64. Grid groups, block 256.
template <typename T, int V>
__device__ __forceinline__ void group_affine(
    float* affine, const float* sums, const T* x, const float* weight, const float* bias, int64_t pixels, int channels, int groups, int64_t run, int chunks, float epsilon) {
  __shared__ double shared[256];
  const int of_group = channels / groups, channel0 = blockIdx.x * of_group;
  const auto total = [&](double mine) {
    __syncthreads();
    shared[threadIdx.x] = mine;
    __syncthreads();
    for (int d = 128; d; d >>= 1) {
      if (threadIdx.x < d) shared[threadIdx.x] += shared[threadIdx.x + d];
      __syncthreads();
    }
    return shared[0];
  };
  const int parts = chunks * of_group;
  double sum = 0.0;
  for (int i = threadIdx.x; i < parts; i += 256) {
    const int chunk = i / of_group, channel = channel0 + i % of_group;
    const int64_t first = chunk * run, n = min(pixels, first + run) - first;
    sum += double(sums[chunk * int64_t(2) * channels + channel]) + n * double(widen(x[first * channels + channel]));
  }
  const double count = double(pixels) * of_group, mean = total(sum) / count;
  double square = 0.0;
  for (int i = threadIdx.x; i < parts; i += 256) {
    const int chunk = i / of_group, channel = channel0 + i % of_group;
    const int64_t first = chunk * run, n = min(pixels, first + run) - first;
    const double s = sums[chunk * int64_t(2) * channels + channel], q = sums[(chunk * int64_t(2) + 1) * channels + channel];
    const double off = double(widen(x[first * channels + channel])) - mean;
    square += q + 2.0 * off * s + n * off * off;
  }
  const double rstd = 1.0 / sqrt(total(square) / count + epsilon);
  for (int i = threadIdx.x; i < of_group; i += 256) {
    const int channel = channel0 + i;
    const double scale = weight[channel] * rstd;
    affine[channel] = float(scale);
    affine[channels + channel] = float(bias[channel] - mean * scale);
  }
}
#define GROUP_AFFINE(T) \
  (float* affine, const float* sums, const T* x, const float* weight, const float* bias, int64_t pixels, int channels, int groups, int64_t run, int chunks, float epsilon)
KERNELS(group_affine, GROUP_AFFINE, (affine, sums, x, weight, bias, pixels, channels, groups, run, chunks, epsilon))

// Rows of scores to probabilities: p = softmax(scale · s). A block has a row; grid rows.
template <typename T, int V>
__device__ __forceinline__ void softmax_rows(T* p, const float* s, int width, float scale) {
  __shared__ float shared[8];
  s += blockIdx.x * int64_t(width);
  p += blockIdx.x * int64_t(width);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float most = -INFINITY;
  for (int i = threadIdx.x; i < width; i += 256) most = fmaxf(most, s[i] * scale);
#pragma unroll
  for (int d = 16; d; d >>= 1) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, d));
  if (lane == 0) shared[warp] = most;
  __syncthreads();
  most = shared[0];
  for (int i = 1; i < 8; ++i) most = fmaxf(most, shared[i]);
  __syncthreads();
  float sum = 0.0f;
  for (int i = threadIdx.x; i < width; i += 256) sum += exp_of<T>(s[i] * scale - most);
  sum = warp_sum(sum);
  if (lane == 0) shared[warp] = sum;
  __syncthreads();
  sum = 0.0f;
  for (int i = 0; i < 8; ++i) sum += shared[i];
  for (int i = threadIdx.x; i < width; i += 256) p[i] = narrow<T>(exp_of<T>(s[i] * scale - most) / sum);
}
#define SOFTMAX_ROWS(T) (T* p, const float* s, int width, float scale)
KERNELS(softmax_rows, SOFTMAX_ROWS, (p, s, width, scale))
