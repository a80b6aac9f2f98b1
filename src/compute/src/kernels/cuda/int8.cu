// Frozen weights in 8 bits (kernels/int8.rs has the definition): quantised once, widened before each product.

#include "values.cuh"

// codes[row]: the multiples of scales[row] that are nearest to w[row], rows of `pitch` codes; what is behind the `inputs`-th is 0. One block of 256 per row.
template <typename T, int V>
__device__ __forceinline__ void quantize_rows(int8_t* codes, float* scales, const T* w, int inputs, int pitch) {
  const T* from = w + int64_t(blockIdx.x) * inputs;
  float largest = 0.0f;
  bool nan = false;
  for (int i = threadIdx.x; i < inputs; i += 256) {
    const float value = fabsf(widen(from[i]));
    nan |= isnan(value);
    largest = fmaxf(largest, value);
  }
  __shared__ float partial[8];
#pragma unroll
  for (int d = 16; d; d >>= 1) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, d));
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = largest;
  // Also waits for the partial results.
  nan = __syncthreads_or(nan);
  for (int k = 0; k < 8; ++k) largest = fmaxf(largest, partial[k]);
  const float scale = nan ? __int_as_float(0x7fffffff) : __fdiv_rn(largest, 127.0f);
  if (threadIdx.x == 0) scales[blockIdx.x] = scale;
  int8_t* to = codes + int64_t(blockIdx.x) * pitch;
  for (int i = threadIdx.x; i < pitch; i += 256) {
    const float multiple = i < inputs ? rintf(__fdiv_rn(widen(from[i]), scale)) : 0.0f;
    // A row of zeros has no scale to divide by.
    to[i] = isnan(multiple) ? 0 : int8_t(fminf(fmaxf(multiple, -127.0f), 127.0f));
  }
}

// to[row, i] = codes[row, i] * scales[row]: eight values per thread. Block 256, grid ⌈rows * pitch / 2048⌉.
template <typename T, int V>
__device__ __forceinline__ void widen_rows(T* to, const int8_t* codes, const float* scales, int rows, int inputs, int pitch) {
  const int64_t group = int64_t(blockIdx.x) * 256 + threadIdx.x;
  const int64_t row = group / (pitch / 8);
  const int column = int(group % (pitch / 8)) * 8;
  if (row >= rows || column >= inputs) return;
  const Pack<int8_t, 8> pack = *reinterpret_cast<const Pack<int8_t, 8>*>(codes + row * pitch + column);
  const float scale = scales[row];
  T* target = to + row * inputs + column;
  if (V > 1) {
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = __fmul_rn(float(pack.values[i]), scale);
    store<T, 8>(target, values);
    return;
  }
  for (int i = 0; i < 8 && column + i < inputs; ++i) target[i] = narrow<T>(__fmul_rn(float(pack.values[i]), scale));
}

#define QUANTIZE_PARAMETERS(T) (int8_t * codes, float* scales, const T* w, int inputs, int pitch)
#define QUANTIZE_ARGUMENTS (codes, scales, w, inputs, pitch)
KERNEL_OF(float, f32_any, 1, quantize_rows, QUANTIZE_PARAMETERS, QUANTIZE_ARGUMENTS)
KERNEL_OF(__half, f16_any, 1, quantize_rows, QUANTIZE_PARAMETERS, QUANTIZE_ARGUMENTS)

#define WIDEN_PARAMETERS(T) (T * to, const int8_t* codes, const float* scales, int rows, int inputs, int pitch)
#define WIDEN_ARGUMENTS (to, codes, scales, rows, inputs, pitch)
KERNELS(widen_rows, WIDEN_PARAMETERS, WIDEN_ARGUMENTS)
