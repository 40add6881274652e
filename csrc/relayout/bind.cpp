#include "common/binding.h"
#include "common/rows.h"
#include "relayout/kernel.h"

namespace gi {
namespace {

at::Tensor relayout(const at::Tensor& x, bool channels_last) {
  at::Tensor target = empty_result(x.sizes(), x.options(),
                                   channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  if (target.numel() == 0) return target;
  Relayout a{array_of(x), array_of(target)};
  join_rows({&a.source, &a.target});
  const auto& kernels = relayout_kernels_for_this_cpu();
  run_items(kernels.items(a), kernels.copy, a);
  return target;
}

}  // namespace

TORCH_LIBRARY_IMPL(gi, CPU, m) { m.impl("relayout", relayout); }

}  // namespace gi
