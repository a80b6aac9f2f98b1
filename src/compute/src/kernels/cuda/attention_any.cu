// Attention of any head width up to 128, forward and backward, in plain f32 arithmetic (fused multiply-adds, no tensor
// cores) on operands of f32, f16 or bf16.
//
//   attention_forward_{f32,f16,bf16}_upto{32,64,128}      out, lse
//   attention_backward_q_{...}                            d_q, rows       (reads q, k, v, out, d_out, lse)
//   attention_backward_kv_{...}                           d_k, d_v        (reads q, k, v, d_out, rows: after backward_q)
//
// head_dim <= the number in the name. Block 256. Grid (tiles, heads, batch): tiles of queries (forward, backward_q) or of
// keys (backward_kv), 64 a tile, 32 for upto128. Dynamic shared memory in bytes, for 32, 64, 128: forward 41984, 41728,
// 35200; backward_q and backward_kv 50944, 58624, 51840.
// A result is a fixed function of its inputs: no atomics.

#include "attention.cuh"
#include "values.cuh"

namespace attention {

constexpr int kThreads = 256;

// Threads stand as 16 × 16; thread (y, x) has rows y + 16 i and columns x + 16 j of a product.
template <int D_, int M_, int N_>
struct Tile {
  static constexpr int D = D_;               // padded head width
  static constexpr int M = M_, N = N_;       // rows of the block's own operand; rows of the one it walks over
  static constexpr int MR = M / 16, NR = N / 16, DR = D / 16;
  static constexpr int LD = D + 1, LP = N + 1;  // odd strides: no bank conflicts
  static constexpr int forward_bytes = 4 * ((M + 2 * N) * LD + M * LP);
  static constexpr int backward_bytes = 4 * ((2 * M + 2 * N) * LD + M * LP) + 8 * N;
};
using Upto32 = Tile<32, 64, 64>;
using Upto64 = Tile<64, 64, 32>;
using Upto128 = Tile<128, 32, 16>;

static_assert(Upto32::forward_bytes == 41984 && Upto64::forward_bytes == 41728 && Upto128::forward_bytes == 35200);
static_assert(Upto32::backward_bytes == 50944 && Upto64::backward_bytes == 58624 && Upto128::backward_bytes == 51840);

// c[i][j] += Σ_k a[(y + 16 i) lda + k] b[(x + 16 j) ldb + k · kb]
template <int RM, int RN, int K, int LDA, int LDB, int KB>
__device__ __forceinline__ void multiply_add(float (&c)[RM][RN], const float* a, const float* b, int x, int y) {
#pragma unroll 8
  for (int k = 0; k < K; ++k) {
    float av[RM], bv[RN];
#pragma unroll
    for (int i = 0; i < RM; ++i) av[i] = a[(y + 16 * i) * LDA + k];
#pragma unroll
    for (int j = 0; j < RN; ++j) bv[j] = b[(x + 16 * j) * LDB + k * KB];
#pragma unroll
    for (int i = 0; i < RM; ++i)
#pragma unroll
      for (int j = 0; j < RN; ++j) c[i][j] = fmaf(av[i], bv[j], c[i][j]);
  }
}

// Rows [first, first + R) into shared memory, zeros past `limit` and past the head's width.
template <typename T, int R, int D, int LD>
__device__ __forceinline__ void load_rows(float* to, const Rows<T>& from, int first, int limit, int head_dim) {
  for (int i = threadIdx.x; i < R * D; i += kThreads) {
    const int r = i / D, c = i % D;
    to[r * LD + c] = first + r < limit && c < head_dim ? widen(from.at(first + r)[c]) : 0.0f;
  }
}

template <typename T, int RM, int DR>
__device__ __forceinline__ void store_rows(const Rows<T>& to, const float (&c)[RM][DR], int first, int limit, int head_dim, int x, int y, float factor) {
#pragma unroll
  for (int i = 0; i < RM; ++i) {
    const int token = first + y + 16 * i;
    if (token >= limit) continue;
    T* row = to.at(token);
#pragma unroll
    for (int j = 0; j < DR; ++j)
      if (x + 16 * j < head_dim) row[x + 16 * j] = narrow<T>(c[i][j] * factor);
  }
}

// Over the 16 threads of a row.
__device__ __forceinline__ float row_max(float v) {
#pragma unroll
  for (int d = 8; d; d >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, d));
  return v;
}
__device__ __forceinline__ float row_sum(float v) {
#pragma unroll
  for (int d = 8; d; d >>= 1) v += __shfl_xor_sync(0xffffffffu, v, d);
  return v;
}

template <typename T, typename S>
__device__ __forceinline__ void forward_any(const AttentionParameters& p) {
  extern __shared__ float memory[];
  float* q = memory;
  float* k = q + S::M * S::LD;
  float* v = k + S::N * S::LD;
  float* probabilities = v + S::N * S::LD;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  const int first = blockIdx.x * S::M, head = blockIdx.y, batch = blockIdx.z;
  const int keys = p.image + p.context;
  const Rows<T> k_rows(p.k, p, batch, head), v_rows(p.v, p, batch, head);
  load_rows<T, S::M, S::D, S::LD>(q, Rows<T>(p.q, p, batch, head), first, p.queries, p.head_dim);

  float out[S::MR][S::DR] = {}, largest[S::MR], total[S::MR];
#pragma unroll
  for (int i = 0; i < S::MR; ++i) {
    largest[i] = -INFINITY;
    total[i] = 0.0f;
  }
  for (int key = 0; key < keys; key += S::N) {
    __syncthreads();
    load_rows<T, S::N, S::D, S::LD>(k, k_rows, key, keys, p.head_dim);
    load_rows<T, S::N, S::D, S::LD>(v, v_rows, key, keys, p.head_dim);
    __syncthreads();
    float s[S::MR][S::NR] = {};
    multiply_add<S::MR, S::NR, S::D, S::LD, S::LD, 1>(s, q, k, x, y);
#pragma unroll
    for (int i = 0; i < S::MR; ++i) {
      float m = largest[i];
#pragma unroll
      for (int j = 0; j < S::NR; ++j) {
        s[i][j] = key + x + 16 * j < keys ? s[i][j] * p.scale : -INFINITY;
        m = fmaxf(m, s[i][j]);
      }
      m = row_max(m);
      const float shrink = expf(largest[i] - m);
      largest[i] = m;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < S::NR; ++j) {
        const float e = expf(s[i][j] - m);
        probabilities[(y + 16 * i) * S::LP + x + 16 * j] = e;
        sum += e;
      }
      total[i] = total[i] * shrink + row_sum(sum);
#pragma unroll
      for (int j = 0; j < S::DR; ++j) out[i][j] *= shrink;
    }
    __syncwarp();  // a row of probabilities stays within half a warp
    multiply_add<S::MR, S::DR, S::N, S::LP, 1, S::LD>(out, probabilities, v, x, y);
  }
  const Rows<T> out_rows(p.out, p, batch, head);
  float* lse = p.lse + row_of(p, batch, head);
#pragma unroll
  for (int i = 0; i < S::MR; ++i) {
    const int token = first + y + 16 * i;
    if (x == 0 && token < p.queries) lse[token] = largest[i] + logf(total[i]);
#pragma unroll
    for (int j = 0; j < S::DR; ++j) out[i][j] /= total[i];
  }
  store_rows<T, S::MR, S::DR>(out_rows, out, first, p.queries, p.head_dim, x, y, 1.0f);
}

template <typename T, typename S>
__device__ __forceinline__ void backward_q_any(const AttentionParameters& p) {
  extern __shared__ float memory[];
  float* q = memory;
  float* d_out = q + S::M * S::LD;
  float* k = d_out + S::M * S::LD;
  float* v = k + S::N * S::LD;
  float* d_scores = v + S::N * S::LD;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  const int first = blockIdx.x * S::M, head = blockIdx.y, batch = blockIdx.z;
  const int keys = p.image + p.context;
  const Rows<T> k_rows(p.k, p, batch, head), v_rows(p.v, p, batch, head), out_rows(p.out, p, batch, head);
  load_rows<T, S::M, S::D, S::LD>(q, Rows<T>(p.q, p, batch, head), first, p.queries, p.head_dim);
  load_rows<T, S::M, S::D, S::LD>(d_out, Rows<T>(p.d_out, p, batch, head), first, p.queries, p.head_dim);
  __syncthreads();

  const int64_t row = row_of(p, batch, head);
  float lse[S::MR], delta[S::MR];
#pragma unroll
  for (int i = 0; i < S::MR; ++i) {
    const int r = y + 16 * i, token = first + r;
    float sum = 0.0f;
    if (token < p.queries)
      for (int c = x; c < p.head_dim; c += 16) sum = fmaf(widen(out_rows.at(token)[c]), d_out[r * S::LD + c], sum);
    delta[i] = row_sum(sum);
    lse[i] = token < p.queries ? p.lse[row + token] : 0.0f;
    if (x == 0 && token < p.queries) p.rows[row + token] = make_float2(lse[i] * kLog2e, delta[i]);
  }

  float d_q[S::MR][S::DR] = {};
  for (int key = 0; key < keys; key += S::N) {
    __syncthreads();
    load_rows<T, S::N, S::D, S::LD>(k, k_rows, key, keys, p.head_dim);
    load_rows<T, S::N, S::D, S::LD>(v, v_rows, key, keys, p.head_dim);
    __syncthreads();
    float s[S::MR][S::NR] = {}, d_p[S::MR][S::NR] = {};
    multiply_add<S::MR, S::NR, S::D, S::LD, S::LD, 1>(s, q, k, x, y);
    multiply_add<S::MR, S::NR, S::D, S::LD, S::LD, 1>(d_p, d_out, v, x, y);
#pragma unroll
    for (int i = 0; i < S::MR; ++i)
#pragma unroll
      for (int j = 0; j < S::NR; ++j) {
        const float probability = key + x + 16 * j < keys ? expf(s[i][j] * p.scale - lse[i]) : 0.0f;
        d_scores[(y + 16 * i) * S::LP + x + 16 * j] = probability * (d_p[i][j] - delta[i]);
      }
    __syncwarp();
    multiply_add<S::MR, S::DR, S::N, S::LP, 1, S::LD>(d_q, d_scores, k, x, y);
  }
  store_rows<T, S::MR, S::DR>(Rows<T>(p.d_q, p, batch, head), d_q, first, p.queries, p.head_dim, x, y, p.scale);
}

// Rows are keys here and columns are queries.
template <typename T, typename S>
__device__ __forceinline__ void backward_kv_any(const AttentionParameters& p) {
  extern __shared__ float memory[];
  float* k = memory;
  float* v = k + S::M * S::LD;
  float* q = v + S::M * S::LD;
  float* d_out = q + S::N * S::LD;
  float* transposed = d_out + S::N * S::LD;  // probabilities, then gradients of the scores
  float* stats = transposed + S::M * S::LP;  // lse and delta of each query
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  const int first = blockIdx.x * S::M, head = blockIdx.y, batch = blockIdx.z;
  const int keys = p.image + p.context;
  const Rows<T> q_rows(p.q, p, batch, head), d_out_rows(p.d_out, p, batch, head);
  const int64_t row = row_of(p, batch, head);
  load_rows<T, S::M, S::D, S::LD>(k, Rows<T>(p.k, p, batch, head), first, keys, p.head_dim);
  load_rows<T, S::M, S::D, S::LD>(v, Rows<T>(p.v, p, batch, head), first, keys, p.head_dim);

  float d_k[S::MR][S::DR] = {}, d_v[S::MR][S::DR] = {};
  for (int query = 0; query < p.queries; query += S::N) {
    __syncthreads();
    load_rows<T, S::N, S::D, S::LD>(q, q_rows, query, p.queries, p.head_dim);
    load_rows<T, S::N, S::D, S::LD>(d_out, d_out_rows, query, p.queries, p.head_dim);
    if (threadIdx.x < S::N) {
      const int token = query + threadIdx.x;
      stats[threadIdx.x] = token < p.queries ? p.lse[row + token] : 0.0f;
      stats[S::N + threadIdx.x] = token < p.queries ? p.rows[row + token].y : 0.0f;
    }
    __syncthreads();
    // A query past the end has q = d_out = 0, so it adds 0.
    float s[S::MR][S::NR] = {}, d_p[S::MR][S::NR] = {};
    multiply_add<S::MR, S::NR, S::D, S::LD, S::LD, 1>(s, k, q, x, y);
    multiply_add<S::MR, S::NR, S::D, S::LD, S::LD, 1>(d_p, v, d_out, x, y);
#pragma unroll
    for (int i = 0; i < S::MR; ++i)
#pragma unroll
      for (int j = 0; j < S::NR; ++j) {
        s[i][j] = expf(s[i][j] * p.scale - stats[x + 16 * j]);
        transposed[(y + 16 * i) * S::LP + x + 16 * j] = s[i][j];
      }
    __syncwarp();
    multiply_add<S::MR, S::DR, S::N, S::LP, 1, S::LD>(d_v, transposed, d_out, x, y);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < S::MR; ++i)
#pragma unroll
      for (int j = 0; j < S::NR; ++j)
        transposed[(y + 16 * i) * S::LP + x + 16 * j] = s[i][j] * (d_p[i][j] - stats[S::N + x + 16 * j]);
    __syncwarp();
    multiply_add<S::MR, S::DR, S::N, S::LP, 1, S::LD>(d_k, transposed, q, x, y);
  }
  store_rows<T, S::MR, S::DR>(Rows<T>(p.d_k, p, batch, head), d_k, first, keys, p.head_dim, x, y, p.scale);
  store_rows<T, S::MR, S::DR>(Rows<T>(p.d_v, p, batch, head), d_v, first, keys, p.head_dim, x, y, 1.0f);
}

}  // namespace attention

#define ATTENTION_ANY(type, name, width)                                                                                       \
  extern "C" __global__ void __launch_bounds__(attention::kThreads)                                                           \
      attention_forward_##name##_upto##width(const __grid_constant__ AttentionParameters p) {                                 \
    attention::forward_any<type, attention::Upto##width>(p);                                                                  \
  }                                                                                                                           \
  extern "C" __global__ void __launch_bounds__(attention::kThreads)                                                           \
      attention_backward_q_##name##_upto##width(const __grid_constant__ AttentionParameters p) {                              \
    attention::backward_q_any<type, attention::Upto##width>(p);                                                               \
  }                                                                                                                           \
  extern "C" __global__ void __launch_bounds__(attention::kThreads)                                                           \
      attention_backward_kv_##name##_upto##width(const __grid_constant__ AttentionParameters p) {                             \
    attention::backward_kv_any<type, attention::Upto##width>(p);                                                              \
  }
#define ATTENTION_ANY_WIDTHS(type, name) \
  ATTENTION_ANY(type, name, 32)          \
  ATTENTION_ANY(type, name, 64)          \
  ATTENTION_ANY(type, name, 128)

ATTENTION_ANY_WIDTHS(float, f32)
ATTENTION_ANY_WIDTHS(__half, f16)
ATTENTION_ANY_WIDTHS(__nv_bfloat16, bf16)
