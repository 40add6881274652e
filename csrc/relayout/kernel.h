// Copying a map to another memory layout: arguments and the table of CPU kernels.
#pragma once

#include "common/platform.h"
#include "common/select.h"

namespace gi {

struct Relayout {
  Array source, target;  // [B,C,H,W], of one dtype
};

// Work is cut into `items` independent pieces; a kernel does pieces [begin, end).
struct RelayoutKernels {
  i64 (*items)(const Relayout&);
  void (*copy)(const Relayout&, i64 begin, i64 end);
};

}  // namespace gi

GI_DECLARE_KERNELS(RelayoutKernels, relayout_kernels)
