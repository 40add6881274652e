// Warping along flow on a CUDA device. Gradients are gathered, see common/contributors.h.
#pragma once

#include "common/device.h"
#include "flow_warp/kernel.h"

namespace gi {

void flow_warp_forward(const FlowWarpForward&, Stream);

// Memory for the gradient of the input, uninitialised; aligned to 16 bytes.
i64 flow_warp_list_bytes(const FlowWarpBackward&);

// Writes grad_input, if wanted, with `lists` for memory; and flow_parts, if wanted, [1,B,2,H,W].
void flow_warp_backward(const FlowWarpBackward&, void* lists, Stream);
void flow_warp_reduce(const FlowWarpReduce&, Stream);

}  // namespace gi
