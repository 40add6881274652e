// Merging attention over segments by their log-sum-exp.
#pragma once

#include "common/platform.h"
#include "common/select.h"

namespace gi {

struct MergeAttention {
  i64 batch, heads, queries, dim;
  i64 segments;
  // Per segment: output [B,h,N,d] and log-sum-exp [B,h,N] (float32, or float64 for float64 outputs).
  const Array* outputs;
  const Array* log_sums;
  Array output;   // [B,h,N,d], last dimension contiguous
  Array log_sum;  // [B,h,N]
};

struct MergeAttentionKernels {
  void (*merge)(const MergeAttention&, i64 begin, i64 end);  // items are B * N
};

}  // namespace gi

GI_DECLARE_KERNELS(MergeAttentionKernels, merge_attention_kernels)
