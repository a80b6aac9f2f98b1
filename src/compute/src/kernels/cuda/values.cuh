// Values of the three element types, computed with in f32; 16 bytes at a time where rows allow it.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) { return x; }
template <>
__device__ __forceinline__ __half narrow<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// V neighbouring values; V = 16 / sizeof(T) is one 16-byte access.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T values[V];
};

template <typename T, int V>
__device__ __forceinline__ void load(float (&to)[V], const T* from) {
  const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(from);
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = widen(pack.values[i]);
}

template <typename T, int V>
__device__ __forceinline__ void store(T* to, const float (&from)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int i = 0; i < V; ++i) pack.values[i] = narrow<T>(from[i]);
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(0xffffffffu, v, d);
  return v;
}

// Defines `name_{f32,f16,bf16}` with 16-byte accesses and `name_{...}_any` with single ones from a template <T, V> body.
#define KERNEL_OF(type, suffix, v, name, parameters, arguments) \
  extern "C" __global__ void __launch_bounds__(256) name##_##suffix parameters(type) { name<type, v> arguments; }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define KERNEL_BF16(v, suffix, name, parameters, arguments)
#else
#define KERNEL_BF16(v, suffix, name, parameters, arguments) KERNEL_OF(__nv_bfloat16, suffix, v, name, parameters, arguments)
#endif
#define KERNELS(name, parameters, arguments)              \
  KERNEL_OF(float, f32, 4, name, parameters, arguments)    \
  KERNEL_OF(float, f32_any, 1, name, parameters, arguments) \
  KERNEL_OF(__half, f16, 8, name, parameters, arguments)   \
  KERNEL_OF(__half, f16_any, 1, name, parameters, arguments) \
  KERNEL_BF16(8, bf16, name, parameters, arguments)        \
  KERNEL_BF16(1, bf16_any, name, parameters, arguments)
