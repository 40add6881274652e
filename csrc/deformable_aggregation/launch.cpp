#include "deformable_aggregation/launch.h"

#include "deformable_aggregation/kernel.h"

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

}  // namespace gi
