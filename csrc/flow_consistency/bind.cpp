#include "common/binding.h"
#include "flow_consistency/kernel.h"

namespace gi {
namespace {

at::Tensor forward(const at::Tensor& flow, const at::Tensor& flow_backward) {
  at::Tensor output = at::empty({flow.size(0), 1, flow.size(2), flow.size(3)}, flow.options());
  if (output.numel() == 0) return output;
  const FlowConsistency a{array_of(flow), array_of(flow_backward), array_of(output)};
  run_items(flow.size(0) * flow.size(2), flow_consistency_kernels_for_this_cpu().forward, a);
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(gi, CPU, m) { m.impl("flow_consistency", forward); }

}  // namespace gi
