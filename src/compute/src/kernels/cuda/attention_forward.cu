// Attention forward on tensor cores, head width 64.
//
//   attention_forward_{f16,bf16}_d64      out, lse
//
// bf16 needs sm_80. Block 128, grid (⌈queries / 64⌉, heads, batch), 32768 bytes of dynamic shared memory (16384 before sm_80).
// Pointers are 16-byte aligned, strides multiples of 8. Scores, softmax and sums in f32; probabilities are rounded before the
// second product.
//
// A warp has 16 queries in its registers and walks over the keys 64 at a time; keys and values of the next 64 are copied
// while these are worked on. 128 registers and four blocks per multiprocessor beat 32 queries per warp with two blocks.

#include "attention_mma.cuh"

namespace attention {

template <int MT_, int WARPS_, int KEYS_, int BLOCKS_>
struct ForwardTile {
  static constexpr int MT = MT_;         // 16-row pieces of a warp
  static constexpr int WARPS = WARPS_;
  static constexpr int KEYS = KEYS_;     // keys per step
  static constexpr int BLOCKS = BLOCKS_; // blocks per multiprocessor that registers must allow
  static constexpr int THREADS = 32 * WARPS;
  static constexpr int QUERIES = 16 * MT * WARPS;
  // Two stages of keys and values. The queries come by way of the second and the output leaves by it.
  static constexpr int SHARED = (QUERIES > 2 * KEYS ? QUERIES + 2 * KEYS : 4 * KEYS) * kRowBytes;
};

template <typename T, typename S>
__device__ __forceinline__ void forward_mma(const AttentionParameters& p) {
  extern __shared__ __align__(128) uint8_t memory[];
  const uint32_t base = shared_address(memory), q_tile = base + 2 * S::KEYS * kRowBytes;
  const auto k_tile = [&](int j) { return base + (j & 1) * 2 * S::KEYS * kRowBytes; };
  const auto v_tile = [&](int j) { return base + ((j & 1) * 2 + 1) * S::KEYS * kRowBytes; };
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first = blockIdx.x * S::QUERIES, head = blockIdx.y, batch = blockIdx.z;
  const int keys = p.image + p.context;
  const int steps = (keys + S::KEYS - 1) / S::KEYS;
  const Rows<T> k_rows(p.k, p, batch, head), v_rows(p.v, p, batch, head);
  const Lane rows_first = Lane::rows_first(), chunks_first = Lane::chunks_first();

  load_tile<S::QUERIES, S::THREADS>(q_tile, Rows<T>(p.q, p, batch, head), first, p.queries);
  commit_copies();
  load_tile<S::KEYS, S::THREADS>(k_tile(0), k_rows, 0, keys);
  load_tile<S::KEYS, S::THREADS>(v_tile(0), v_rows, 0, keys);
  commit_copies();
  wait_copies<1>();
  __syncthreads();
  uint32_t q[S::MT][4][4];
  load_fragments<S::MT>(q, q_tile, 16 * S::MT * warp, rows_first);

  const float factor = p.scale * kLog2e;
  float out[S::MT][8][4] = {}, largest[S::MT][2], total[S::MT][2] = {};
#pragma unroll
  for (int m = 0; m < S::MT; ++m) largest[m][0] = largest[m][1] = -INFINITY;

  for (int j = 0; j < steps; ++j) {
    wait_copies<0>();
    __syncthreads();  // step j has arrived; every warp is done with step j - 1, whose place the next copies take
    if (j + 1 < steps) {
      load_tile<S::KEYS, S::THREADS>(k_tile(j + 1), k_rows, (j + 1) * S::KEYS, keys);
      load_tile<S::KEYS, S::THREADS>(v_tile(j + 1), v_rows, (j + 1) * S::KEYS, keys);
      commit_copies();
    }
    float s[S::MT][S::KEYS / 8][4] = {};
    multiply_rows<T>(s, q, k_tile(j), 0, chunks_first);
    if ((j + 1) * S::KEYS > keys) {
#pragma unroll
      for (int n = 0; n < S::KEYS / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (j * S::KEYS + 8 * n + 2 * (lane % 4) + e % 2 >= keys)
#pragma unroll
            for (int m = 0; m < S::MT; ++m) s[m][n][e] = -INFINITY;
    }
#pragma unroll
    for (int m = 0; m < S::MT; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {  // rows g and g + 8: spread over the four lanes of equal g
        float most = largest[m][h];
#pragma unroll
        for (int n = 0; n < S::KEYS / 8; ++n) most = fmaxf(most, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
        const float shift = most * factor, shrink = exp2_approx(largest[m][h] * factor - shift);
        largest[m][h] = most;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < S::KEYS / 8; ++n)
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) {
            s[m][n][e] = exp2_approx(fmaf(s[m][n][e], factor, -shift));
            sum += s[m][n][e];
          }
        total[m][h] = fmaf(total[m][h], shrink, sum);
        if (__any_sync(0xffffffffu, shrink != 1.0f)) {  // the maximum soon stays
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            out[m][n][2 * h] *= shrink;
            out[m][n][2 * h + 1] *= shrink;
          }
        }
      }
    multiply_accumulator<T>(out, s, v_tile(j), 0, rows_first);
  }

  float* lse = p.lse + row_of(p, batch, head);
#pragma unroll
  for (int m = 0; m < S::MT; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = total[m][h];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const int token = first + 16 * (S::MT * warp + m) + 8 * h + lane / 4;
      if (lane % 4 == 0 && token < p.queries) lse[token] = largest[m][h] * p.scale + logf(sum);
      total[m][h] = 1.0f / sum;
    }
  __syncthreads();
  store_tile<T>(Rows<T>(p.out, p, batch, head), out, total, q_tile, 16 * S::MT * warp, first + 16 * S::MT * warp, p.queries);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
using Forward = ForwardTile<1, 4, 32, 4>;  // half the shared memory; plain copies want more blocks
#else
using Forward = ForwardTile<1, 4, 64, 4>;
#endif

}  // namespace attention

#define ATTENTION_FORWARD(type, name, tile)                                                                       \
  extern "C" __global__ void __launch_bounds__(attention::tile::THREADS, attention::tile::BLOCKS)                 \
      attention_forward_##name(const __grid_constant__ AttentionParameters p) {                                  \
    attention::forward_mma<type, attention::tile>(p);                                                            \
  }
ATTENTION_FORWARD(__half, f16_d64, Forward)
ATTENTION_FORWARD(__nv_bfloat16, bf16_d64, Forward)
