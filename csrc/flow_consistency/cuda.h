// Forward-backward consistency of flow on a CUDA device.
#pragma once

#include "common/device.h"
#include "flow_consistency/kernel.h"

namespace gi {

void flow_consistency_forward(const FlowConsistency&, Stream);

}  // namespace gi
