// Spreading one row of channels per window and head over the window on a CUDA device.
#pragma once

#include "common/device.h"
#include "window_spread/kernel.h"

namespace gi {

// `weights` and `dots` hold B*H*W*h numbers of accumulation type each; `dots` is needed for grad_logits.
void window_spread_forward(const WindowSpreadForward&, void* weights, Stream);
void window_spread_backward(const WindowSpreadBackward&, void* weights, void* dots, Stream);

}  // namespace gi
