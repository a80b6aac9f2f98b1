// Attention forward on Hopper (sm_90a only), head width 64.
//
//   attention_forward_{f16,bf16}_d64_hopper             out, lse
//   attention_forward_{f16,bf16}_d64_hopper_pair        the same with two smaller blocks per multiprocessor
//
// Block 640, grid (⌈queries / 256⌉, heads, batch), 135168 bytes of dynamic shared memory; pair: block 384,
// grid (⌈queries / 128⌉, heads, batch), 84992 bytes. Pointers are 16-byte aligned, strides multiples of 8. Scores, softmax and
// sums in f32; probabilities are rounded before the second product.

#include "attention_hopper.cuh"

namespace attention {

template <typename T, typename S>
__device__ __forceinline__ void forward_hopper(const AttentionParameters& p) {
  const Stages<S> stages;
  const int head = blockIdx.y, batch = blockIdx.z, keys = p.image + p.context;
  if (threadIdx.x >= 128 * S::WARPGROUPS) {
    copy_all<T, S>(stages, Rows<T>(p.k, p, batch, head), Rows<T>(p.v, p, batch, head), nullptr, keys);
    return;
  }
  take_registers<S::REGISTERS>();
  const int lane = threadIdx.x % 32;
  const int token = blockIdx.x * S::ROWS + threadIdx.x / 32 * 16 + lane / 4;  // and token + 8
  const float factor = p.scale * kLog2e;
  const OwnRows<T, S> q(stages, 0, Rows<T>(p.q, p, batch, head), p.queries);

  constexpr int N = S::STEP / 8;
  float out[8][4] = {}, s[N][4], largest[2] = {-INFINITY, -INFINITY}, total[2] = {}, shrink[2];
  uint32_t probabilities[N / 2][4];
  // s becomes probabilities · total; the running maximum and sum move on.
  const auto softmax = [&](int first) {
    mask_columns(s, first, keys);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float most = largest[h];
#pragma unroll
      for (int n = 0; n < N; ++n) most = fmaxf(most, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      const float shift = most * factor;
      shrink[h] = exp2_approx(largest[h] * factor - shift);
      largest[h] = most;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) {
          s[n][e] = exp2_approx(fmaf(s[n][e], factor, -shift));
          sum += s[n][e];
        }
      total[h] = fmaf(total[h], shrink[h], sum);
    }
  };

  Turn<S::STAGES> turn;
  for (int first = 0; first < keys; first += S::STEP) {
    wait_full<S>(stages, turn);
    pin(s);
    products_begin();
    q.begin(s, stages.first_tile(turn.stage));
    products_wait<0>();
    pin(s);
    softmax(first);
    round_fragments<T>(probabilities, s);
    if (__any_sync(0xffffffffu, shrink[0] != 1.0f || shrink[1] != 1.0f)) {  // the maxima soon stay
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) out[n][e] *= shrink[e / 2];
    }
    pin(out);
    products_begin();
    begin_columns<T>(out, probabilities, stages.second_tile(turn.stage));
    products_wait<0>();
    pin(out);
    release<S>(stages, turn);
    turn.next();
  }

  float* lse = p.lse + row_of(p, batch, head);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float sum = total[h];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (lane % 4 == 0 && token + 8 * h < p.queries) lse[token + 8 * h] = largest[h] * p.scale + logf(sum);
    total[h] = 1.0f / sum;
  }
  write_rows<T>(Rows<T>(p.out, p, batch, head), out, total, token, p.queries);
}

using HopperForward = HopperTile<4, 64, 4, 1, true>;
using HopperForwardPair = HopperTile<2, 64, 3, 2, true>;
static_assert(HopperForward::SHARED == 135168 && HopperForwardPair::SHARED == 84992);

}  // namespace attention

ATTENTION_HOPPER(forward, __half, f16_d64_hopper, HopperForward)
ATTENTION_HOPPER(forward, __nv_bfloat16, bf16_d64_hopper, HopperForward)
ATTENTION_HOPPER(forward, __half, f16_d64_hopper_pair, HopperForwardPair)
ATTENTION_HOPPER(forward, __nv_bfloat16, bf16_d64_hopper_pair, HopperForwardPair)
