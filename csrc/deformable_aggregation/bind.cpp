#include "deformable_aggregation/launch.h"

namespace gi {
namespace {

at::Tensor forward(const at::Tensor& features, const at::Tensor& keys, const at::Tensor& values,
                   const at::Tensor& flows, const at::Tensor& errors, const at::Tensor& key_error_weight,
                   const at::Tensor& value_error_weight, const at::Tensor& value_bias) {
  at::Tensor output = empty_result_like(features);
  const AggregationMaps maps{flows, errors, key_error_weight, value_error_weight, value_bias};
  if (output.numel() > 0) aggregate(output, features, keys, values, maps.contiguous());
  return output;
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Of keys, values, flows, errors, and the three weights together as [3,C].
Gradients backward(const at::Tensor& grad, const at::Tensor& features, const at::Tensor& keys,
                   const at::Tensor& values, const at::Tensor& flows, const at::Tensor& errors,
                   const at::Tensor& key_error_weight, const at::Tensor& value_error_weight,
                   const at::Tensor& value_bias, bool need_sources, bool need_maps) {
  at::Tensor grad_keys = empty_gradient(keys, need_sources), grad_values = empty_gradient(values, need_sources);
  at::Tensor grad_flows = empty_contiguous_gradient(flows, need_maps);
  at::Tensor grad_errors = empty_contiguous_gradient(errors, need_maps);
  const i64 B = keys.size(0), T = keys.size(1), C = keys.size(2), H = keys.size(3), W = keys.size(4);
  if (keys.numel() == 0)
    return {grad_keys, grad_values, grad_flows.zero_(), grad_errors.zero_(), at::zeros({3, C}, flows.options())};
  AggregationGradients result;
  if (need_sources) {
    result.keys = grad_keys;
    result.values = grad_values;
  }
  if (need_maps) result.map_parts = at::empty({aggregation_blocks(C), B, T, 3, H, W}, flows.options());
  result.weight_parts = at::empty({B, 3, C}, flows.options());
  const AggregationMaps maps{flows, errors, key_error_weight, value_error_weight, value_bias};
  aggregate_backward(result, grad, features, keys, values, maps.contiguous());
  if (need_maps) reduce_maps(grad_flows, grad_errors, result.map_parts);
  return {grad_keys, grad_values, grad_flows, grad_errors, result.weight_parts.sum(0)};
}

}  // namespace

TORCH_LIBRARY_IMPL(gi, CPU, m) {
  m.impl("deformable_aggregation", forward);
  m.impl("deformable_aggregation_backward", backward);
}

}  // namespace gi
