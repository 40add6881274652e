// Aggregation of references along flow on a CUDA device. Fast where the channels of every array are
// contiguous; right for any strides.
#pragma once

#include "common/device.h"
#include "deformable_aggregation/kernel.h"

namespace gi {

void deformable_forward(const DeformableForward&, Stream);

// Parts in which the backward pass gives the gradients of the maps and of the weights:
// map_parts [map_blocks,B,T,3,H,W], weight_parts [weight_parts,3,C].
struct DeformableParts {
  i64 map_blocks, weight_parts;
};
DeformableParts deformable_parts(const DeformableForward&);

// Bytes of uninitialised memory for the gradients of keys and values, aligned to 16 bytes.
i64 deformable_memory_bytes(const DeformableForward&);

void deformable_backward(const DeformableBackward&, void* memory, Stream);
void deformable_reduce(const DeformableReduce&, Stream);

}  // namespace gi
