// Attention backward on tensor cores, head width 64.
//
//   attention_backward_q_{f16,bf16}_d64       d_q, rows      (reads q, k, v, out, d_out, lse)
//   attention_backward_kv_{f16,bf16}_d64      d_k, d_v       (reads q, k, v, d_out, rows: after backward_q)
//
// bf16 needs sm_80. Block 128. Grid (⌈queries / 64⌉, heads, batch) with 32768 bytes of dynamic shared memory for backward_q
// (16384 before sm_80), grid (⌈keys / 64⌉, heads, batch) with 33792 bytes for backward_kv (16896 before sm_80). Pointers are
// 16-byte aligned, strides multiples of 8.
// Both compute the scores again: no scores in memory, no atomics, one order of every sum. Accumulation in f32;
// probabilities and the scores' gradients are rounded before the products that use them.

#include "attention_mma.cuh"

namespace attention {

template <int MT_, int WARPS_, int KEYS_, int STEP_, int BLOCKS_>
struct BackwardQTile {
  static constexpr int MT = MT_;          // 16-row pieces of a warp
  static constexpr int WARPS = WARPS_;
  static constexpr int KEYS = KEYS_;      // keys copied at a time
  static constexpr int STEP = STEP_;      // keys worked on at a time
  static constexpr int BLOCKS = BLOCKS_;  // blocks per multiprocessor that registers must allow
  static constexpr int THREADS = 32 * WARPS;
  static constexpr int QUERIES = 16 * MT * WARPS;
  static constexpr int SHARED = (QUERIES > 2 * KEYS ? 2 * QUERIES : 4 * KEYS) * kRowBytes;
};

template <typename T, typename S>
__device__ __forceinline__ void backward_q_mma(const AttentionParameters& p) {
  extern __shared__ __align__(128) uint8_t memory[];
  const uint32_t base = shared_address(memory);
  const auto k_tile = [&](int j) { return base + (j & 1) * 2 * S::KEYS * kRowBytes; };
  const auto v_tile = [&](int j) { return base + ((j & 1) * 2 + 1) * S::KEYS * kRowBytes; };
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, own = 16 * S::MT * warp;
  const int first = blockIdx.x * S::QUERIES, head = blockIdx.y, batch = blockIdx.z;
  const int keys = p.image + p.context;
  const int steps = (keys + S::KEYS - 1) / S::KEYS;
  const Rows<T> k_rows(p.k, p, batch, head), v_rows(p.v, p, batch, head);
  const Lane rows_first = Lane::rows_first(), chunks_first = Lane::chunks_first();
  const float factor = p.scale * kLog2e;

  uint32_t q[S::MT][4][4], d_out[S::MT][4][4];
  float lse[S::MT][2], delta[S::MT][2] = {};
  {
    constexpr int kTile = S::QUERIES * kRowBytes;
    load_tile<S::QUERIES, S::THREADS>(base, Rows<T>(p.q, p, batch, head), first, p.queries);
    load_tile<S::QUERIES, S::THREADS>(base + kTile, Rows<T>(p.d_out, p, batch, head), first, p.queries);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    load_fragments<S::MT>(q, base, own, rows_first);
    load_fragments<S::MT>(d_out, base + kTile, own, rows_first);
    const int64_t row = row_of(p, batch, head);
    const Rows<T> out_rows(p.out, p, batch, head);
#pragma unroll
    for (int m = 0; m < S::MT; ++m) {
      uint32_t out[4][4];
      read_fragments<T>(out, out_rows, first + own + 16 * m + lane / 4, p.queries);
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int e = 0; e < 4; ++e) {  // elements 0 and 2 are of row g, 1 and 3 of row g + 8
          const float2 a = unpack<T>(out[k][e]), b = unpack<T>(d_out[m][k][e]);
          delta[m][e % 2] = fmaf(a.x, b.x, fmaf(a.y, b.y, delta[m][e % 2]));
        }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        delta[m][h] += __shfl_xor_sync(0xffffffffu, delta[m][h], 1);
        delta[m][h] += __shfl_xor_sync(0xffffffffu, delta[m][h], 2);
        const int token = first + own + 16 * m + 8 * h + lane / 4;
        lse[m][h] = token < p.queries ? p.lse[row + token] * kLog2e : 0.0f;
        if (lane % 4 == 0 && token < p.queries) p.rows[row + token] = make_float2(lse[m][h], delta[m][h]);
      }
    }
    __syncthreads();
  }
  load_tile<S::KEYS, S::THREADS>(k_tile(0), k_rows, 0, keys);
  load_tile<S::KEYS, S::THREADS>(v_tile(0), v_rows, 0, keys);
  commit_copies();

  float d_q[S::MT][8][4] = {};
  for (int j = 0; j < steps; ++j) {
    wait_copies<0>();
    __syncthreads();  // step j has arrived; every warp is done with step j - 1, whose place the next copies take
    if (j + 1 < steps) {
      load_tile<S::KEYS, S::THREADS>(k_tile(j + 1), k_rows, (j + 1) * S::KEYS, keys);
      load_tile<S::KEYS, S::THREADS>(v_tile(j + 1), v_rows, (j + 1) * S::KEYS, keys);
      commit_copies();
    }
#pragma unroll 1
    for (int part = 0; part < S::KEYS; part += S::STEP) {
      float s[S::MT][S::STEP / 8][4] = {}, d_p[S::MT][S::STEP / 8][4] = {};
      multiply_rows<T>(s, q, k_tile(j), part, chunks_first);
      multiply_rows<T>(d_p, d_out, v_tile(j), part, chunks_first);
      if ((j + 1) * S::KEYS > keys) {
#pragma unroll
        for (int n = 0; n < S::STEP / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (j * S::KEYS + part + 8 * n + 2 * (lane % 4) + e % 2 >= keys)
#pragma unroll
              for (int m = 0; m < S::MT; ++m) s[m][n][e] = -INFINITY;
      }
#pragma unroll
      for (int m = 0; m < S::MT; ++m)
#pragma unroll
        for (int n = 0; n < S::STEP / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            d_p[m][n][e] = exp2_approx(fmaf(s[m][n][e], factor, -lse[m][e / 2])) * (d_p[m][n][e] - delta[m][e / 2]);
      multiply_accumulator<T>(d_q, d_p, k_tile(j), part, rows_first);
    }
  }
  __syncthreads();
  float scale[S::MT][2];
#pragma unroll
  for (int m = 0; m < S::MT; ++m) scale[m][0] = scale[m][1] = p.scale;
  store_tile<T>(Rows<T>(p.d_q, p, batch, head), d_q, scale, base, own, first + own, p.queries);
}

template <int MT_, int WARPS_, int QUERIES_, int STEP_, int BLOCKS_>
struct BackwardKvTile {
  static constexpr int MT = MT_;          // 16-row pieces of a warp
  static constexpr int WARPS = WARPS_;
  static constexpr int QUERIES = QUERIES_;  // queries copied at a time
  static constexpr int STEP = STEP_;        // queries worked on at a time
  static constexpr int BLOCKS = BLOCKS_;
  static constexpr int THREADS = 32 * WARPS;
  static constexpr int KEYS = 16 * MT * WARPS;
  static constexpr int STAGE = QUERIES * (2 * kRowBytes + 8);  // q, d_out, rows
  static constexpr int SHARED = 2 * STAGE > 2 * KEYS * kRowBytes ? 2 * STAGE : 2 * KEYS * kRowBytes;
};

// Products here are transposed: rows are keys, columns are queries.
template <typename T, typename S>
__device__ __forceinline__ void backward_kv_mma(const AttentionParameters& p) {
  extern __shared__ __align__(128) uint8_t memory[];
  const uint32_t base = shared_address(memory);
  // The rows' numbers lie behind both stages, so that every tile is aligned to its swizzle.
  const auto q_tile = [&](int i) { return base + (i & 1) * 2 * S::QUERIES * kRowBytes; };
  const auto d_out_tile = [&](int i) { return base + ((i & 1) * 2 + 1) * S::QUERIES * kRowBytes; };
  const auto rows_tile = [&](int i) { return base + 4 * S::QUERIES * kRowBytes + (i & 1) * S::QUERIES * 8; };
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, own = 16 * S::MT * warp;
  const int first = blockIdx.x * S::KEYS, head = blockIdx.y, batch = blockIdx.z;
  const int keys = p.image + p.context;
  const int steps = (p.queries + S::QUERIES - 1) / S::QUERIES;
  const Rows<T> q_rows(p.q, p, batch, head), d_out_rows(p.d_out, p, batch, head);
  const float2* rows = p.rows + row_of(p, batch, head);
  const Lane rows_first = Lane::rows_first(), chunks_first = Lane::chunks_first();
  const float factor = p.scale * kLog2e;

  uint32_t k[S::MT][4][4], v[S::MT][4][4];
  load_tile<S::KEYS, S::THREADS>(base, Rows<T>(p.k, p, batch, head), first, keys);
  load_tile<S::KEYS, S::THREADS>(base + S::KEYS * kRowBytes, Rows<T>(p.v, p, batch, head), first, keys);
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  load_fragments<S::MT>(k, base, own, rows_first);
  load_fragments<S::MT>(v, base + S::KEYS * kRowBytes, own, rows_first);
  __syncthreads();

  // A query past the end has q = d_out = 0 and both numbers 0, so it adds 0.
  const auto load_step = [&](int i) {
    load_tile<S::QUERIES, S::THREADS>(q_tile(i), q_rows, i * S::QUERIES, p.queries);
    load_tile<S::QUERIES, S::THREADS>(d_out_tile(i), d_out_rows, i * S::QUERIES, p.queries);
    for (int r = threadIdx.x; r < S::QUERIES; r += S::THREADS) {
      const int token = i * S::QUERIES + r;
      copy8(rows_tile(i) + 8 * r, rows + min(token, p.queries - 1), token < p.queries);
    }
    commit_copies();
  };
  load_step(0);
  float d_k[S::MT][8][4] = {}, d_v[S::MT][8][4] = {};
  for (int i = 0; i < steps; ++i) {
    wait_copies<0>();
    __syncthreads();  // step i has arrived; every warp is done with step i - 1, whose place the next copies take
    if (i + 1 < steps) load_step(i + 1);
#pragma unroll 1
    for (int part = 0; part < S::QUERIES; part += S::STEP) {
      float s[S::MT][S::STEP / 8][4] = {}, d_p[S::MT][S::STEP / 8][4] = {};
      multiply_rows<T>(s, k, q_tile(i), part, chunks_first);
      multiply_rows<T>(d_p, v, d_out_tile(i), part, chunks_first);
#pragma unroll
      for (int n = 0; n < S::STEP / 8; ++n) {
        float stats[4];  // lse and delta of columns 2t and 2t + 1
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(stats[0]), "=f"(stats[1]), "=f"(stats[2]), "=f"(stats[3])
                     : "r"(rows_tile(i) + 8 * (part + 8 * n + 2 * (lane % 4)))
                     : "memory");
#pragma unroll
        for (int m = 0; m < S::MT; ++m)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            s[m][n][e] = exp2_approx(fmaf(s[m][n][e], factor, -stats[2 * (e % 2)]));
            d_p[m][n][e] = s[m][n][e] * (d_p[m][n][e] - stats[2 * (e % 2) + 1]);
          }
      }
      multiply_accumulator<T>(d_v, s, d_out_tile(i), part, rows_first);
      multiply_accumulator<T>(d_k, d_p, q_tile(i), part, rows_first);
    }
  }
  __syncthreads();
  float factors[S::MT][2];
#pragma unroll
  for (int m = 0; m < S::MT; ++m) factors[m][0] = factors[m][1] = p.scale;
  store_tile<T>(Rows<T>(p.d_k, p, batch, head), d_k, factors, base, own, first + own, keys);
#pragma unroll
  for (int m = 0; m < S::MT; ++m) factors[m][0] = factors[m][1] = 1.0f;
  store_tile<T>(Rows<T>(p.d_v, p, batch, head), d_v, factors, base + S::KEYS * kRowBytes, own, first + own, keys);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
using BackwardQ = BackwardQTile<1, 4, 32, 32, 4>;  // half the shared memory; plain copies want more blocks
using BackwardKv = BackwardKvTile<1, 4, 32, 16, 3>;
#else
using BackwardQ = BackwardQTile<1, 4, 64, 32, 4>;
using BackwardKv = BackwardKvTile<1, 4, 64, 32, 3>;
#endif

}  // namespace attention

#define ATTENTION_BACKWARD(part, function, type, name, tile)                                                      \
  extern "C" __global__ void __launch_bounds__(attention::tile::THREADS, attention::tile::BLOCKS)                 \
      attention_##part##_##name(const __grid_constant__ AttentionParameters p) {                                 \
    attention::function<type, attention::tile>(p);                                                               \
  }
ATTENTION_BACKWARD(backward_q, backward_q_mma, __half, f16_d64, BackwardQ)
ATTENTION_BACKWARD(backward_q, backward_q_mma, __nv_bfloat16, bf16_d64, BackwardQ)
ATTENTION_BACKWARD(backward_kv, backward_kv_mma, __half, f16_d64, BackwardKv)
ATTENTION_BACKWARD(backward_kv, backward_kv_mma, __nv_bfloat16, bf16_d64, BackwardKv)
