// Tensor-core building blocks of the attention kernels of head width 64: mma.sync, ldmatrix, cp.async, swizzled tiles.
// sm_75 has neither bf16 nor cp.async nor m16n8k16; there two m16n8k8 and plain copies do the same.

#pragma once

#include "attention.cuh"

namespace attention {

constexpr int kHeadDim = 64;
constexpr int kRowBytes = kHeadDim * 2;  // a row of a tile in shared memory: 8 chunks of 16 bytes

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kAsyncCopies = false;
#else
constexpr bool kAsyncCopies = true;
#endif

// Byte offset of chunk `chunk` (8 values) of row `row` in a tile. Eight rows of the same chunk lie in different banks.
__host__ __device__ __forceinline__ constexpr uint32_t chunk_offset(int row, int chunk) {
  return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
}

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory; zeros unless `valid`.
__device__ __forceinline__ void copy16(uint32_t to, const void* from, bool valid) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
#else
  const uint4 v = valid ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
#endif
}

// 8 bytes likewise.
__device__ __forceinline__ void copy8(uint32_t to, const void* from, bool valid) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(valid ? 8 : 0) : "memory");
#else
  const uint2 v = valid ? *static_cast<const uint2*>(from) : make_uint2(0, 0);
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(v.x), "r"(v.y) : "memory");
#endif
}

__device__ __forceinline__ void commit_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most N groups of this thread's copies are under way.
template <int N>
__device__ __forceinline__ void wait_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Tokens [first, first + R) of a head into a tile, zeros past `limit`.
template <int R, int THREADS, typename T>
__device__ __forceinline__ void load_tile(uint32_t tile, const Rows<T>& from, int first, int limit) {
  static_assert(R * 8 % THREADS == 0);
  constexpr int kStep = THREADS / 8;
  const int chunk = threadIdx.x % 8, row = threadIdx.x / 8;
  static_assert(kStep % 8 == 0);  // so that the swizzle is the same in every step
  const uint32_t to = tile + chunk_offset(row, chunk);
  if (first + R <= min(from.image_tokens, limit)) {
    const T* source = from.image + int64_t(first + row) * from.image_stride + chunk * 8;
    const int64_t step = int64_t(kStep) * from.image_stride;
#pragma unroll
    for (int i = 0; i < R / kStep; ++i) copy16(to + i * kStep * kRowBytes, source + i * step, true);
  } else {
#pragma unroll
    for (int i = 0; i < R / kStep; ++i) {
      const int token = first + row + i * kStep;
      const bool valid = token < limit;
      copy16(to + i * kStep * kRowBytes, (valid ? from.at(token) : from.image) + chunk * 8, valid);
    }
  }
}

// Four 8×8 matrices; each lane gives the address of one row.
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Fragments of a swizzled tile [rows, 64]. With g = lane / 4 and t = lane % 4, the operands of mma.m16n8k16 are
//   A: a0 (row g, k 2t), a1 (row g + 8, k 2t), a2 (row g, k 2t + 8), a3 (row g + 8, k 2t + 8), each with k + 1;
//   B: b0 (k 2t, column g), b1 (k 2t + 8, column g), each with k + 1;
//   C: c0, c1 (row g, columns 2t, 2t + 1), c2, c3 (row g + 8).
struct Lane {
  uint32_t offset;  // of this lane's row and chunk in a load of four matrices

  // Matrices (rows 0-7, chunk 0), (rows 8-15, chunk 0), (rows 0-7, chunk 1), (rows 8-15, chunk 1):
  // A with rows of the tile as rows; B, transposed, with rows of the tile as k: b0, b1 of columns 0-7, then of 8-15.
  __device__ __forceinline__ static Lane rows_first() {
    const int lane = threadIdx.x % 32;
    return {chunk_offset(lane % 16, lane / 16)};
  }
  // Matrices (rows 0-7, chunk 0), (rows 0-7, chunk 1), (rows 8-15, chunk 0), (rows 8-15, chunk 1):
  // B with rows of the tile as columns: b0, b1 of columns 0-7, then of 8-15.
  __device__ __forceinline__ static Lane chunks_first() {
    const int lane = threadIdx.x % 32;
    return {chunk_offset(lane % 8 + lane / 16 * 8, lane / 8 % 2)};
  }

  // The 16×16 part that begins at row `r` (a multiple of 8) and chunk `c` (even).
  __device__ __forceinline__ uint32_t address(uint32_t tile, int r, int c) const { return tile + (offset ^ (c << 4)) + r * kRowBytes; }
};

// c += a b, 16×8 += 16×16 · 16×8.
template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  __trap();
#endif
}

// Two values, rounded to nearest: `low` in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  const __half2 v = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t v);
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t v) {
  return __half22float2(*reinterpret_cast<const __half2*>(&v));
}
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t v) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&v));
}

// c[16·MT, 8·NT] += a[16·MT, 64] · bᵀ, rows of b = rows [first, first + 8·NT) of the tile. `lane` = chunks_first.
template <typename T, int MT, int NT>
__device__ __forceinline__ void multiply_rows(float (&c)[MT][NT][4], const uint32_t (&a)[MT][4][4], uint32_t tile, int first, const Lane& lane) {
#pragma unroll
  for (int k = 0; k < 4; ++k)
#pragma unroll
    for (int n = 0; n < NT / 2; ++n) {
      uint32_t b[4];
      ldmatrix(b, lane.address(tile, first + 16 * n, 2 * k));
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        mma<T>(c[m][2 * n], a[m][k], b[0], b[1]);
        mma<T>(c[m][2 * n + 1], a[m][k], b[2], b[3]);
      }
    }
}

// c[16·MT, 64] += a[16·MT, 8·KT] · b, b = rows [first, first + 8·KT) of the tile; a is an accumulator, rounded here.
// `lane` = rows_first.
template <typename T, int MT, int KT>
__device__ __forceinline__ void multiply_accumulator(float (&c)[MT][8][4], const float (&a)[MT][KT][4], uint32_t tile, int first, const Lane& lane) {
#pragma unroll
  for (int k = 0; k < KT / 2; ++k) {
    uint32_t af[MT][4];
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      af[m][0] = pack<T>(a[m][2 * k][0], a[m][2 * k][1]);
      af[m][1] = pack<T>(a[m][2 * k][2], a[m][2 * k][3]);
      af[m][2] = pack<T>(a[m][2 * k + 1][0], a[m][2 * k + 1][1]);
      af[m][3] = pack<T>(a[m][2 * k + 1][2], a[m][2 * k + 1][3]);
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      uint32_t b[4];
      ldmatrix_transposed(b, lane.address(tile, first + 16 * k, 2 * n));
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        mma<T>(c[m][2 * n], af[m], b[0], b[1]);
        mma<T>(c[m][2 * n + 1], af[m], b[2], b[3]);
      }
    }
  }
}

// The rows [16·MT·warp, ...) of a tile as A. `lane` = rows_first.
template <int MT>
__device__ __forceinline__ void load_fragments(uint32_t (&a)[MT][4][4], uint32_t tile, int first, const Lane& lane) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int k = 0; k < 4; ++k) ldmatrix(a[m][k], lane.address(tile, first + 16 * m, 2 * k));
}

// Rows token, token + 8 (this lane's g and g + 8) as A, from global memory; zeros past `limit`.
template <typename T>
__device__ __forceinline__ void read_fragments(uint32_t (&a)[4][4], const Rows<T>& from, int token, int limit) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const bool valid = token + 8 * h < limit;
    const uint32_t* row = reinterpret_cast<const uint32_t*>(valid ? from.at(token + 8 * h) : from.image) + threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      a[k][h] = valid ? row[8 * k] : 0;
      a[k][h + 2] = valid ? row[8 * k + 4] : 0;
    }
  }
}

// A warp's 16·MT rows of an accumulator, times factor[m][0] (row g) or [1] (row g + 8), rounded, by way of its own rows
// [row, row + 16·MT) of a tile nobody else uses, to tokens [first, first + 16·MT) below `limit`.
template <typename T, int MT>
__device__ __forceinline__ void store_tile(const Rows<T>& to, const float (&c)[MT][8][4], const float (&factor)[MT][2], uint32_t tile, int row, int first, int limit) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t v = pack<T>(c[m][n][2 * h] * factor[m][h], c[m][n][2 * h + 1] * factor[m][h]);
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(tile + chunk_offset(row + 16 * m + 8 * h + g, n) + 4 * t), "r"(v) : "memory");
      }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 4 * MT; ++i) {
    const int r = 4 * i + lane / 8, chunk = lane % 8;
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(tile + chunk_offset(row + r, chunk))
                 : "memory");
    if (first + r < limit) *reinterpret_cast<uint4*>(to.at(first + r) + chunk * 8) = v;
  }
}

}  // namespace attention
