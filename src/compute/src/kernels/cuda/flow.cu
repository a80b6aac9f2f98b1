// The loss of flow matching and its gradient, on patches (nn/flow_matching.rs has the formulas).

#include "values.cuh"

struct Sample {
  double factor;  // 2 · weight · coefficient / n · the gradients' scale
  float sigma, weight;
};

// out, d_out [batch, h · w, p · p · channels] in the order (p, q, c); x0, noise [batch, channels, h · p, w · p].
// sums [batch, gridDim.x]: Σ weight · difference² of a block, as two floats whose sum it is.
// Block 256, grid (⌈n / 1024⌉, batch), n = values of a sample.
template <typename T, int V>
__device__ __forceinline__ void flow_loss(T* d_out, float2* sums, const T* out, const float* x0, const float* noise, const Sample* samples, int n, int channels, int w, int p, int preconditioned) {
  const Sample s = samples[blockIdx.y];
  const int64_t base = int64_t(blockIdx.y) * n;
  double sum = 0.0;
  for (int k = 0; k < 4; ++k) {
    const int e = blockIdx.x * 1024 + k * 256 + threadIdx.x;
    if (e >= n) break;
    const int c = e % channels, q = e / channels % p, row = e / (channels * p) % p, patch = e / (channels * p * p);
    const int i = patch / w, j = patch % w;
    const int height = n / (channels * w * p);
    const int64_t at = base + (int64_t(c) * height + i * p + row) * (w * p) + j * p + q;
    const float v = widen(out[base + e]);
    float difference, slope;
    if (preconditioned) {
      const float x_t = (1.0f - s.sigma) * x0[at] + s.sigma * noise[at];
      difference = (v * -s.sigma + x_t) - x0[at];
      slope = -s.sigma;
    } else {
      difference = v - (noise[at] - x0[at]);
      slope = 1.0f;
    }
    sum += double(s.weight * difference * difference);
    d_out[base + e] = narrow<T>(float(s.factor * difference * slope));
  }
  __shared__ double partial[8];
#pragma unroll
  for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, d);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0.0;
    for (int k = 0; k < 8; ++k) total += partial[k];
    const float high = float(total);
    sums[blockIdx.y * gridDim.x + blockIdx.x] = make_float2(high, float(total - high));
  }
}
#define FLOW_LOSS(T)                                                                                                      \
  (T* d_out, float2* sums, const T* out, const float* x0, const float* noise, const Sample* samples, int n, int channels, \
   int w, int p, int preconditioned)
KERNELS(flow_loss, FLOW_LOSS, (d_out, sums, out, x0, noise, samples, n, channels, w, p, preconditioned))
