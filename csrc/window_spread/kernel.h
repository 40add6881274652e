// Spreading one row of channels per window and head over the window: arguments and the table of CPU kernels.
#pragma once

#include "common/platform.h"
#include "common/select.h"

namespace gi {

struct WindowSpreadForward {
  Array logits;       // [B,h,H,W]
  Array latents;      // [B,rows*columns,h,C]
  i64 rows, columns;  // windows down and across
  Array output;       // [B,C,H,W]
};

struct WindowSpreadBackward {
  Array grad;          // [B,C,H,W]
  Array logits;        // [B,h,H,W]
  Array latents;       // [B,rows*columns,h,C]
  i64 rows, columns;   // windows down and across
  Array grad_logits;   // [B,h,H,W], or data null if not wanted
  Array grad_latents;  // [B,rows*columns,h,C], or data null if not wanted
};

// Work is cut into `items` independent pieces; a kernel does pieces [begin, end).
struct WindowSpreadKernels {
  i64 (*forward_items)(const WindowSpreadForward&);
  void (*forward)(const WindowSpreadForward&, i64 begin, i64 end);
  i64 (*backward_items)(const WindowSpreadBackward&);
  void (*backward)(const WindowSpreadBackward&, i64 begin, i64 end);
};

}  // namespace gi

GI_DECLARE_KERNELS(WindowSpreadKernels, window_spread_kernels)
