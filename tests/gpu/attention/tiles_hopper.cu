// Other tiles of the Hopper kernels, to compare. g: warpgroups, k: rows per step, s: stages, b: blocks per multiprocessor,
// a: scores ahead, m: own rows in shared memory.
#include "../../../src/kernels/cuda/attention_backward_hopper.cu"
#include "../../../src/kernels/cuda/attention_forward_hopper.cu"

#define TILE(part, name, ...)                             \
  namespace attention {                                   \
  using Hopper_##part##_##name = HopperTile<__VA_ARGS__>; \
  }                                                       \
  ATTENTION_HOPPER(part, __nv_bfloat16, bf16_d64_##name, Hopper_##part##_##name)

TILE(forward, g4k64s4b1m, 4, 64, 4, 1, false, true)
TILE(forward, g2k64s3b2m, 2, 64, 3, 2, false, true)
TILE(forward, g3k64s4b1am, 3, 64, 4, 1, true, true)
TILE(forward, g3k64s4b1, 3, 64, 4, 1, false, false)
TILE(backward_q, g2k64s4b1a, 2, 64, 4, 1, true, false)
TILE(backward_q, g2k64s4b1am, 2, 64, 4, 1, true, true)
TILE(backward_q, g3k64s4b1m, 3, 64, 4, 1, false, true)
TILE(backward_kv, g2k64s4b1am, 2, 64, 4, 1, true, true)
TILE(forward, g1k64s4b2, 1, 64, 4, 2, true, false)
TILE(forward, g2k64s4b1, 2, 64, 4, 1, true, false)
TILE(backward_q, g1k64s4b2, 1, 64, 4, 2, false, false)
TILE(backward_q, g1k64s4b2a, 1, 64, 4, 2, true, false)
TILE(backward_kv, g1k64s4b2, 1, 64, 4, 2, false, false)
TILE(backward_kv, g1k64s4b2am, 1, 64, 4, 2, true, true)
