// Sums of gradients, their norm, and the updates of AdamW (optim/adamw.rs and optim/adamw8bit.rs have the formulas). Every operation is rounded as
// on the host, in the host's order: the same gradients give the same parameters, bit for bit, on both.

#include <stdint.h>

// sum += factor * x. Block 256, grid ⌈n / 1024⌉.
extern "C" __global__ void __launch_bounds__(256) add_scaled(float* sum, const float* x, int64_t n, float factor) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int64_t i = int64_t(blockIdx.x) * 1024 + k * 256 + threadIdx.x;
    if (i < n) sum[i] = __fadd_rn(sum[i], __fmul_rn(factor, x[i]));
  }
}

__device__ __forceinline__ double block_sum(double sum) {
  __shared__ double partial[8];
#pragma unroll
  for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, d);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  double total = 0.0;
  for (int k = 0; k < 8; ++k) total += partial[k];
  return total;
}

// partial[block]: Σ x² of 8192 values. Block 256, grid ⌈n / 8192⌉.
extern "C" __global__ void __launch_bounds__(256) square_sums(double* partial, const float* x, int64_t n) {
  double sum = 0.0;
  for (int k = 0; k < 32; ++k) {
    const int64_t i = int64_t(blockIdx.x) * 8192 + k * 256 + threadIdx.x;
    if (i < n) sum += double(x[i]) * double(x[i]);
  }
  const double total = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// to[0]: the sum of `count` partial sums. One block of 256.
extern "C" __global__ void __launch_bounds__(256) sum_partials(double* to, const double* partial, int count) {
  double sum = 0.0;
  for (int i = threadIdx.x; i < count; i += 256) sum += partial[i];
  const double total = block_sum(sum);
  if (threadIdx.x == 0) to[0] = total;
}

// The f32 numbers of one update, as `Scalars` of optim/adamw.rs; and what gradients are multiplied with first.
struct Scalars {
  float keep, one_minus_beta1, beta2, one_minus_beta2, root_correction2, epsilon, step_size, clip;
};

__device__ __forceinline__ float adamw_update(float p, float g, float& m, float& v, const Scalars& s) {
  g = __fmul_rn(g, s.clip);
  p = __fmul_rn(p, s.keep);
  m = __fadd_rn(m, __fmul_rn(s.one_minus_beta1, __fsub_rn(g, m)));
  v = __fadd_rn(__fmul_rn(v, s.beta2), __fmul_rn(__fmul_rn(s.one_minus_beta2, g), g));
  const float denominator = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), s.root_correction2), s.epsilon);
  return __fsub_rn(p, __fdiv_rn(__fmul_rn(s.step_size, m), denominator));
}

// Block 256, grid ⌈n / 1024⌉.
extern "C" __global__ void __launch_bounds__(256) adamw(float* values, const float* grads, float* first, float* second, int64_t n, const Scalars s) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int64_t i = int64_t(blockIdx.x) * 1024 + k * 256 + threadIdx.x;
    if (i >= n) return;
    float m = first[i], v = second[i];
    values[i] = adamw_update(values[i], grads[i], m, v, s);
    first[i] = m;
    second[i] = v;
  }
}

// Up to 256 neighbouring values of one parameter.
struct Range {
  int64_t values;  // the first, among all parameters
  int64_t state;   // the first of its moments: codes (a multiple of 256), or f32 values
  int32_t count;
  int32_t full;    // moments of 32 bits
};

struct Codes {
  uint8_t* codes;
  float* largest;         // of each 256 codes
  const float* table;     // value of a code
  const uint8_t* nearest; // code of a point of the grid
};

__device__ __forceinline__ uint8_t code_of(float x, float inverse, const uint8_t* nearest) {
  const float scaled = fminf(fmaxf(__fmul_rn(x, inverse), -1.0f), 1.0f);
  const float point = __fadd_rn(__fmul_rn(__fmul_rn(__fadd_rn(scaled, 1.0f), 0.5f), 65535.0f), 0.5f);
  return nearest[min(uint32_t(point), 65535u)];
}

// Both largest magnitudes of the block's values.
__device__ __forceinline__ float2 block_largest(float a, float b) {
  __shared__ float2 partial[8];
#pragma unroll
  for (int d = 16; d; d >>= 1) {
    a = fmaxf(a, __shfl_xor_sync(0xffffffffu, a, d));
    b = fmaxf(b, __shfl_xor_sync(0xffffffffu, b, d));
  }
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = make_float2(a, b);
  __syncthreads();
  float2 most = make_float2(0.0f, 0.0f);
  for (int k = 0; k < 8; ++k) most = make_float2(fmaxf(most.x, partial[k].x), fmaxf(most.y, partial[k].y));
  return most;
}

// Block 256, one range per block.
extern "C" __global__ void __launch_bounds__(256) adamw_8bit(float* values, const float* grads, const Range* ranges, float* full_first, float* full_second, const Codes first, const Codes second, const Scalars s) {
  const Range r = ranges[blockIdx.x];
  const int i = threadIdx.x;
  const bool mine = i < r.count;
  float m = 0.0f, v = 0.0f;
  if (mine) {
    if (r.full) {
      m = full_first[r.state + i];
      v = full_second[r.state + i];
    } else {
      m = __fmul_rn(first.table[first.codes[r.state + i]], first.largest[r.state / 256]);
      v = __fmul_rn(second.table[second.codes[r.state + i]], second.largest[r.state / 256]);
    }
    values[r.values + i] = adamw_update(values[r.values + i], grads[r.values + i], m, v, s);
  }
  if (r.full) {
    if (mine) {
      full_first[r.state + i] = m;
      full_second[r.state + i] = v;
    }
    return;
  }
  // Every thread has read the scales before they change: the reduction waits for all.
  const float2 most = block_largest(mine ? fabsf(m) : 0.0f, mine ? fabsf(v) : 0.0f);
  if (mine) {
    first.codes[r.state + i] = most.x == 0.0f ? 0 : code_of(m, __frcp_rn(most.x), first.nearest);
    second.codes[r.state + i] = most.y == 0.0f ? 0 : code_of(v, __frcp_rn(most.y), second.nearest);
  }
  if (i == 0) {
    first.largest[r.state / 256] = most.x;
    second.largest[r.state / 256] = most.y;
  }
}
