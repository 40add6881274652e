// PyTorch's flash attention for the CPU runs on each segment; the parts are merged by their
// log-sum-exp. Its backward pass, given the merged output and log-sum-exp, yields each segment's
// share exactly.
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>

#include "common/binding.h"
#include "global_attention/kernel.h"

namespace gi {
namespace {

// The flash kernels want the head dimension contiguous.
at::Tensor rows(const at::Tensor& t) { return t.stride(-1) == 1 || t.size(-1) == 1 ? t : t.contiguous(); }

// [B,h,N,d] laid out as [B,N,h,d], what a projection after the attention reads without a copy.
at::Tensor empty_heads_last(const at::Tensor& query) {
  return at::empty({query.size(0), query.size(2), query.size(1), query.size(3)}, query.options()).transpose(1, 2);
}

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& query_, at::TensorList keys, at::TensorList values) {
  const at::Tensor query = rows(query_);
  const i64 B = query.size(0), h = query.size(1), N = query.size(2), d = query.size(3);
  at::Tensor output = empty_heads_last(query);
  // Strides as the flash kernel has them.
  at::Tensor log_sum = at::empty({B, N, h}, query.options().dtype(accumulation_type(query))).transpose(1, 2);
  if (output.numel() == 0) return {output, log_sum.zero_()};
  std::vector<at::Tensor> outputs, log_sums;
  for (size_t s = 0; s < keys.size(); ++s) {
    if (keys[s].size(2) == 0) continue;
    auto [o, l] = at::_scaled_dot_product_flash_attention_for_cpu(query, rows(keys[s]), rows(values[s]));
    outputs.push_back(o);
    log_sums.push_back(l);
  }
  if (outputs.size() == 1) {
    // The layouts are fixed by this operator, whatever the flash kernel chose.
    const bool same = outputs[0].strides() == output.strides() && log_sums[0].strides() == log_sum.strides();
    if (same) return {outputs[0], log_sums[0]};
    return {output.copy_(outputs[0]), log_sum.copy_(log_sums[0])};
  }
  std::vector<Array> output_arrays, log_sum_arrays;
  for (size_t s = 0; s < outputs.size(); ++s) {
    output_arrays.push_back(array_of(outputs[s]));
    log_sum_arrays.push_back(array_of(log_sums[s]));
  }
  const MergeAttention a{B, h, N, d, i64(outputs.size()), output_arrays.data(), log_sum_arrays.data(),
                         array_of(output), array_of(log_sum)};
  const auto& kernels = merge_attention_kernels_for_this_cpu();
  at::parallel_for(0, B * N, 64, [&](i64 begin, i64 end) { kernels.merge(a, begin, end); });
  return {output, log_sum};
}

using Gradients = std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>>;

Gradients backward(const at::Tensor& grad_, const at::Tensor& query_, at::TensorList keys, at::TensorList values,
                   const at::Tensor& output, const at::Tensor& log_sum) {
  const at::Tensor query = rows(query_), grad = rows(grad_);
  at::Tensor grad_query = at::zeros(query.sizes(), query.options().dtype(accumulation_type(query)));
  std::vector<at::Tensor> grad_keys, grad_values;
  for (size_t s = 0; s < keys.size(); ++s) {
    at::Tensor grad_key = at::empty(keys[s].sizes(), keys[s].options());
    at::Tensor grad_value = at::empty(values[s].sizes(), values[s].options());
    if (query.numel() == 0 || keys[s].numel() == 0) {
      grad_key.zero_();
      grad_value.zero_();
    } else {
      auto [gq, gk, gv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
          grad, query, rows(keys[s]), rows(values[s]), output, log_sum, 0.0, false);
      grad_query.add_(gq);
      grad_key.copy_(gk);
      grad_value.copy_(gv);
    }
    grad_keys.push_back(grad_key);
    grad_values.push_back(grad_value);
  }
  return {grad_query.to(query.scalar_type()), grad_keys, grad_values};
}

}  // namespace

TORCH_LIBRARY_IMPL(gi, CPU, m) {
  m.impl("global_attention", forward);
  m.impl("global_attention_backward", backward);
}

}  // namespace gi
