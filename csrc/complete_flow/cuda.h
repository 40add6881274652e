// Completion of flow inside a mask on a CUDA device.
#pragma once

#include "common/device.h"
#include "complete_flow/kernel.h"

namespace gi {

// `rows` holds 2 * B * H numbers.
void complete_flow_forward(const CompleteFlow&, i64* rows, Stream);

}  // namespace gi
