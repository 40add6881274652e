#include "common/device_binding.h"
#include "convex_upsample/cuda.h"

namespace gi {
namespace {

at::Tensor forward(const at::Tensor& flow_, const at::Tensor& mask) {
  const DeviceScope scope({flow_, mask});
  const at::Tensor flow = flow_.contiguous();
  at::Tensor output = at::empty({mask.size(0), 2, 8 * mask.size(2), 8 * mask.size(3)}, flow.options());
  if (output.numel() > 0)
    convex_upsample_forward({flow.const_data_ptr(), array_of(mask), output.data_ptr()}, scope.stream());
  return output;
}

std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad, const at::Tensor& flow_,
                                            const at::Tensor& mask, bool need_flow, bool need_mask) {
  const DeviceScope scope({grad, flow_, mask});
  const at::Tensor flow = flow_.contiguous();
  const i64 B = mask.size(0), h = mask.size(2), w = mask.size(3);
  at::Tensor grad_flow = contiguous_device_gradient(flow, need_flow);
  at::Tensor grad_mask = device_gradient(mask, need_mask);
  if (mask.numel() == 0) return {grad_flow, grad_mask};
  ConvexUpsampleBackward a{array_of(grad), flow.const_data_ptr(), array_of(mask), {}, nullptr};
  if (need_mask) a.grad_mask = array_of(grad_mask);
  at::Tensor parts;
  if (need_flow) {
    parts = at::empty({B, h, w, 2, 9}, flow.options());
    a.flow_parts = parts.data_ptr();
  }
  convex_upsample_backward(a, scope.stream());
  if (need_flow)
    convex_upsample_reduce({dtype_of(flow), h, w, parts.data_ptr(), grad_flow.data_ptr()}, B, scope.stream());
  return {grad_flow, grad_mask};
}

}  // namespace

TORCH_LIBRARY_IMPL(gi, GI_DEVICE_KEY, m) {
  m.impl("convex_upsample", forward);
  m.impl("convex_upsample_backward", backward);
}

}  // namespace gi
