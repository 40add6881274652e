#include "common/binding.h"
#include "global_attention/kernel.h"

namespace gi {
namespace {

std::vector<Array> arrays_of(at::TensorList tensors) {
  std::vector<Array> arrays;
  for (const at::Tensor& t : tensors) arrays.push_back(array_of(t));
  return arrays;
}

// Few enough queries that every thread has some pieces of work: each piece packs all keys and values.
i64 queries_of_items(i64 heads, i64 queries) {
  i64 count = 256;
  while (count > 32 && heads * ((queries + count - 1) / count) < 2 * at::get_num_threads()) count /= 2;
  return count;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& query, at::TensorList keys, at::TensorList values) {
  const i64 B = query.size(0), h = query.size(1), N = query.size(2), d = query.size(3);
  // Laid out as [B,N,h,d], what a projection after the attention reads without a copy.
  const auto empty = [&] { return empty_result({B, N, h, d}, query.options()).transpose(1, 2); };
  const bool rounded = accumulation_type(query) != query.scalar_type();
  at::Tensor output = empty(), remainder = rounded ? empty() : at::empty({0}, query.options());
  at::Tensor log_sum = at::empty({B, h, N}, query.options().dtype(accumulation_type(query)));
  if (output.numel() == 0) return {output, remainder, log_sum};
  const auto key_arrays = arrays_of(keys), value_arrays = arrays_of(values);
  const AttentionForward a{array_of(query),     i64(keys.size()),           key_arrays.data(),
                           value_arrays.data(), queries_of_items(B * h, N), array_of(output),
                           array_of(remainder), log_sum.data_ptr()};
  const auto& kernels = attention_kernels_for_this_cpu();
  run_items(kernels.forward_items(a), kernels.forward, a);
  return {output, remainder, log_sum};
}

using Gradients = std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>>;

Gradients backward(const at::Tensor& grad, const at::Tensor& query, at::TensorList keys, at::TensorList values,
                   const at::Tensor& output, const at::Tensor& remainder, const at::Tensor& log_sum) {
  at::Tensor grad_query = empty_contiguous_gradient(query, true);
  std::vector<at::Tensor> grad_keys, grad_values;
  for (const at::Tensor& key : keys) {
    grad_keys.push_back(empty_contiguous_gradient(key, true));
    grad_values.push_back(empty_contiguous_gradient(key, true));
  }
  if (query.numel() == 0) {
    for (const auto& gradients : {grad_keys, grad_values})
      for (const at::Tensor& t : gradients) t.zero_();
    return {grad_query, grad_keys, grad_values};
  }
  const auto key_arrays = arrays_of(keys), value_arrays = arrays_of(values), grad_key_arrays = arrays_of(grad_keys),
             grad_value_arrays = arrays_of(grad_values);
  const at::Tensor log_sums = log_sum.contiguous();
  const AttentionBackward a{{array_of(query), i64(keys.size()), key_arrays.data(), value_arrays.data(), 0,
                             array_of(output), array_of(remainder), log_sums.data_ptr()},
                            array_of(grad),
                            array_of(grad_query),
                            grad_key_arrays.data(),
                            grad_value_arrays.data()};
  run_items(query.size(0) * query.size(1), attention_kernels_for_this_cpu().backward, a);
  return {grad_query, grad_keys, grad_values};
}

}  // namespace

TORCH_LIBRARY_IMPL(gi, CPU, m) {
  m.impl("global_attention", forward);
  m.impl("global_attention_backward", backward);
}

}  // namespace gi
