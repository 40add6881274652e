#include "common/device_binding.h"
#include "window_pool/cuda.h"

namespace gi {
namespace {

// One number of accumulation type per logit.
at::Tensor per_logit(const at::Tensor& logits) {
  return at::empty({logits.numel()}, logits.options().dtype(accumulation_type(logits)));
}

at::Tensor forward(const at::Tensor& logits, const at::Tensor& features, int64_t rows, int64_t columns) {
  const DeviceScope scope({logits, features});
  at::Tensor output = at::empty({features.size(0), rows * columns, logits.size(1), features.size(1)},
                                features.options());
  if (output.numel() == 0) return output;
  const at::Tensor weights = per_logit(logits);
  window_pool_forward({array_of(logits), array_of(features), rows, columns, array_of(output)}, weights.data_ptr(),
                      scope.stream());
  return output;
}

std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad, const at::Tensor& logits,
                                            const at::Tensor& features, int64_t rows, int64_t columns,
                                            bool need_logits, bool need_features) {
  const DeviceScope scope({grad, logits, features});
  at::Tensor grad_logits = device_gradient(logits, need_logits);
  at::Tensor grad_features = device_gradient(features, need_features);
  if (grad.numel() == 0) return {grad_logits.zero_(), grad_features.zero_()};
  WindowPoolBackward a{array_of(grad), array_of(logits), array_of(features), rows, columns, {}, {}};
  at::Tensor dots;
  if (need_logits) {
    a.grad_logits = array_of(grad_logits);
    dots = per_logit(logits);
  }
  if (need_features) a.grad_features = array_of(grad_features);
  const at::Tensor weights = per_logit(logits);
  window_pool_backward(a, weights.data_ptr(), need_logits ? dots.data_ptr() : nullptr, scope.stream());
  return {grad_logits, grad_features};
}

}  // namespace

TORCH_LIBRARY_IMPL(gi, GI_DEVICE_KEY, m) {
  m.impl("window_pool", forward);
  m.impl("window_pool_backward", backward);
}

}  // namespace gi
