// Gradients of LoRA's factors, and their values laid out for the products.

#include "values.cuh"

// One product tᵀ x of a thin t: `ranks` (at most 8) columns of t [rows, t_stride] and n columns of x [rows, x_stride].
struct ThinPart {
  const void* x;
  const void* t;
  float* to;      // where the sum is added: to[r * rank_stride + c * column_stride]
  int32_t n, x_stride, t_stride, ranks;
  int32_t rank_stride, column_stride;
  float scale;
  int32_t first;  // columns of the parts before
};

constexpr int kParts = 32;
constexpr int kThinRanks = 8;
constexpr int kThinThreads = 64;
constexpr int kThinRows = 128;  // rows per split

struct ThinParts {
  ThinPart part[kParts];
};

// partial: from 8 · splits · first on [splits, 8, n], a split's sums. Grid (⌈n / (64 · V)⌉ of the widest part, splits, parts),
// block 256: 64 threads side by side, each fourth row to each of four groups of them, which are added at the end.
template <typename T, int V>
__device__ __forceinline__ void thin_sums(const ThinParts& parts, float* partial, int rows, int splits) {
  constexpr int kGroups = 4;
  const ThinPart& p = parts.part[blockIdx.z];
  const int lane = threadIdx.x % kThinThreads, group = threadIdx.x / kThinThreads;
  const int first = blockIdx.x * kThinThreads * V;
  if (first >= p.n) return;
  const int column = first + lane * V;
  const int begin = blockIdx.y * kThinRows, count = min(kThinRows, rows - begin);
  __shared__ __align__(16) float t[kThinRows][kThinRanks];
  __shared__ float groups[kGroups][kThinThreads * V];
  for (int i = threadIdx.x; i < kThinRows * kThinRanks; i += kThinThreads * kGroups) {
    const int row = i / kThinRanks, rank = i % kThinRanks;
    t[row][rank] = row < count && rank < p.ranks ? widen(static_cast<const T*>(p.t)[int64_t(begin + row) * p.t_stride + rank]) : 0.0f;
  }
  __syncthreads();
  float sum[kThinRanks][V] = {};
  if (column < p.n) {
    const T* x = static_cast<const T*>(p.x) + int64_t(begin) * p.x_stride + column;
#pragma unroll 8
    for (int row = group; row < count; row += kGroups) {
      float a[V];
      load<T, V>(a, x + int64_t(row) * p.x_stride);
#pragma unroll
      for (int r = 0; r < kThinRanks; ++r) {
        const float b = t[row][r];
#pragma unroll
        for (int j = 0; j < V; ++j) sum[r][j] = fmaf(a[j], b, sum[r][j]);
      }
    }
  }
  float* to = partial + (int64_t(p.first) * splits + int64_t(blockIdx.y) * p.n) * kThinRanks + first;
  const int width = min(kThinThreads * V, p.n - first);
#pragma unroll
  for (int r = 0; r < kThinRanks; ++r) {
#pragma unroll
    for (int j = 0; j < V; ++j) groups[group][lane * V + j] = sum[r][j];
    __syncthreads();
    for (int i = threadIdx.x; i < width; i += kThinThreads * kGroups) to[int64_t(r) * p.n + i] = (groups[0][i] + groups[1][i]) + (groups[2][i] + groups[3][i]);
    __syncthreads();
  }
}
#define THIN_SUMS(T) (const __grid_constant__ ThinParts parts, float* partial, int rows, int splits)
KERNELS(thin_sums, THIN_SUMS, (parts, partial, rows, splits))

// Adds the splits' sums, in order, to the gradients. Grid (⌈8 n / 256⌉ of the widest part, parts), block 256.
extern "C" __global__ void __launch_bounds__(256) thin_add(const __grid_constant__ ThinParts parts, const float* partial, int splits) {
  const ThinPart& p = parts.part[blockIdx.y];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const int rank = i / p.n, column = i - rank * p.n;
  if (rank >= p.ranks) return;
  const float* from = partial + int64_t(p.first) * splits * kThinRanks + i;
  float sum = 0.0f;
#pragma unroll 8
  for (int split = 0; split < splits; ++split) sum += from[int64_t(split) * p.n * kThinRanks];
  p.to[int64_t(rank) * p.rank_stride + int64_t(column) * p.column_stride] += p.scale * sum;
}

// A matrix of parameters and where the products read it: `to` [rows, columns] at `stride`, factor · from.
struct Spread {
  void* to;
  int64_t from;  // of all parameters
  int32_t rows, columns, stride;
  float factor;
};

// Grid (⌈the largest rows · columns / 1024⌉, matrices), block 256.
template <typename T, int V>
__device__ __forceinline__ void lora_spread(const Spread* spreads, const float* parameters) {
  const Spread s = spreads[blockIdx.y];
  const int count = s.rows * s.columns;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int i = blockIdx.x * 1024 + k * 256 + threadIdx.x;
    if (i >= count) return;
    const int row = i / s.columns;
    static_cast<T*>(s.to)[int64_t(row) * s.stride + (i - row * s.columns)] = narrow<T>(s.factor * parameters[s.from + i]);
  }
}
#define LORA_SPREAD(T) (const Spread* spreads, const float* parameters)
KERNELS(lora_spread, LORA_SPREAD, (spreads, parameters))
