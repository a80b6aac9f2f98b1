// Attention backward on Hopper (sm_90a only), head width 64.
//
//   attention_backward_q_{f16,bf16}_d64_hopper     d_q, rows      (reads q, k, v, out, d_out, lse)
//   attention_backward_kv_{f16,bf16}_d64_hopper    d_k, d_v       (reads q, k, v, d_out, rows: after backward_q)
//   ..._hopper_pair: the same with two smaller blocks per multiprocessor
//
// backward_q: block 512, grid (⌈queries / 192⌉, heads, batch), 118784 bytes of dynamic shared memory; pair: 256, 64, 69632.
// backward_kv: block 384, grid (⌈keys / 128⌉, heads, batch), 69632 bytes; pair: 256, 64, 69632. Pointers are 16-byte aligned,
// strides multiples of 8. Both compute the scores again: no scores in memory, no atomics, one order of every sum.
// Accumulation in f32; probabilities and the scores' gradients are rounded before the products that use them.

#include "attention_hopper.cuh"

namespace attention {

template <typename T, typename S>
__device__ __forceinline__ void backward_q_hopper(const AttentionParameters& p) {
  static_assert(S::STEP == 64);
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
  const Rows<T> d_out_rows(p.d_out, p, batch, head);
  const OwnRows<T, S> q(stages, 0, Rows<T>(p.q, p, batch, head), p.queries), d_out(stages, 1, d_out_rows, p.queries);
  float lse[2], delta[2] = {};
  {
    uint32_t out[4][4], gradient[4][4];
    read_fragments<T>(out, Rows<T>(p.out, p, batch, head), token, p.queries);
    read_fragments<T>(gradient, d_out_rows, token, p.queries);
    const int64_t row = row_of(p, batch, head);
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int e = 0; e < 4; ++e) {  // elements 0 and 2 are of row g, 1 and 3 of row g + 8
        const float2 a = unpack<T>(out[k][e]), b = unpack<T>(gradient[k][e]);
        delta[e % 2] = fmaf(a.x, b.x, fmaf(a.y, b.y, delta[e % 2]));
      }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      delta[h] += __shfl_xor_sync(0xffffffffu, delta[h], 1);
      delta[h] += __shfl_xor_sync(0xffffffffu, delta[h], 2);
      const bool valid = token + 8 * h < p.queries;
      lse[h] = valid ? p.lse[row + token + 8 * h] * kLog2e : 0.0f;
      if (lane % 4 == 0 && valid) p.rows[row + token + 8 * h] = make_float2(lse[h], delta[h]);
    }
  }

  float d_q[8][4] = {}, d_p[8][4];
  uint32_t d_s[4][4];
  Turn<S::STAGES> turn, before;
  const auto exponentials = [&](float (&s)[8][4], int first) {
    mask_columns(s, first, keys);
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[n][e] = exp2_approx(fmaf(s[n][e], factor, -lse[e / 2]));
  };
  // From gradients of probabilities to those of scores.
  const auto gradients = [&](const float (&s)[8][4]) {
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) d_p[n][e] = s[n][e] * (d_p[n][e] - delta[e / 2]);
    round_fragments<T>(d_s, d_p);
  };
  float s[8][4];
  for (int first = 0; first < keys; first += S::STEP) {
    wait_full<S>(stages, turn);
    pin(s);
    pin(d_p);
    products_begin();
    q.begin(s, stages.first_tile(turn.stage));
    d_out.begin(d_p, stages.second_tile(turn.stage));
    products_wait<2>();  // d_q of the step before
    if (first) release<S>(stages, before);
    products_wait<1>();
    pin(s);
    exponentials(s, first);
    products_wait<0>();
    pin(d_p);
    gradients(s);
    pin(d_q);
    products_begin();
    begin_columns<T>(d_q, d_s, stages.first_tile(turn.stage));
    before = turn;
    turn.next();
  }
  products_wait<0>();
  pin(d_q);
  const float scale[2] = {p.scale, p.scale};
  write_rows<T>(Rows<T>(p.d_q, p, batch, head), d_q, scale, token, p.queries);
}

// Products here are transposed: rows are keys, columns are queries.
template <typename T, typename S>
__device__ __forceinline__ void backward_kv_hopper(const AttentionParameters& p) {
  static_assert(S::STEP == 64);
  const Stages<S> stages;
  const int head = blockIdx.y, batch = blockIdx.z, keys = p.image + p.context;
  if (threadIdx.x >= 128 * S::WARPGROUPS) {
    // A query past the end has q = d_out = 0 and both numbers 0, so it adds 0.
    copy_all<T, S>(stages, Rows<T>(p.q, p, batch, head), Rows<T>(p.d_out, p, batch, head), p.rows + row_of(p, batch, head), p.queries);
    return;
  }
  take_registers<S::REGISTERS>();
  const int lane = threadIdx.x % 32;
  const int token = blockIdx.x * S::ROWS + threadIdx.x / 32 * 16 + lane / 4;  // and token + 8
  const float factor = p.scale * kLog2e;
  const OwnRows<T, S> k(stages, 0, Rows<T>(p.k, p, batch, head), keys), v(stages, 1, Rows<T>(p.v, p, batch, head), keys);

  float d_k[8][4] = {}, d_v[8][4] = {}, d_p[8][4];
  uint32_t probabilities[4][4], d_s[4][4];
  Turn<S::STAGES> turn, before;
  // lse and delta of columns 2t and 2t + 1 of the n-th eight; read twice, as registers are short.
  const auto numbers = [&](float (&x)[4], int n) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
                 : "r"(stages.numbers(turn.stage) + 8 * (8 * n + 2 * (lane % 4)))
                 : "memory");
  };
  const auto exponentials = [&](float (&s)[8][4]) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      float x[4];
      numbers(x, n);
#pragma unroll
      for (int e = 0; e < 4; ++e) s[n][e] = exp2_approx(fmaf(s[n][e], factor, -x[2 * (e % 2)]));
    }
    round_fragments<T>(probabilities, s);
  };
  // From gradients of probabilities to those of scores.
  const auto gradients = [&](const float (&s)[8][4]) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      float x[4];
      numbers(x, n);
#pragma unroll
      for (int e = 0; e < 4; ++e) d_p[n][e] = s[n][e] * (d_p[n][e] - x[2 * (e % 2) + 1]);
    }
  };
  float s[8][4];
  for (int first = 0; first < p.queries; first += S::STEP) {
    wait_full<S>(stages, turn);
    pin(s);
    pin(d_p);
    products_begin();
    k.begin(s, stages.first_tile(turn.stage));
    v.begin(d_p, stages.second_tile(turn.stage));
    products_wait<2>();  // d_v and d_k of the step before
    if (first) release<S>(stages, before);
    products_wait<1>();
    pin(s);
    exponentials(s);
    pin(d_v);
    products_begin();
    begin_columns<T>(d_v, probabilities, stages.second_tile(turn.stage));
    products_wait<1>();
    pin(d_p);
    gradients(s);
    round_fragments<T>(d_s, d_p);
    pin(d_k);
    products_begin();
    begin_columns<T>(d_k, d_s, stages.first_tile(turn.stage));
    before = turn;
    turn.next();
  }
  products_wait<0>();
  pin(d_k);
  pin(d_v);
  const float scale[2] = {p.scale, p.scale}, one[2] = {1.0f, 1.0f};
  write_rows<T>(Rows<T>(p.d_k, p, batch, head), d_k, scale, token, keys);
  write_rows<T>(Rows<T>(p.d_v, p, batch, head), d_v, one, token, keys);
}

using HopperBackwardQ = HopperTile<3, 64, 4, 1, true>;
using HopperBackwardQPair = HopperTile<1, 64, 4, 2, false>;
using HopperBackwardKv = HopperTile<2, 64, 4, 1, false>;
using HopperBackwardKvPair = HopperTile<1, 64, 4, 2, false>;
static_assert(HopperBackwardQ::SHARED == 118784 && HopperBackwardKv::SHARED == 69632 && HopperBackwardKvPair::SHARED == 69632);

}  // namespace attention

ATTENTION_HOPPER(backward_q, __half, f16_d64_hopper, HopperBackwardQ)
ATTENTION_HOPPER(backward_q, __nv_bfloat16, bf16_d64_hopper, HopperBackwardQ)
ATTENTION_HOPPER(backward_q, __half, f16_d64_hopper_pair, HopperBackwardQPair)
ATTENTION_HOPPER(backward_q, __nv_bfloat16, bf16_d64_hopper_pair, HopperBackwardQPair)
ATTENTION_HOPPER(backward_kv, __half, f16_d64_hopper, HopperBackwardKv)
ATTENTION_HOPPER(backward_kv, __nv_bfloat16, bf16_d64_hopper, HopperBackwardKv)
ATTENTION_HOPPER(backward_kv, __half, f16_d64_hopper_pair, HopperBackwardKvPair)
ATTENTION_HOPPER(backward_kv, __nv_bfloat16, bf16_d64_hopper_pair, HopperBackwardKvPair)
