// RAFT's eightfold upsampling on a CUDA device.
#pragma once

#include "common/device.h"
#include "convex_upsample/kernel.h"

namespace gi {

void convex_upsample_forward(const ConvexUpsampleForward&, Stream);
void convex_upsample_backward(const ConvexUpsampleBackward&, Stream);
void convex_upsample_reduce(const ConvexUpsampleReduce&, i64 batch, Stream);

}  // namespace gi
