// Batch norm by the statistics of its input, and a ReLU after it: arguments and the table of CPU kernels.
#pragma once

#include "common/platform.h"
#include "common/select.h"

namespace gi {

// Vectors [C] are contiguous, in the accumulation type.
struct BatchNorm {
  Array input;            // [B,C,H,W]
  Array grad;             // of the output, like input; backward only
  Array result;           // output, or gradient of the input
  bool relu;
  const void* weight;
  const void* bias;
  const void* mean;       // of input
  const void* inverse;    // 1 / its standard deviation
  void* parts;            // [items,2,C]: see the kernels
  void* totals;           // [2,C]: see merge_*
};

// Work is cut into `items` independent pieces of pixels; a kernel does pieces [begin, end). The merges
// put together what pieces found, for channels [begin, end).
struct BatchNormKernels {
  i64 (*items)(const BatchNorm&);
  // parts: mean and sum of squared deviations from it, of the piece's pixels. totals: mean and variance.
  void (*statistics)(const BatchNorm&, i64 begin, i64 end);
  void (*merge_statistics)(const BatchNorm&, i64 begin, i64 end);
  void (*forward)(const BatchNorm&, i64 begin, i64 end);
  // parts: sums of the gradient, and of it times the deviation from the mean. totals: their totals.
  void (*gradient_sums)(const BatchNorm&, i64 begin, i64 end);
  void (*merge_sums)(const BatchNorm&, i64 begin, i64 end);
  void (*backward)(const BatchNorm&, i64 begin, i64 end);
};

}  // namespace gi

GI_DECLARE_KERNELS(BatchNormKernels, batch_norm_kernels)
