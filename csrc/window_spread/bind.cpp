#include "common/binding.h"
#include "window_spread/kernel.h"

namespace gi {
namespace {

at::Tensor forward(const at::Tensor& logits, const at::Tensor& latents, int64_t rows, int64_t columns) {
  // The shape function in Python applies the same rule.
  const bool channels_last = logits.is_contiguous(at::MemoryFormat::ChannelsLast) && !logits.is_contiguous();
  at::Tensor output =
      empty_result({logits.size(0), latents.size(3), logits.size(2), logits.size(3)}, latents.options(),
                   channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  if (output.numel() == 0) return output;
  const auto& kernels = window_spread_kernels_for_this_cpu();
  const WindowSpreadForward a{array_of(logits), array_of(latents), rows, columns, array_of(output)};
  run_items(kernels.forward_items(a), kernels.forward, a);
  return output;
}

std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad, const at::Tensor& logits,
                                            const at::Tensor& latents, int64_t rows, int64_t columns,
                                            bool need_logits, bool need_latents) {
  at::Tensor grad_logits = empty_gradient(logits, need_logits);
  at::Tensor grad_latents = empty_contiguous_gradient(latents, need_latents);
  if (latents.numel() == 0) return {grad_logits.zero_(), grad_latents};
  const auto& kernels = window_spread_kernels_for_this_cpu();
  WindowSpreadBackward a{array_of(grad), array_of(logits), array_of(latents), rows, columns, {}, {}};
  if (need_logits) a.grad_logits = array_of(grad_logits);
  if (need_latents) a.grad_latents = array_of(grad_latents);
  run_items(kernels.backward_items(a), kernels.backward, a);
  return {grad_logits, grad_latents};
}

}  // namespace

TORCH_LIBRARY_IMPL(gi, CPU, m) {
  m.impl("window_spread", forward);
  m.impl("window_spread_backward", backward);
}

}  // namespace gi
