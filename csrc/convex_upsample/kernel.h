// RAFT's eightfold upsampling: arguments and the table of CPU kernels.
#pragma once

#include "common/platform.h"
#include "common/select.h"

namespace gi {

struct ConvexUpsampleForward {
  const void* flow;  // [B,2,h,w], contiguous, accumulation type
  Array mask;        // [B,576,h,w]
  void* output;      // [B,2,8h,8w], contiguous, accumulation type
};

struct ConvexUpsampleBackward {
  Array grad;        // [B,2,8h,8w], accumulation type
  const void* flow;  // as above
  Array mask;        // [B,576,h,w]
  Array grad_mask;   // [B,576,h,w], or data null if not wanted
  // What each coarse pixel adds to the flow of its 3x3 neighbours, [B,h,w,2,9] in accumulation
  // type, or null.
  void* flow_parts;
};

// Gradient of the flow from the parts.
struct ConvexUpsampleReduce {
  Dtype dtype;  // accumulation type
  i64 height, width;
  const void* flow_parts;
  void* grad_flow;  // [B,2,h,w], contiguous
};

// Work is cut into independent rows of the coarse map, B*h of them; a kernel does [begin, end).
struct ConvexUpsampleKernels {
  void (*forward)(const ConvexUpsampleForward&, i64 begin, i64 end);
  void (*backward)(const ConvexUpsampleBackward&, i64 begin, i64 end);
  void (*reduce)(const ConvexUpsampleReduce&, i64 begin, i64 end);
};

}  // namespace gi

GI_DECLARE_KERNELS(ConvexUpsampleKernels, convex_upsample_kernels)
