// Pooling features per window and head on a CUDA device.
#pragma once

#include "common/device.h"
#include "window_pool/kernel.h"

namespace gi {

// `weights` and `dots` hold B*H*W*h numbers of accumulation type each; `dots` is needed for grad_logits.
void window_pool_forward(const WindowPoolForward&, void* weights, Stream);
void window_pool_backward(const WindowPoolBackward&, void* weights, void* dots, Stream);

}  // namespace gi
