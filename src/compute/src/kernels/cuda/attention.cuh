// Joint attention of two streams: what the kernels have in common.
//
// A sample's tokens are [image, context]. The two streams of an operand lie in separate buffers, rows of all heads:
// token t of sample b and head h begins at
//   image   + (b * image_tokens   + t)                * image_stride   + h * head_dim   for t < image_tokens,
//   context + (b * context_tokens + t - image_tokens) * context_stride + h * head_dim   otherwise.
// out = softmax(q kᵀ / √head_dim) v over all tokens of a sample, no mask.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

// One operand of both streams; strides in elements, below 2³¹. `context` is not read where the context takes no part.
struct AttentionOperand {
  void* image;
  void* context;
  int64_t image_stride;
  int64_t context_stride;
};

// Parameters of every attention kernel, passed by value; the Rust side mirrors this layout.
struct AttentionParameters {
  AttentionOperand q, k, v, out;
  AttentionOperand d_out, d_q, d_k, d_v;  // backward only
  float* lse;       // [batch, heads, image + context]: log Σ exp of each query; forward writes, backward reads
  float2* rows;     // [batch, heads, image + context]: scratch, backward_q writes {lse · log₂e, Σ d_out · out}, backward_kv reads
  int32_t heads;    // gridDim.y
  int32_t head_dim;
  int32_t image;    // tokens
  int32_t context;  // tokens, 0: none
  int32_t queries;  // image + context, or image where the context is only attended to
  float scale;      // 1 / √head_dim
};

namespace attention {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// 2^x; 0 for -inf.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// One head's rows of one operand.
template <typename T>
struct Rows {
  T* image;
  T* context;
  int image_stride;
  int context_stride;
  int image_tokens;

  __device__ __forceinline__ Rows(const AttentionOperand& o, const AttentionParameters& p, int batch, int head)
      : image(static_cast<T*>(o.image) + int64_t(batch) * p.image * o.image_stride + int64_t(head) * p.head_dim),
        context(static_cast<T*>(o.context) + int64_t(batch) * p.context * o.context_stride + int64_t(head) * p.head_dim),
        image_stride(int(o.image_stride)),
        context_stride(int(o.context_stride)),
        image_tokens(p.image) {}

  // The row of a token that exists.
  __device__ __forceinline__ T* at(int token) const {
    return token < image_tokens ? image + int64_t(token) * image_stride : context + int64_t(token - image_tokens) * context_stride;
  }
};

// A row of [batch, heads, image + context].
__device__ __forceinline__ int64_t row_of(const AttentionParameters& p, int batch, int head) {
  return (int64_t(batch) * p.heads + head) * (p.image + p.context);
}

}  // namespace attention
