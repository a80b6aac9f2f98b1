// What the attention kernels for Hopper (sm_90a) have in common: warpgroup products (wgmma) fed by a copying warpgroup.
//
// A warpgroup has 64 rows (queries, or keys in backward_kv), whose operands stay in registers, and walks over the other
// side's tiles in shared memory. One more warpgroup copies these tiles, several steps ahead; the two kinds wait for each
// other by barriers `full` and `empty` of each stage. The warpgroups of a block run freely, so that one's exponentials meet
// another's products.

#pragma once

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

// Waits for the other threads of this warpgroup.
__device__ __forceinline__ void warpgroup_barrier() { asm volatile("bar.sync %0, 128;" ::"r"(1 + int(threadIdx.x) / 128) : "memory"); }

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
#define ATTENTION_C32(c) \
  ATTENTION_C4(c[0]), ATTENTION_C4(c[1]), ATTENTION_C4(c[2]), ATTENTION_C4(c[3]), ATTENTION_C4(c[4]), ATTENTION_C4(c[5]), ATTENTION_C4(c[6]), ATTENTION_C4(c[7])

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
          : ATTENTION_C32(c)                                                                                                              \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(TRANSPOSED));                                        \
    }                                                                                                                                     \
    __device__ __forceinline__ static void add(float (&c)[8][4], uint64_t a, uint64_t b, int accumulate) {                                \
      asm volatile(                                                                                                                       \
          "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                                                                    \
          "wgmma.mma_async.sync.aligned.m64n64k16.f32." name "." name                                                                     \
          " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, " \
          "%27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, %35;\n}"                                                                       \
          : ATTENTION_C32(c)                                                                                                              \
          : "l"(a), "l"(b), "r"(accumulate), "n"(TRANSPOSED));                                                                            \
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

// The same with 64 rows of another tile for a.
template <typename T>
__device__ __forceinline__ void begin_rows(float (&c)[8][4], uint32_t a_tile, uint32_t tile) {
  const uint64_t a = operand(a_tile), b = operand(tile);
#pragma unroll
  for (int k = 0; k < 4; ++k) Product<T, 0>::add(c, a + k * (32 >> 4), b + k * (32 >> 4), k > 0);
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
    const T* source = from.image + int64_t(first + row) * from.image_stride + chunk * 8;
#pragma unroll
    for (int i = 0; i < R / 16; ++i) {
      copy16(to + i * 16 * kRowBytes, source, true);
      source += int64_t(16) * from.image_stride;
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

template <int WARPGROUPS_, int STEP_, int STAGES_, int BLOCKS_, bool OWN_SHARED_>
struct HopperTile {
  static constexpr int WARPGROUPS = WARPGROUPS_;
  static constexpr int STEP = STEP_;      // rows of the other side per step
  static constexpr int STAGES = STAGES_;  // steps in shared memory
  static constexpr int BLOCKS = BLOCKS_;  // blocks per multiprocessor that registers must allow
  static constexpr bool OWN_SHARED = OWN_SHARED_;  // a block's own rows stay in shared memory, else in registers
  static constexpr int ROWS = 64 * WARPGROUPS;
  static constexpr int THREADS = 128 * (WARPGROUPS + 1);
  // Registers per thread move from the copying warpgroup to the others: no more than THREADS · BLOCKS threads would have.
  static constexpr int SHARE = 65536 / 128 / BLOCKS / (WARPGROUPS + 1) / 8 * 8 * (WARPGROUPS + 1);
  static constexpr int COPY_REGISTERS = (WARPGROUPS == 2 && BLOCKS == 2) || WARPGROUPS == 4 ? 48 : WARPGROUPS == 3 ? 56 : WARPGROUPS == 1 ? 32 : 40;
  static constexpr int REGISTERS = (SHARE - COPY_REGISTERS) / WARPGROUPS / 8 * 8;
  static_assert(BLOCKS * 128 * (WARPGROUPS * REGISTERS + COPY_REGISTERS) <= 65536);
  static constexpr int TILES = 2 * STEP * kRowBytes;  // two tiles per stage
  // Stages and their rows' numbers, barriers; the block's own rows of two operands; room to align all.
  static constexpr int OWN = (STAGES * (TILES + STEP * 8 + 16) + 1023) / 1024 * 1024;
  static constexpr int SHARED = OWN + (OWN_SHARED ? 2 * ROWS * kRowBytes : 0) + 1024;
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

// The 64 rows of a warpgroup, left operand of products with the tiles of the stages. `index`: which of the block's operands.
template <typename T, typename S>
struct OwnRows {
  uint32_t fragments[4][4];
  uint32_t tile;

  __device__ __forceinline__ OwnRows(const Stages<S>& stages, int index, const Rows<T>& from, int limit) {
    const int first = blockIdx.x * S::ROWS + threadIdx.x / 128 * 64;
    if constexpr (S::OWN_SHARED) {
      tile = stages.base + S::OWN + (index * S::WARPGROUPS + threadIdx.x / 128) * 64 * kRowBytes;
      copy_tile<64>(tile, from, first, limit);
      commit_copies();
      wait_copies<0>();
      proxy_fence();
      warpgroup_barrier();
    } else {
      read_fragments<T>(fragments, from, first + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4, limit);
    }
  }

  template <int N>
  __device__ __forceinline__ void begin(float (&c)[N][4], uint32_t other) const {
    if constexpr (S::OWN_SHARED)
      begin_rows<T>(c, tile, other);
    else
      begin_rows<T>(c, fragments, other);
  }
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

}  // namespace attention

#define ATTENTION_HOPPER(part, type, name, tile)                                                                  \
  extern "C" __global__ void __launch_bounds__(attention::tile::THREADS, attention::tile::BLOCKS)                 \
      attention_##part##_##name(const __grid_constant__ AttentionParameters p) {                                 \
    attention::part##_hopper<type, attention::tile>(p);                                                          \
  }
