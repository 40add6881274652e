// RAFT's correlation lookup on a CUDA device. Here features have the channels of a pixel contiguous.
#pragma once

#include "common/device.h"
#include "correlation_lookup/kernel.h"

namespace gi {

constexpr int kMostLevels = 16;

void correlation_lookup_forward(const LookupForward&, Stream);
void correlation_lookup_backward(const LookupBackward&, Stream);

// Lookup on demand. `patches` holds correlation_patch_numbers() of accumulation type.
struct DeviceOnDemand {
  LookupWindow window;
  Array features1;         // [B,C,H1,W1], rows without gaps between them
  const Array* features2;  // per level, [B,C,H,W]
};
i64 correlation_patch_numbers(const LookupWindow&);
void correlation_on_demand_forward(const DeviceOnDemand&, void* output, void* patches, Stream);

struct DeviceOnDemandBackward {
  DeviceOnDemand forward;
  Array grad;                   // [B,levels*(2r+1)^2,H1,W1]
  Array grad_features1;         // [B,C,H1,W1], or data null if not wanted
  const Array* grad_features2;  // per level, [B,C,H,W], or null if not wanted
  void* grad_coords;            // [B,2,H1,W1], contiguous, accumulation type; or null
  // Sums over all pixels of zero times the features, [B,C] in accumulation type: zero, or NaN where the
  // features are not finite, which the definition hands to every gradient. Of features2 (all levels) for
  // grad_features1, of features1 for grad_features2.
  const void *undefined1, *undefined2;
  void* patches;       // for grad_coords
  void* grad_patches;  // for grad_features1 and grad_features2, of the same size
  void* lists;         // for grad_features2, of correlation_list_bytes()
};
i64 correlation_list_bytes(const DeviceOnDemand&);
void correlation_on_demand_backward(const DeviceOnDemandBackward&, Stream);

}  // namespace gi
