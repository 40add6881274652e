// Warping along flow: arguments and the table of CPU kernels. The maths is common/bilinear.h.
#pragma once

#include "common/platform.h"
#include "common/select.h"

namespace gi {

struct FlowWarpForward {
  Array input;       // [B,C,H,W]
  const void* flow;  // [B,2,h,w], contiguous, accumulation type
  int flow_h, flow_w;
  Array output;      // [B,C,H,W]
};

struct FlowWarpBackward {
  Array grad;        // [B,C,H,W]
  Array input;       // [B,C,H,W]
  const void* flow;  // as above
  int flow_h, flow_w;
  Array grad_input;  // [B,C,H,W], or data null if not wanted
  // Partial gradients of the resized flow, [blocks,B,2,H,W] in accumulation type, or null.
  void* flow_parts;
};

// Gradient of the flow from its partial sums.
struct FlowWarpReduce {
  Dtype dtype;  // accumulation type
  i64 batch;
  int height, width, flow_h, flow_w;
  i64 blocks;
  const void* flow_parts;
  void* grad_flow;  // [B,2,h,w], contiguous
};

// Work is cut into `items` independent pieces; a kernel does pieces [begin, end).
struct FlowWarpKernels {
  i64 (*forward_items)(const FlowWarpForward&);
  void (*forward)(const FlowWarpForward&, i64 begin, i64 end);
  i64 (*backward_blocks)(const FlowWarpBackward&);  // channel blocks; items are B * blocks
  void (*backward)(const FlowWarpBackward&, i64 begin, i64 end);
  void (*reduce)(const FlowWarpReduce&, i64 begin, i64 end);  // items are B
};

}  // namespace gi

GI_DECLARE_KERNELS(FlowWarpKernels, flow_warp_kernels)
