// Attention over segments of keys and values: arguments and the table of CPU kernels.
#pragma once

#include "common/platform.h"
#include "common/select.h"

namespace gi {

struct AttentionForward {
  Array query;  // [B,h,N,d]
  i64 segments;
  const Array *keys, *values;  // [B,h,M,d] each
  i64 item_queries;            // queries of one piece of work; does not change the result
  Array output;                // [B,h,N,d]
  // What rounding took from the output, like it; for storage types that hold less than the sums do.
  // The gradients subtract near-equal numbers that depend on the output, so they need it.
  Array remainder;
  void* log_sum;               // log-sum-exp of the scores, [B,h,N], contiguous, accumulation type
};

struct AttentionBackward {
  AttentionForward forward;
  Array grad;                            // [B,h,N,d]
  Array grad_query;                      // [B,h,N,d]
  const Array *grad_keys, *grad_values;  // [B,h,M,d] each
};

struct AttentionKernels {
  i64 (*forward_items)(const AttentionForward&);
  void (*forward)(const AttentionForward&, i64 begin, i64 end);
  void (*backward)(const AttentionBackward&, i64 begin, i64 end);  // items are B * h
};

}  // namespace gi

GI_DECLARE_PRODUCT_KERNELS(AttentionKernels, attention_kernels)
