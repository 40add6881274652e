#include "batch_norm/kernel.h"
#include "common/binding.h"
#include "common/rows.h"

namespace gi {
namespace {

using Tensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Output, and mean and variance of x [B,C,H,W] per channel; all vectors are in the accumulation type.
Tensors forward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps, bool relu) {
  const at::Tensor y = empty_result_like(x), w = weight.contiguous(), b = bias.contiguous();
  const auto& kernels = batch_norm_kernels_for_this_cpu();
  BatchNorm a{};
  a.input = array_of(x);
  a.result = array_of(y);
  a.relu = relu;
  join_rows({&a.input, &a.result});
  const i64 C = x.size(1), items = kernels.items(a);
  const at::Tensor parts = at::empty({items, 2, C}, w.options()), totals = at::empty({2, C}, w.options());
  a.parts = parts.data_ptr();
  a.totals = totals.data_ptr();
  run_items(items, kernels.statistics, a);
  run_items(C, kernels.merge_statistics, a);
  at::Tensor mean = totals[0].clone(), variance = totals[1].clone();
  const at::Tensor inverse = (variance + eps).rsqrt_();
  a.weight = w.const_data_ptr();
  a.bias = b.const_data_ptr();
  a.mean = mean.const_data_ptr();
  a.inverse = inverse.const_data_ptr();
  run_items(items, kernels.forward, a);
  return {y, mean, variance};
}

// Gradients of x, weight and bias.
Tensors backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                 const at::Tensor& mean, const at::Tensor& variance, double eps, bool relu) {
  const at::Tensor grad_x = empty_result_like(x), w = weight.contiguous(), b = bias.contiguous();
  const at::Tensor inverse = (variance + eps).rsqrt_();
  const auto& kernels = batch_norm_kernels_for_this_cpu();
  BatchNorm a{};
  a.input = array_of(x);
  a.grad = array_of(grad);
  a.result = array_of(grad_x);
  a.relu = relu;
  join_rows({&a.input, &a.grad, &a.result});
  const i64 C = x.size(1), items = kernels.items(a);
  const at::Tensor parts = at::empty({items, 2, C}, w.options()), totals = at::empty({2, C}, w.options());
  a.parts = parts.data_ptr();
  a.totals = totals.data_ptr();
  a.weight = w.const_data_ptr();
  a.bias = b.const_data_ptr();
  a.mean = mean.const_data_ptr();
  a.inverse = inverse.const_data_ptr();
  run_items(items, kernels.gradient_sums, a);
  run_items(C, kernels.merge_sums, a);
  run_items(items, kernels.backward, a);
  return {grad_x, totals[1] * inverse, totals[0].clone()};
}

}  // namespace

TORCH_LIBRARY_IMPL(gi, CPU, m) {
  m.impl("batch_norm", forward);
  m.impl("batch_norm_backward", backward);
}

}  // namespace gi
