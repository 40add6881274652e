#include "product/multiply.h"

namespace gi {
namespace {

// [N,C,H,W] -> [N,1,HW,C], a view where rows of pixels follow each other.
at::Tensor pixels_of(const at::Tensor& t) {
  return t.reshape({t.size(0), 1, t.size(1), t.size(2) * t.size(3)}).transpose(2, 3);
}

// [N,O,H,W], channels-last.
at::Tensor forward(const at::Tensor& input, const at::Tensor& weight) {
  const i64 N = input.size(0), O = weight.size(0), C = weight.size(1), H = input.size(2), W = input.size(3);
  const at::Tensor pixels = pixels_of(input);
  at::Tensor rows;
  if (is_low(input)) {
    rows = project_low(pixels, weight);
  } else {
    rows = empty_result({N, H * W, O}, input.options());
    multiply(rows, pixels, weight.t().expand({N, 1, C, O}), false);
  }
  return rows.view({N, H, W, O}).permute({0, 3, 1, 2});
}

// Gradient of the input, channels-last where that is, else contiguous; gradient of the weight.
std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight,
                                            bool need_input, bool need_weight) {
  const i64 N = input.size(0), O = weight.size(0), C = weight.size(1), H = input.size(2), W = input.size(3);
  const bool rows_first = input.stride(1) == 1;
  const at::Tensor grads = pixels_of(grad), pixels = pixels_of(input);  // [N,1,HW,.]
  at::Tensor grad_input = at::empty({0}, input.options()), grad_weight = empty_contiguous_gradient(weight, need_weight);
  if (need_input) {
    grad_input = empty_result({N, rows_first ? H * W : C, rows_first ? C : H * W}, input.options());
    if (is_low(input)) {
      const at::Tensor rows = at::matmul(grads.squeeze(1), weight);
      grad_input.copy_(rows_first ? rows : rows.transpose(1, 2));
    } else if (rows_first) {
      multiply(grad_input, grads, weight.expand({N, 1, O, C}), false);
    } else {
      multiply(grad_input, weight.t().expand({N, 1, C, O}), grads.transpose(2, 3), false);
    }
    grad_input = rows_first ? grad_input.view({N, H, W, C}).permute({0, 3, 1, 2}) : grad_input.view({N, C, H, W});
  }
  if (need_weight) {
    if (is_low(input))
      grad_weight.copy_(at::matmul(grads.reshape({N * H * W, O}).t(), pixels.reshape({N * H * W, C})));
    else if (N == 0)
      grad_weight.zero_();
    else
      multiply(grad_weight.unsqueeze(0), grads.transpose(2, 3).transpose(0, 1), pixels.transpose(0, 1), false);
  }
  return {grad_input, grad_weight};
}

}  // namespace

TORCH_LIBRARY_IMPL(gi, CPU, m) {
  m.impl("pixel_projection", forward);
  m.impl("pixel_projection_backward", backward);
}

}  // namespace gi
