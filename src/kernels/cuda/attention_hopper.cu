// Attention on Hopper (sm_90a), head width 64: warpgroup products (wgmma) fed by a copying warp.
//
//   attention_forward_{f16,bf16}_d64_hopper        out, lse
//   attention_backward_q_{f16,bf16}_d64_hopper     d_q, rows      (reads q, k, v, out, d_out, lse)
//   attention_backward_kv_{f16,bf16}_d64_hopper    d_k, d_v       (reads q, k, v, d_out, rows: after backward_q)
//
// Pointers are 16-byte aligned, strides multiples of 8. No scores in memory, no atomics, one order of every sum.
//
// A warpgroup has 64 rows (queries, or keys in backward_kv), whose operands stay in registers, and walks over the other
// side's tiles in shared memory. One more warpgroup copies these tiles, several steps ahead; the two kinds wait for
// each other by barriers `full` and `empty` of each stage. The warpgroups of a block run freely, so that one's
// exponentials meet another's products.

#include "attention_mma.cuh"

namespace attention {

// Barriers in shared memory.
__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives when all copies that this thread has begun are there.
__device__ __forceinline__ void barrier_arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}" ::"r"(barrier), "r"(parity)
      : "memory");
}

// What ordinary accesses wrote before, the tensor cores see after.
__device__ __forceinline__ void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps the compiler from moving uses of registers across a wait for products.
template <int N>
__device__ __forceinline__ void pin(float (&c)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(c[n][e])::"memory");
}

// A swizzled tile [rows, 64] as an operand: 8 rows of 128 bytes, then the next 8 rows.
__device__ __forceinline__ uint64_t operand(uint32_t tile) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62, kStride = uint64_t(1024 >> 4) << 32, kLeading = uint64_t(1) << 16;
  return kSwizzle128 | kStride | kLeading | ((tile & 0x3ffff) >> 4);
}

#define ATTENTION_C4(c) "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
#define ATTENTION_C32(c, n) \
  ATTENTION_C4(c[n]), ATTENTION_C4(c[n + 1]), ATTENTION_C4(c[n + 2]), ATTENTION_C4(c[n + 3]), ATTENTION_C4(c[n + 4]), ATTENTION_C4(c[n + 5]), ATTENTION_C4(c[n + 6]), ATTENTION_C4(c[n + 7])

// c[64, 8·N] (+)= a[64, 16] · b. TRANSPOSED 0: b's rows in memory are its columns (n); 1: they are k.
template <typename T, int TRANSPOSED>
struct Product;

#define ATTENTION_PRODUCT(type, name)                                                                                                     \
  template <int TRANSPOSED>                                                                                                               \
  struct Product<type, TRANSPOSED> {                                                                                                      \
    __device__ __forceinline__ static void add(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b, int accumulate) {                   \
      asm volatile(                                                                                                                       \
          "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                                                                    \
          "wgmma.mma_async.sync.aligned.m64n64k16.f32." name "." name                                                                     \
          " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, " \
          "%27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}"                                                         \
          : ATTENTION_C32(c, 0)                                                                                                           \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(TRANSPOSED));                                        \
    }                                                                                                                                     \
    __device__ __forceinline__ static void add(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b, int accumulate) {                  \
      asm volatile(                                                                                                                       \
          "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"                                                                                    \
          "wgmma.mma_async.sync.aligned.m64n128k16.f32." name "." name                                                                    \
          " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, " \
          "%27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, "  \
          "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}"                      \
          : ATTENTION_C32(c, 0), ATTENTION_C32(c, 8)                                                                                      \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(TRANSPOSED));                                        \
    }                                                                                                                                     \
  };
ATTENTION_PRODUCT(__half, "f16")
ATTENTION_PRODUCT(__nv_bfloat16, "bf16")

// c = a[64, 64] · bᵀ, columns of c = rows of the tile. Begins one group of products.
template <typename T, int N>
__device__ __forceinline__ void begin_rows(float (&c)[N][4], const uint32_t (&a)[4][4], uint32_t tile) {
  const uint64_t b = operand(tile);
#pragma unroll
  for (int k = 0; k < 4; ++k) Product<T, 0>::add(c, a[k], b + k * (32 >> 4), k > 0);
  products_commit();
}

// c += a[64, 16·K] · b, b = the tile. Begins one group of products.
template <typename T, int K>
__device__ __forceinline__ void begin_columns(float (&c)[8][4], const uint32_t (&a)[K][4], uint32_t tile) {
  const uint64_t b = operand(tile);
#pragma unroll
  for (int k = 0; k < K; ++k) Product<T, 1>::add(c, a[k], b + k * (16 * kRowBytes >> 4), 1);
  products_commit();
}

// An accumulator [64, 8·N] as the left operand of a product.
template <typename T, int N>
__device__ __forceinline__ void round_fragments(uint32_t (&a)[N / 2][4], const float (&c)[N][4]) {
#pragma unroll
  for (int k = 0; k < N / 2; ++k) {
    a[k][0] = pack<T>(c[2 * k][0], c[2 * k][1]);
    a[k][1] = pack<T>(c[2 * k][2], c[2 * k][3]);
    a[k][2] = pack<T>(c[2 * k + 1][0], c[2 * k + 1][1]);
    a[k][3] = pack<T>(c[2 * k + 1][2], c[2 * k + 1][3]);
  }
}

// An accumulator's rows token, token + 8, times factors, rounded. Four lanes exchange so that each stores 16 bytes.
template <typename T>
__device__ __forceinline__ void write_rows(const Rows<T>& to, const float (&c)[8][4], const float (&factor)[2], int token, int limit) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Lane t has columns 2t, 2t + 1 of four groups of eight and gets all eight columns of group t.
      uint32_t v[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) v[n] = pack<T>(c[4 * half + n][2 * h] * factor[h], c[4 * half + n][2 * h + 1] * factor[h]);
      // Transposes 4 × 4: swaps pairs at distance 2, then at distance 1.
#pragma unroll
      for (int d = 2; d; d >>= 1)
#pragma unroll
        for (int n = 0; n < 4; ++n)
          if (!(n & d)) {
            const uint32_t mine = t & d ? v[n] : v[n + d];
            const uint32_t other = __shfl_xor_sync(0xffffffffu, mine, d);
            if (t & d)
              v[n] = other;
            else
              v[n + d] = other;
          }
      if (token + 8 * h < limit) *reinterpret_cast<uint4*>(to.at(token + 8 * h) + (4 * half + t) * 8) = make_uint4(v[0], v[1], v[2], v[3]);
    }
}

// By one warpgroup: tokens [first, first + R) of a head into a tile, zeros past `limit`.
template <int R, typename T>
__device__ __forceinline__ void copy_tile(uint32_t tile, const Rows<T>& from, int first, int limit) {
  const int chunk = threadIdx.x % 8, row = threadIdx.x % 128 / 8;
  const uint32_t to = tile + chunk_offset(row, chunk);
  if (first + R <= min(from.image_tokens, limit)) {
    const T* source = from.image + (first + row) * from.image_stride + chunk * 8;
#pragma unroll
    for (int i = 0; i < R / 16; ++i) {
      copy16(to + i * 16 * kRowBytes, source, true);
      source += 16 * from.image_stride;
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < R / 16; ++i) {
      const int token = first + row + 16 * i;
      const bool valid = token < limit;
      copy16(to + i * 16 * kRowBytes, (valid ? from.at(token) : from.image) + chunk * 8, valid);
    }
  }
}

template <int N>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

template <int WARPGROUPS_, int STEP_, int STAGES_, int BLOCKS_>
struct HopperTile {
  static constexpr int WARPGROUPS = WARPGROUPS_;
  static constexpr int STEP = STEP_;      // rows of the other side per step
  static constexpr int STAGES = STAGES_;  // steps in shared memory
  static constexpr int BLOCKS = BLOCKS_;  // blocks per multiprocessor that registers must allow
  static constexpr int ROWS = 64 * WARPGROUPS;
  static constexpr int THREADS = 128 * (WARPGROUPS + 1);
  // Registers per thread move from the copying warpgroup to the others: no more than THREADS · BLOCKS threads would have.
  static constexpr int REGISTERS = WARPGROUPS == 3 ? 152 : BLOCKS == 2 ? 104 : 232;
  static constexpr int COPY_REGISTERS = WARPGROUPS == 3 ? 56 : BLOCKS == 2 ? 32 : 40;
  static_assert(BLOCKS * 128 * (WARPGROUPS * REGISTERS + COPY_REGISTERS) <= 65536);
  static constexpr int TILES = 2 * STEP * kRowBytes;                                   // two tiles per stage
  static constexpr int SHARED = 1024 + STAGES * (TILES + STEP * 8) + 16 * STAGES;      // alignment, stages, their rows' numbers, barriers
};

// Where a block's stages and barriers lie.
template <typename S>
struct Stages {
  uint32_t base;
  __device__ __forceinline__ Stages() {
    extern __shared__ uint8_t memory[];
    base = (shared_address(memory) + 1023) & ~1023u;
    if (threadIdx.x == 0) {
      for (int i = 0; i < S::STAGES; ++i) {
        barrier_init(full(i), 128);
        barrier_init(empty(i), 4 * S::WARPGROUPS);
      }
    }
    __syncthreads();
  }
  __device__ __forceinline__ uint32_t first_tile(int stage) const { return base + stage * S::TILES; }
  __device__ __forceinline__ uint32_t second_tile(int stage) const { return base + stage * S::TILES + S::STEP * kRowBytes; }
  __device__ __forceinline__ uint32_t numbers(int stage) const { return base + S::STAGES * S::TILES + stage * S::STEP * 8; }
  __device__ __forceinline__ uint32_t full(int stage) const { return base + S::STAGES * (S::TILES + S::STEP * 8) + 16 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(stage) + 8; }
};

// A stage and the parity of its use.
template <int STAGES>
struct Turn {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The copying warpgroup: tokens [0, limit) of two operands, and of `numbers` if given.
template <typename T, typename S>
__device__ __forceinline__ void copy_all(const Stages<S>& stages, const Rows<T>& a, const Rows<T>& b, const float2* numbers, int limit) {
  give_registers<S::COPY_REGISTERS>();
  Turn<S::STAGES> turn;
  for (int first = 0; first < limit; first += S::STEP) {
    barrier_wait(stages.empty(turn.stage), turn.parity ^ 1);
    copy_tile<S::STEP>(stages.first_tile(turn.stage), a, first, limit);
    copy_tile<S::STEP>(stages.second_tile(turn.stage), b, first, limit);
    if (numbers) {
      for (int r = threadIdx.x % 128; r < S::STEP; r += 128)
        copy8(stages.numbers(turn.stage) + 8 * r, numbers + min(first + r, limit - 1), first + r < limit);
    }
    barrier_arrive_after_copies(stages.full(turn.stage));
    turn.next();
  }
  wait_copies<0>();
}

template <typename S>
__device__ __forceinline__ void wait_full(const Stages<S>& stages, const Turn<S::STAGES>& turn) {
  barrier_wait(stages.full(turn.stage), turn.parity);
  proxy_fence();
}

template <typename S>
__device__ __forceinline__ void release(const Stages<S>& stages, const Turn<S::STAGES>& turn) {
  if (threadIdx.x % 32 == 0) barrier_arrive(stages.empty(turn.stage));
}

// Sets columns at or past `limit` of an accumulator whose first column is `first`.
template <int N>
__device__ __forceinline__ void mask_columns(float (&s)[N][4], int first, int limit) {
  if (first + 8 * N <= limit) return;
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (first + 8 * n + 2 * (int(threadIdx.x) % 4) + e % 2 >= limit) s[n][e] = -INFINITY;
}

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
  uint32_t q[4][4];
  read_fragments<T>(q, Rows<T>(p.q, p, batch, head), token, p.queries);

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
  wait_full<S>(stages, turn);
  products_begin();
  begin_rows<T>(s, q, stages.first_tile(turn.stage));
  products_wait<0>();
  pin(s);
  softmax(0);
  round_fragments<T>(probabilities, s);
  for (int first = S::STEP; first < keys; first += S::STEP) {
    // The scores of this step and the output of the one before, together; the softmax of this step meets the latter.
    const Turn<S::STAGES> before = turn;
    turn.next();
    wait_full<S>(stages, turn);
    pin(s);
    pin(out);
    products_begin();
    begin_rows<T>(s, q, stages.first_tile(turn.stage));
    begin_columns<T>(out, probabilities, stages.second_tile(before.stage));
    products_wait<1>();
    pin(s);
    softmax(first);
    products_wait<0>();
    pin(out);
    release<S>(stages, before);
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) out[n][e] *= shrink[e / 2];
    round_fragments<T>(probabilities, s);
  }
  pin(out);
  products_begin();
  begin_columns<T>(out, probabilities, stages.second_tile(turn.stage));
  products_wait<0>();
  pin(out);

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
  uint32_t q[4][4], d_out[4][4];
  float lse[2], delta[2] = {};
  read_fragments<T>(q, Rows<T>(p.q, p, batch, head), token, p.queries);
  read_fragments<T>(d_out, Rows<T>(p.d_out, p, batch, head), token, p.queries);
  {
    uint32_t out[4][4];
    read_fragments<T>(out, Rows<T>(p.out, p, batch, head), token, p.queries);
    const int64_t row = row_of(p, batch, head);
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int e = 0; e < 4; ++e) {  // elements 0 and 2 are of row g, 1 and 3 of row g + 8
        const float2 a = unpack<T>(out[k][e]), b = unpack<T>(d_out[k][e]);
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

  float d_q[8][4] = {}, s[8][4], d_p[8][4];
  uint32_t d_s[4][4];
  Turn<S::STAGES> turn, before;
  for (int first = 0; first < keys; first += S::STEP) {
    wait_full<S>(stages, turn);
    pin(s);
    pin(d_p);
    products_begin();
    begin_rows<T>(s, q, stages.first_tile(turn.stage));
    begin_rows<T>(d_p, d_out, stages.second_tile(turn.stage));
    if (first) {
      products_wait<2>();  // d_q of the step before
      release<S>(stages, before);
    }
    products_wait<1>();
    pin(s);
    mask_columns(s, first, keys);
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[n][e] = exp2_approx(fmaf(s[n][e], factor, -lse[e / 2]));
    products_wait<0>();
    pin(d_p);
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) d_p[n][e] = s[n][e] * (d_p[n][e] - delta[e / 2]);
    round_fragments<T>(d_s, d_p);
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
  uint32_t k[4][4], v[4][4];
  read_fragments<T>(k, Rows<T>(p.k, p, batch, head), token, keys);
  read_fragments<T>(v, Rows<T>(p.v, p, batch, head), token, keys);

  float d_k[8][4] = {}, d_v[8][4] = {}, s[8][4], d_p[8][4];
  uint32_t probabilities[4][4], d_s[4][4];
  Turn<S::STAGES> turn, before;
  for (int first = 0; first < p.queries; first += S::STEP) {
    wait_full<S>(stages, turn);
    pin(s);
    pin(d_p);
    products_begin();
    begin_rows<T>(s, k, stages.first_tile(turn.stage));
    begin_rows<T>(d_p, v, stages.second_tile(turn.stage));
    if (first) {
      products_wait<2>();  // d_v and d_k of the step before
      release<S>(stages, before);
    }
    products_wait<1>();
    pin(s);
    float delta[8][2];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      float lse[2];
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(lse[0]), "=f"(delta[n][0]), "=f"(lse[1]), "=f"(delta[n][1])
                   : "r"(stages.numbers(turn.stage) + 8 * (8 * n + 2 * (lane % 4)))
                   : "memory");
#pragma unroll
      for (int e = 0; e < 4; ++e) s[n][e] = exp2_approx(fmaf(s[n][e], factor, -lse[e % 2]));
    }
    round_fragments<T>(probabilities, s);
    pin(d_v);
    products_begin();
    begin_columns<T>(d_v, probabilities, stages.second_tile(turn.stage));
    products_wait<1>();
    pin(d_p);
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) d_p[n][e] = s[n][e] * (d_p[n][e] - delta[n][e % 2]);
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

}  // namespace attention

#define ATTENTION_HOPPER(part, type, name, suffix, ...)                                                                                   \
  extern "C" __global__ void __launch_bounds__(attention::HopperTile<__VA_ARGS__>::THREADS, attention::HopperTile<__VA_ARGS__>::BLOCKS)   \
      attention_##part##_##name##_d64_hopper##suffix(const __grid_constant__ AttentionParameters p) {                                    \
    attention::part##_hopper<type, attention::HopperTile<__VA_ARGS__>>(p);                                                               \
  }
#define ATTENTION_HOPPER_BOTH(part, suffix, ...)              \
  ATTENTION_HOPPER(part, __half, f16, suffix, __VA_ARGS__)    \
  ATTENTION_HOPPER(part, __nv_bfloat16, bf16, suffix, __VA_ARGS__)

#ifdef ATTENTION_VARIANTS
ATTENTION_HOPPER_BOTH(forward, _g2k64s4b2, 2, 64, 4, 2)
ATTENTION_HOPPER_BOTH(forward, _g3k64s4b1, 3, 64, 4, 1)
ATTENTION_HOPPER_BOTH(forward, _g2k128s3b1, 2, 128, 3, 1)
ATTENTION_HOPPER_BOTH(forward, _g3k128s3b1, 3, 128, 3, 1)
ATTENTION_HOPPER_BOTH(forward, _g2k64s4b1, 2, 64, 4, 1)
ATTENTION_HOPPER_BOTH(backward_q, _g2k64s4b1, 2, 64, 4, 1)
ATTENTION_HOPPER_BOTH(backward_q, _g3k64s4b1, 3, 64, 4, 1)
ATTENTION_HOPPER_BOTH(backward_kv, _g2k64s3b1, 2, 64, 3, 1)
ATTENTION_HOPPER_BOTH(backward_kv, _g2k64s4b1, 2, 64, 4, 1)
#else
ATTENTION_HOPPER_BOTH(forward, , 2, 64, 4, 2)
ATTENTION_HOPPER_BOTH(backward_q, , 2, 64, 4, 1)
ATTENTION_HOPPER_BOTH(backward_kv, , 2, 64, 4, 1)
#endif
