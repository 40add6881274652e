#include "common/binding.h"
#include "window_pool/kernel.h"

namespace gi {
namespace {

at::Tensor forward(const at::Tensor& logits, const at::Tensor& features, int64_t rows, int64_t columns) {
  at::Tensor output = at::empty({features.size(0), rows * columns, logits.size(1), features.size(1)},
                                features.options());
  if (output.numel() == 0) return output;
  const auto& kernels = window_pool_kernels_for_this_cpu();
  const WindowPoolForward a{array_of(logits), array_of(features), rows, columns, array_of(output)};
  run_items(kernels.forward_items(a), kernels.forward, a);
  return output;
}

std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad, const at::Tensor& logits,
                                            const at::Tensor& features, int64_t rows, int64_t columns,
                                            bool need_logits, bool need_features) {
  at::Tensor grad_logits = empty_gradient(logits, need_logits);
  at::Tensor grad_features = empty_gradient(features, need_features);
  if (grad.numel() == 0) return {grad_logits.zero_(), grad_features.zero_()};
  const auto& kernels = window_pool_kernels_for_this_cpu();
  WindowPoolBackward a{array_of(grad), array_of(logits), array_of(features), rows, columns, {}, {}};
  if (need_logits) a.grad_logits = array_of(grad_logits);
  if (need_features) a.grad_features = array_of(grad_features);
  run_items(kernels.backward_items(a), kernels.backward, a);
  return {grad_logits, grad_features};
}

}  // namespace

TORCH_LIBRARY_IMPL(gi, CPU, m) {
  m.impl("window_pool", forward);
  m.impl("window_pool_backward", backward);
}

}  // namespace gi
