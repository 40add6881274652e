// Forward-backward consistency of flow: arguments and the table of CPU kernels.
#pragma once

#include "common/platform.h"
#include "common/select.h"

namespace gi {

struct FlowConsistency {
  Array flow, flow_backward;  // [B,2,H,W]
  Array output;               // [B,1,H,W]
};

struct FlowConsistencyKernels {
  void (*forward)(const FlowConsistency&, i64 begin, i64 end);  // items are B * H rows
};

}  // namespace gi

GI_DECLARE_KERNELS(FlowConsistencyKernels, flow_consistency_kernels)
