#include "common/binding.h"
#include "flow_warp/kernel.h"

namespace gi {
namespace {

at::Tensor forward(const at::Tensor& input, const at::Tensor& flow_) {
  const at::Tensor flow = flow_.contiguous();
  at::Tensor output = empty_result_like(input);
  if (output.numel() == 0) return output;
  const auto& kernels = flow_warp_kernels_for_this_cpu();
  const FlowWarpForward a{array_of(input), flow.const_data_ptr(), int(flow.size(2)), int(flow.size(3)),
                          array_of(output)};
  run_items(kernels.forward_items(a), kernels.forward, a);
  return output;
}

std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad, const at::Tensor& input,
                                            const at::Tensor& flow_, bool need_input, bool need_flow) {
  const at::Tensor flow = flow_.contiguous();
  at::Tensor grad_input = empty_gradient(input, need_input);
  at::Tensor grad_flow = empty_contiguous_gradient(flow, need_flow);
  if (input.numel() == 0) return {grad_input, grad_flow.zero_()};
  const auto& kernels = flow_warp_kernels_for_this_cpu();
  const i64 B = input.size(0), H = input.size(2), W = input.size(3);
  FlowWarpBackward a{array_of(grad), array_of(input), flow.const_data_ptr(), int(flow.size(2)),
                     int(flow.size(3)), {}, nullptr};
  if (need_input) a.grad_input = array_of(grad_input);
  const i64 blocks = kernels.backward_blocks(a);
  at::Tensor parts;
  if (need_flow) {
    parts = at::empty({blocks, B, 2, H, W}, flow.options());
    a.flow_parts = parts.data_ptr();
  }
  run_items(B * blocks, kernels.backward, a);
  if (need_flow) {
    const FlowWarpReduce r{dtype_of(flow), B, int(H), int(W), a.flow_h, a.flow_w, blocks, parts.data_ptr(),
                           grad_flow.data_ptr()};
    run_items(B, kernels.reduce, r);
  }
  return {grad_input, grad_flow};
}

}  // namespace

TORCH_LIBRARY_IMPL(gi, CPU, m) {
  m.impl("flow_warp", forward);
  m.impl("flow_warp_backward", backward);
}

}  // namespace gi
