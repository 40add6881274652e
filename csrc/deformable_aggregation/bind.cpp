#include "deformable_aggregation/kernel.h"
#include "deformable_aggregation/launch.h"

namespace gi {

AggregationMaps AggregationMaps::contiguous() const {
  return {flows.contiguous(), errors.contiguous(), key_error_weight.contiguous(), value_error_weight.contiguous(),
          value_bias.contiguous()};
}

AggregationMaps AggregationMaps::channels(i64 first, i64 count) const {
  return {flows, errors, key_error_weight.narrow(0, first, count), value_error_weight.narrow(0, first, count),
          value_bias.narrow(0, first, count)};
}

namespace {

DeformableForward arguments_of(const at::Tensor& features, const at::Tensor& keys, const at::Tensor& values,
                               const AggregationMaps& maps) {
  DeformableForward a;
  a.features = array_of(features);
  a.keys = array_of(keys);
  a.values = array_of(values);
  a.flows = maps.flows.const_data_ptr();
  a.errors = maps.errors.const_data_ptr();
  a.key_error_weight = maps.key_error_weight.const_data_ptr();
  a.value_error_weight = maps.value_error_weight.const_data_ptr();
  a.value_bias = maps.value_bias.const_data_ptr();
  a.flow_h = int(maps.flows.size(3));
  a.flow_w = int(maps.flows.size(4));
  a.error_h = int(maps.errors.size(3));
  a.error_w = int(maps.errors.size(4));
  return a;
}

}  // namespace

void aggregate(const at::Tensor& output, const at::Tensor& features, const at::Tensor& keys, const at::Tensor& values,
               const AggregationMaps& maps) {
  DeformableForward a = arguments_of(features, keys, values, maps);
  a.output = array_of(output);
  const auto& kernels = deformable_kernels_for_this_cpu();
  run_items(kernels.forward_items(a), kernels.forward, a);
}

i64 aggregation_blocks(i64 channels) { return deformable_kernels_for_this_cpu().backward_blocks(channels); }

void aggregate_backward(const AggregationGradients& result, const at::Tensor& grad, const at::Tensor& features,
                        const at::Tensor& keys, const at::Tensor& values, const AggregationMaps& maps) {
  DeformableBackward a;
  a.forward = arguments_of(features, keys, values, maps);
  a.grad = array_of(grad);
  if (result.keys.defined()) {
    a.grad_keys = array_of(result.keys);
    a.grad_values = array_of(result.values);
  }
  a.map_parts = result.map_parts.defined() ? result.map_parts.data_ptr() : nullptr;
  a.weight_parts = result.weight_parts.data_ptr();
  run_items(keys.size(0) * aggregation_blocks(keys.size(2)), deformable_kernels_for_this_cpu().backward, a);
}

void reduce_maps(const at::Tensor& grad_flows, const at::Tensor& grad_errors, const at::Tensor& map_parts) {
  const i64 frames = map_parts.size(1) * map_parts.size(2);
  const DeformableReduce r{dtype_of(map_parts),
                           frames,
                           int(map_parts.size(4)),
                           int(map_parts.size(5)),
                           int(grad_flows.size(3)),
                           int(grad_flows.size(4)),
                           int(grad_errors.size(3)),
                           int(grad_errors.size(4)),
                           map_parts.size(0),
                           map_parts.data_ptr(),
                           grad_flows.data_ptr(),
                           grad_errors.data_ptr()};
  run_items(frames, deformable_kernels_for_this_cpu().reduce, r);
}

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
