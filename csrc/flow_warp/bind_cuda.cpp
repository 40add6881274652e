#include "common/device_binding.h"
#include "flow_warp/cuda.h"

namespace gi {
namespace {

at::Tensor forward(const at::Tensor& input, const at::Tensor& flow_) {
  const DeviceScope scope({input, flow_});
  const at::Tensor flow = flow_.contiguous();
  at::Tensor output = at::empty_like(input);
  if (output.numel() == 0) return output;
  flow_warp_forward({array_of(input), flow.const_data_ptr(), int(flow.size(2)), int(flow.size(3)), array_of(output)},
                    scope.stream());
  return output;
}

std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad, const at::Tensor& input,
                                            const at::Tensor& flow_, bool need_input, bool need_flow) {
  const DeviceScope scope({grad, input, flow_});
  const at::Tensor flow = flow_.contiguous();
  at::Tensor grad_input = device_gradient(input, need_input);
  at::Tensor grad_flow = contiguous_device_gradient(flow, need_flow);
  if (input.numel() == 0) return {grad_input, grad_flow.zero_()};
  const i64 B = input.size(0), H = input.size(2), W = input.size(3);
  FlowWarpBackward a{array_of(grad), array_of(input), flow.const_data_ptr(), int(flow.size(2)),
                     int(flow.size(3)), {}, nullptr};
  at::Tensor lists, parts;
  if (need_input) {
    a.grad_input = array_of(grad_input);
    lists = device_memory(flow_warp_list_bytes(a), input);
  }
  const bool resized = flow.size(2) != H || flow.size(3) != W;
  if (need_flow) {
    if (resized) parts = at::empty({1, B, 2, H, W}, flow.options());
    a.flow_parts = resized ? parts.data_ptr() : grad_flow.data_ptr();
  }
  flow_warp_backward(a, need_input ? lists.data_ptr() : nullptr, scope.stream());
  if (need_flow && resized)
    flow_warp_reduce({dtype_of(flow), B, int(H), int(W), a.flow_h, a.flow_w, 1, parts.data_ptr(),
                      grad_flow.data_ptr()},
                     scope.stream());
  return {grad_input, grad_flow};
}

}  // namespace

TORCH_LIBRARY_IMPL(gi, GI_DEVICE_KEY, m) {
  m.impl("flow_warp", forward);
  m.impl("flow_warp_backward", backward);
}

}  // namespace gi
