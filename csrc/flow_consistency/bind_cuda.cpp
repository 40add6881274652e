#include "common/device_binding.h"
#include "flow_consistency/cuda.h"

namespace gi {
namespace {

at::Tensor forward(const at::Tensor& flow, const at::Tensor& flow_backward) {
  const DeviceScope scope({flow, flow_backward});
  at::Tensor output = at::empty({flow.size(0), 1, flow.size(2), flow.size(3)}, flow.options());
  if (output.numel() > 0)
    flow_consistency_forward({array_of(flow), array_of(flow_backward), array_of(output)}, scope.stream());
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(gi, GI_DEVICE_KEY, m) { m.impl("flow_consistency", forward); }

}  // namespace gi
