// Gradients of the LoRA factors of stacked layers.

#include <stdint.h>

// One layer: where its gradients are added, which rows and columns of the stack's are its own.
struct Layer {
  float* da;  // [rank, inputs]
  float* db;  // [outputs, rank]
  int32_t first_output, outputs, first_rank, rank;
  float scale;
  int32_t padding;
};

struct Layers {
  Layer layer[4];
};

// da [ranks, inputs] and db [Σ outputs, ranks] of the stack, added to the layers'. Block 256, grid (over the larger of the
// two gradients, 2, layers).
extern "C" __global__ void __launch_bounds__(256)
    lora_scatter(const __grid_constant__ Layers layers, const float* da, const float* db, int32_t inputs, int32_t ranks) {
  const Layer& l = layers.layer[blockIdx.z];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (blockIdx.y == 0) {
    if (i < l.rank * inputs) l.da[i] += da[l.first_rank * inputs + i];
  } else if (i < l.outputs * l.rank) {
    const int row = i / l.rank, column = i - row * l.rank;
    l.db[i] += l.scale * db[int64_t(l.first_output + row) * ranks + l.first_rank + column];
  }
}
