#include "common/binding.h"
#include "complete_flow/kernel.h"

namespace gi {
namespace {

at::Tensor forward(const at::Tensor& flow, const at::Tensor& mask) {
  at::Tensor output = at::empty(flow.sizes(), flow.options());
  if (output.numel() == 0) return output;
  const at::Tensor points = at::empty({flow.size(0), 20, 4}, flow.options().dtype(accumulation_type(flow)));
  const CompleteFlow a{array_of(flow), array_of(mask), array_of(output), points.data_ptr()};
  const auto& kernels = complete_flow_kernels_for_this_cpu();
  run_items(flow.size(0), kernels.draw, a);
  run_items(flow.size(0) * flow.size(2), kernels.fill, a);
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(gi, CPU, m) { m.impl("complete_flow", forward); }

}  // namespace gi
