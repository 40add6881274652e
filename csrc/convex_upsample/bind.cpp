#include "common/binding.h"
#include "convex_upsample/kernel.h"

namespace gi {
namespace {

at::Tensor forward(const at::Tensor& flow_, const at::Tensor& mask) {
  const at::Tensor flow = flow_.contiguous();
  const i64 B = mask.size(0), h = mask.size(2), w = mask.size(3);
  at::Tensor output = empty_result({B, 2, 8 * h, 8 * w}, flow.options());
  if (output.numel() == 0) return output;
  const ConvexUpsampleForward a{flow.const_data_ptr(), array_of(mask), output.data_ptr()};
  run_items(B * h, convex_upsample_kernels_for_this_cpu().forward, a);
  return output;
}

std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad, const at::Tensor& flow_,
                                            const at::Tensor& mask, bool need_flow, bool need_mask) {
  const at::Tensor flow = flow_.contiguous();
  const i64 B = mask.size(0), h = mask.size(2), w = mask.size(3);
  at::Tensor grad_flow = empty_contiguous_gradient(flow, need_flow);
  at::Tensor grad_mask = empty_gradient(mask, need_mask);
  if (mask.numel() == 0) return {grad_flow, grad_mask};
  const auto& kernels = convex_upsample_kernels_for_this_cpu();
  ConvexUpsampleBackward a{array_of(grad), flow.const_data_ptr(), array_of(mask), {}, nullptr};
  if (need_mask) a.grad_mask = array_of(grad_mask);
  at::Tensor parts;
  if (need_flow) {
    parts = at::empty({B, h, w, 2, 9}, flow.options());
    a.flow_parts = parts.data_ptr();
  }
  run_items(B * h, kernels.backward, a);
  if (need_flow) {
    const ConvexUpsampleReduce r{dtype_of(flow), h, w, parts.data_ptr(), grad_flow.data_ptr()};
    run_items(B * h, kernels.reduce, r);
  }
  return {grad_flow, grad_mask};
}

}  // namespace

TORCH_LIBRARY_IMPL(gi, CPU, m) {
  m.impl("convex_upsample", forward);
  m.impl("convex_upsample_backward", backward);
}

}  // namespace gi
