// Pooling features per window and head: arguments and the table of CPU kernels.
#pragma once

#include "common/platform.h"
#include "common/select.h"

namespace gi {

struct WindowPoolForward {
  Array logits;       // [B,h,H,W]
  Array features;     // [B,C,H,W]
  i64 rows, columns;  // windows down and across
  Array output;       // [B,rows*columns,h,C]
};

struct WindowPoolBackward {
  Array grad;           // [B,rows*columns,h,C]
  Array logits;         // [B,h,H,W]
  Array features;       // [B,C,H,W]
  i64 rows, columns;    // windows down and across
  Array grad_logits;    // [B,h,H,W], or data null if not wanted
  Array grad_features;  // [B,C,H,W], or data null if not wanted
};

// Work is cut into `items` independent pieces; a kernel does pieces [begin, end).
struct WindowPoolKernels {
  i64 (*forward_items)(const WindowPoolForward&);
  void (*forward)(const WindowPoolForward&, i64 begin, i64 end);
  i64 (*backward_items)(const WindowPoolBackward&);
  void (*backward)(const WindowPoolBackward&, i64 begin, i64 end);
};

}  // namespace gi

GI_DECLARE_KERNELS(WindowPoolKernels, window_pool_kernels)
