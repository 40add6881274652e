#include "common/device_binding.h"
#include "window_spread/cuda.h"

namespace gi {
namespace {

// One number of accumulation type per logit.
at::Tensor per_logit(const at::Tensor& logits) {
  return at::empty({logits.numel()}, logits.options().dtype(accumulation_type(logits)));
}

at::Tensor forward(const at::Tensor& logits, const at::Tensor& latents, int64_t rows, int64_t columns) {
  const DeviceScope scope({logits, latents});
  // The shape function in Python applies the same rule.
  const bool channels_last = logits.is_contiguous(at::MemoryFormat::ChannelsLast) && !logits.is_contiguous();
  at::Tensor output = at::empty({logits.size(0), latents.size(3), logits.size(2), logits.size(3)}, latents.options(),
                                channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  if (output.numel() == 0) return output;
  const at::Tensor gates = per_logit(logits);
  window_spread_forward({array_of(logits), array_of(latents), rows, columns, array_of(output)}, gates.data_ptr(),
                        scope.stream());
  return output;
}

std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad, const at::Tensor& logits,
                                            const at::Tensor& latents, int64_t rows, int64_t columns,
                                            bool need_logits, bool need_latents) {
  const DeviceScope scope({grad, logits, latents});
  at::Tensor grad_logits = device_gradient(logits, need_logits);
  at::Tensor grad_latents = contiguous_device_gradient(latents, need_latents);
  if (latents.numel() == 0) return {grad_logits.zero_(), grad_latents};
  WindowSpreadBackward a{array_of(grad), array_of(logits), array_of(latents), rows, columns, {}, {}};
  at::Tensor dots;
  if (need_logits) {
    a.grad_logits = array_of(grad_logits);
    dots = per_logit(logits);
  }
  if (need_latents) a.grad_latents = array_of(grad_latents);
  const at::Tensor gates = per_logit(logits);
  window_spread_backward(a, gates.data_ptr(), need_logits ? dots.data_ptr() : nullptr, scope.stream());
  return {grad_logits, grad_latents};
}

}  // namespace

TORCH_LIBRARY_IMPL(gi, GI_DEVICE_KEY, m) {
  m.impl("window_spread", forward);
  m.impl("window_spread_backward", backward);
}

}  // namespace gi
