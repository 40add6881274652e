// Aggregation of references along flow: arguments and the table of CPU kernels.
#pragma once

#include "common/platform.h"
#include "common/select.h"

namespace gi {

struct DeformableForward {
  Array features, output;  // [B,C,H,W]
  Array keys, values;      // [B,T,C,H,W]
  // Contiguous, in accumulation type: [B,T,2,h,w], [B,T,1,h,w], [C] each.
  const void *flows, *errors, *key_error_weight, *value_error_weight, *value_bias;
  int flow_h, flow_w, error_h, error_w;
};

struct DeformableBackward {
  DeformableForward forward;  // without output
  Array grad;                 // [B,C,H,W]
  Array grad_keys, grad_values;  // [B,T,C,H,W], or data null if not wanted
  void* map_parts;            // [blocks,B,T,3,H,W]: along x, along y, error; or null if not wanted
  void* weight_parts;         // [B,3,C]: key_error_weight, value_error_weight, value_bias
};

// Gradients of flows and errors from their partial sums.
struct DeformableReduce {
  Dtype dtype;  // accumulation type
  i64 frames;   // B * T
  int height, width, flow_h, flow_w, error_h, error_w;
  i64 blocks;
  const void* map_parts;
  void *grad_flows, *grad_errors;
};

struct DeformableKernels {
  i64 (*forward_items)(const DeformableForward&);
  void (*forward)(const DeformableForward&, i64 begin, i64 end);
  i64 (*backward_blocks)(i64 channels);  // items are B * blocks
  void (*backward)(const DeformableBackward&, i64 begin, i64 end);
  void (*reduce)(const DeformableReduce&, i64 begin, i64 end);  // items are frames
};

}  // namespace gi

GI_DECLARE_KERNELS(DeformableKernels, deformable_kernels)
