#include "common/device_binding.h"
#include "complete_flow/cuda.h"

namespace gi {
namespace {

at::Tensor forward(const at::Tensor& flow, const at::Tensor& mask) {
  const DeviceScope scope({flow, mask});
  at::Tensor output = at::empty(flow.sizes(), flow.options());
  if (output.numel() == 0) return output;
  const at::Tensor points = at::empty({flow.size(0), 20, 4}, flow.options().dtype(accumulation_type(flow)));
  const at::Tensor rows = at::empty({2, flow.size(0), flow.size(2)}, flow.options().dtype(at::kLong));
  complete_flow_forward({array_of(flow), array_of(mask), array_of(output), points.data_ptr()},
                        rows.data_ptr<i64>(), scope.stream());
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(gi, GI_DEVICE_KEY, m) { m.impl("complete_flow", forward); }

}  // namespace gi
