#include "common/binding.h"
#include "relayout/kernel.h"

namespace gi {
namespace {

// Rows that follow each other without a gap, in both maps, become one long row.
void join_rows(Relayout& a) {
  const i64 height = a.source.size[2], width = a.source.size[3];
  for (Array* map : {&a.source, &a.target})
    if (map->stride[2] != width * map->stride[3]) return;
  for (Array* map : {&a.source, &a.target}) {
    map->size[3] = height * width;
    map->size[2] = 1;
  }
}

at::Tensor relayout(const at::Tensor& x, bool channels_last) {
  at::Tensor target = empty_result(x.sizes(), x.options(),
                                   channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  if (target.numel() == 0) return target;
  Relayout a{array_of(x), array_of(target)};
  join_rows(a);
  const auto& kernels = relayout_kernels_for_this_cpu();
  run_items(kernels.items(a), kernels.copy, a);
  return target;
}

}  // namespace

TORCH_LIBRARY_IMPL(gi, CPU, m) { m.impl("relayout", relayout); }

}  // namespace gi
