// RAFT's correlation lookup, from stored volumes or from features: arguments and the table of CPU
// kernels.
#pragma once

#include "common/platform.h"
#include "common/select.h"

namespace gi {

// What both lookups share.
struct LookupWindow {
  const void* coords;  // [B,2,H1,W1], contiguous, accumulation type
  i64 batch, height, width;  // B, H1, W1
  int levels, radius;
};

struct LookupForward {
  LookupWindow window;
  const Array* volumes;  // per level, [B,H1*W1,H,W]
  void* output;          // [B,H1,W1,levels*(2r+1)^2], contiguous, dtype of the volumes
};

struct LookupBackward {
  LookupWindow window;
  Array grad;  // [B,levels*(2r+1)^2,H1,W1]
  const Array* volumes;
  void* const* grad_volumes;  // per level, [B,H1*W1,H,W], contiguous; or null if not wanted
  void* grad_coords;          // [B,2,H1,W1], contiguous, accumulation type; or null
};

// A level of the second features with the channels of a pixel contiguous, padded to whole vectors, in
// accumulation type. Strides in elements.
struct FeatureRows {
  const void* data;
  i64 batch_stride, row_stride, pixel_stride;
  i64 height, width;
};

// Copies a level [B,C,H,W] into such rows, [B,H,W,padded C]; items are B*H.
struct FeatureStaging {
  Array from;
  void* to;
};

struct OnDemandForward {
  LookupWindow window;
  Array features1;             // [B,C,H1,W1]
  const FeatureRows* features2;  // per level
  void* output;                // as above
};

struct OnDemandBackward {
  LookupWindow window;
  Array grad;  // as above
  Array features1;
  const FeatureRows* features2;  // needed for the gradients of features1 and coords
  Array grad_features1;          // [B,C,H1,W1], or data null if not wanted
  void* grad_coords;             // as above
  const Array* grad_features2;   // per level, [B,C,H,W], or null if not wanted
};

// Work is cut into independent items; a kernel does items [begin, end).
struct CorrelationLookupKernels {
  i64 (*runs)(const LookupWindow&);  // items of the kernels that go over pixels
  void (*forward)(const LookupForward&, i64 begin, i64 end);
  void (*backward)(const LookupBackward&, i64 begin, i64 end);
  bool (*usable_rows)(const Array&);  // whether a level [B,C,H,W] already is such rows
  i64 (*padded_channels)(Dtype, i64 channels);
  void (*stage)(const FeatureStaging&, i64 begin, i64 end);
  void (*on_demand)(const OnDemandForward&, i64 begin, i64 end);
  void (*on_demand_backward)(const OnDemandBackward&, i64 begin, i64 end);
  i64 (*scatter_items)(const OnDemandBackward&);
  void (*scatter)(const OnDemandBackward&, i64 begin, i64 end);  // grad_features2
};

}  // namespace gi

GI_DECLARE_KERNELS(CorrelationLookupKernels, correlation_lookup_kernels)
