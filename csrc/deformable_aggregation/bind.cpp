#include "common/binding.h"
#include "deformable_aggregation/kernel.h"

namespace gi {
namespace {

struct Contiguous {
  at::Tensor flows, errors, key_error_weight, value_error_weight, value_bias;
};

DeformableForward arguments_of(const at::Tensor& features, const at::Tensor& keys, const at::Tensor& values,
                               const Contiguous& t) {
  DeformableForward a;
  a.features = array_of(features);
  a.keys = array_of(keys);
  a.values = array_of(values);
  a.flows = t.flows.const_data_ptr();
  a.errors = t.errors.const_data_ptr();
  a.key_error_weight = t.key_error_weight.const_data_ptr();
  a.value_error_weight = t.value_error_weight.const_data_ptr();
  a.value_bias = t.value_bias.const_data_ptr();
  a.flow_h = int(t.flows.size(3));
  a.flow_w = int(t.flows.size(4));
  a.error_h = int(t.errors.size(3));
  a.error_w = int(t.errors.size(4));
  return a;
}

at::Tensor forward(const at::Tensor& features, const at::Tensor& keys, const at::Tensor& values,
                   const at::Tensor& flows, const at::Tensor& errors, const at::Tensor& key_error_weight,
                   const at::Tensor& value_error_weight, const at::Tensor& value_bias) {
  at::Tensor output = empty_output_like(features);
  if (output.numel() == 0) return output;
  const Contiguous t{flows.contiguous(), errors.contiguous(), key_error_weight.contiguous(),
                     value_error_weight.contiguous(), value_bias.contiguous()};
  DeformableForward a = arguments_of(features, keys, values, t);
  a.output = array_of(output);
  const auto& kernels = deformable_kernels_for_this_cpu();
  run_items(kernels.forward_items(a), kernels.forward, a);
  return output;
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Of keys, values, flows, errors, and the three weights together as [3,C].
Gradients backward(const at::Tensor& grad, const at::Tensor& features, const at::Tensor& keys,
                   const at::Tensor& values, const at::Tensor& flows_, const at::Tensor& errors_,
                   const at::Tensor& key_error_weight, const at::Tensor& value_error_weight,
                   const at::Tensor& value_bias, bool need_sources, bool need_maps) {
  const Contiguous t{flows_.contiguous(), errors_.contiguous(), key_error_weight.contiguous(),
                     value_error_weight.contiguous(), value_bias.contiguous()};
  at::Tensor grad_keys = empty_gradient(keys, need_sources), grad_values = empty_gradient(values, need_sources);
  at::Tensor grad_flows = empty_contiguous_gradient(t.flows, need_maps);
  at::Tensor grad_errors = empty_contiguous_gradient(t.errors, need_maps);
  const i64 B = keys.size(0), T = keys.size(1), C = keys.size(2), H = keys.size(3), W = keys.size(4);
  if (keys.numel() == 0)
    return {grad_keys, grad_values, grad_flows.zero_(), grad_errors.zero_(), at::zeros({3, C}, t.flows.options())};
  const auto& kernels = deformable_kernels_for_this_cpu();
  const i64 blocks = kernels.backward_blocks(C);
  DeformableBackward a;
  a.forward = arguments_of(features, keys, values, t);
  a.grad = array_of(grad);
  if (need_sources) {
    a.grad_keys = array_of(grad_keys);
    a.grad_values = array_of(grad_values);
  }
  at::Tensor map_parts, weight_parts = at::empty({B, 3, C}, t.flows.options());
  if (need_maps) map_parts = at::empty({blocks, B, T, 3, H, W}, t.flows.options());
  a.map_parts = need_maps ? map_parts.data_ptr() : nullptr;
  a.weight_parts = weight_parts.data_ptr();
  run_items(B * blocks, kernels.backward, a);
  if (need_maps) {
    const DeformableReduce r{dtype_of(t.flows), B * T, int(H), int(W), a.forward.flow_h, a.forward.flow_w,
                             a.forward.error_h, a.forward.error_w, blocks, map_parts.data_ptr(),
                             grad_flows.data_ptr(), grad_errors.data_ptr()};
    run_items(B * T, kernels.reduce, r);
  }
  return {grad_keys, grad_values, grad_flows, grad_errors, weight_parts.sum(0)};
}

}  // namespace

TORCH_LIBRARY_IMPL(gi, CPU, m) {
  m.impl("deformable_aggregation", forward);
  m.impl("deformable_aggregation_backward", backward);
}

}  // namespace gi
