// Pooling features per window and query: arguments and the table of CPU kernels.
#pragma once

#include "common/platform.h"
#include "common/select.h"

namespace gi {

struct WindowQueryForward {
  Array features;     // [B,C,H,W]
  Array queries;      // [h,C]
  i64 rows, columns;  // windows down and across
  Array output;       // [B,rows*columns,h,C]
};

struct WindowQueryBackward {
  Array grad;           // [B,rows*columns,h,C]
  Array features;       // [B,C,H,W]
  Array queries;        // [h,C]
  i64 rows, columns;    // windows down and across
  Array grad_features;  // [B,C,H,W], or data null if not wanted
  Array query_sums;     // [items,h,C] in accumulation type: the parts of the queries' gradient; or data null
};

// Work is cut into `items` independent pieces; a kernel does pieces [begin, end).
struct WindowQueryKernels {
  i64 (*forward_items)(const WindowQueryForward&);
  void (*forward)(const WindowQueryForward&, i64 begin, i64 end);
  i64 (*backward_items)(const WindowQueryBackward&);
  void (*backward)(const WindowQueryBackward&, i64 begin, i64 end);
};

}  // namespace gi

GI_DECLARE_KERNELS(WindowQueryKernels, window_query_kernels)
