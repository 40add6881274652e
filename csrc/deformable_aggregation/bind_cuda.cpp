#include "common/device_binding.h"
#include "deformable_aggregation/cuda.h"

namespace gi {
namespace {

// The same map or maps [...,C,H,W] with the channels of a pixel contiguous: a copy where they are not.
at::Tensor rows(const at::Tensor& t) {
  return t.stride(-3) == 1 ? t : t.movedim(-3, -1).contiguous().movedim(-1, -3);
}

at::Tensor empty_rows(const at::Tensor& like) {
  return at::empty_like(like.movedim(-3, -1), at::MemoryFormat::Contiguous).movedim(-1, -3);
}

// What the kernels are called with, and the tensors that hold it.
struct Call {
  at::Tensor features, keys, values, flows, errors, key_error_weight, value_error_weight, value_bias;

  Call(const at::Tensor& features_, const at::Tensor& keys_, const at::Tensor& values_, const at::Tensor& flows_,
       const at::Tensor& errors_, const at::Tensor& key_error_weight_, const at::Tensor& value_error_weight_,
       const at::Tensor& value_bias_)
      : features(rows(features_)), keys(rows(keys_)), values(rows(values_)), flows(flows_.contiguous()),
        errors(errors_.contiguous()), key_error_weight(key_error_weight_.contiguous()),
        value_error_weight(value_error_weight_.contiguous()), value_bias(value_bias_.contiguous()) {}

  DeformableForward arguments() const {
    DeformableForward a;
    a.features = array_of(features);
    a.keys = array_of(keys);
    a.values = array_of(values);
    a.flows = flows.const_data_ptr();
    a.errors = errors.const_data_ptr();
    a.key_error_weight = key_error_weight.const_data_ptr();
    a.value_error_weight = value_error_weight.const_data_ptr();
    a.value_bias = value_bias.const_data_ptr();
    a.flow_h = int(flows.size(3));
    a.flow_w = int(flows.size(4));
    a.error_h = int(errors.size(3));
    a.error_w = int(errors.size(4));
    return a;
  }
};

at::Tensor forward(const at::Tensor& features, const at::Tensor& keys, const at::Tensor& values,
                   const at::Tensor& flows, const at::Tensor& errors, const at::Tensor& key_error_weight,
                   const at::Tensor& value_error_weight, const at::Tensor& value_bias) {
  const DeviceScope scope(
      {features, keys, values, flows, errors, key_error_weight, value_error_weight, value_bias});
  at::Tensor output = at::empty_like(features);
  if (output.numel() == 0) return output;
  const Call call(features, keys, values, flows, errors, key_error_weight, value_error_weight, value_bias);
  DeformableForward a = call.arguments();
  const at::Tensor result = output.stride(1) == 1 ? output : empty_rows(output);
  a.output = array_of(result);
  deformable_forward(a, scope.stream());
  return result.is_same(output) ? output : output.copy_(result);
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Of keys, values, flows, errors, and the three weights together as [3,C].
Gradients backward(const at::Tensor& grad, const at::Tensor& features, const at::Tensor& keys,
                   const at::Tensor& values, const at::Tensor& flows, const at::Tensor& errors,
                   const at::Tensor& key_error_weight, const at::Tensor& value_error_weight,
                   const at::Tensor& value_bias, bool need_sources, bool need_maps) {
  const DeviceScope scope(
      {grad, features, keys, values, flows, errors, key_error_weight, value_error_weight, value_bias});
  at::Tensor grad_keys = device_gradient(keys, need_sources), grad_values = device_gradient(values, need_sources);
  at::Tensor grad_flows = contiguous_device_gradient(flows, need_maps);
  at::Tensor grad_errors = contiguous_device_gradient(errors, need_maps);
  const i64 B = keys.size(0), T = keys.size(1), C = keys.size(2), H = keys.size(3), W = keys.size(4);
  if (keys.numel() == 0)
    return {grad_keys, grad_values, grad_flows.zero_(), grad_errors.zero_(), at::zeros({3, C}, flows.options())};
  const Call call(features, keys, values, flows, errors, key_error_weight, value_error_weight, value_bias);
  DeformableBackward a;
  a.forward = call.arguments();
  const at::Tensor incoming = rows(grad);
  a.grad = array_of(incoming);
  at::Tensor key_rows = grad_keys, value_rows = grad_values, memory, map_parts;
  if (need_sources) {
    if (grad_keys.stride(2) != 1) key_rows = empty_rows(keys);
    if (grad_values.stride(2) != 1) value_rows = empty_rows(values);
    a.grad_keys = array_of(key_rows);
    a.grad_values = array_of(value_rows);
    memory = device_memory(deformable_memory_bytes(a.forward), keys);
  }
  const DeformableParts parts = deformable_parts(a.forward);
  if (need_maps) map_parts = at::empty({parts.map_blocks, B, T, 3, H, W}, flows.options());
  a.map_parts = need_maps ? map_parts.data_ptr() : nullptr;
  const at::Tensor weight_parts = at::empty({parts.weight_parts, 3, C}, flows.options());
  a.weight_parts = weight_parts.data_ptr();
  deformable_backward(a, need_sources ? memory.data_ptr() : nullptr, scope.stream());
  if (!key_rows.is_same(grad_keys)) grad_keys.copy_(key_rows);
  if (!value_rows.is_same(grad_values)) grad_values.copy_(value_rows);
  if (need_maps)
    deformable_reduce({dtype_of(map_parts), B * T, int(H), int(W), a.forward.flow_h, a.forward.flow_w,
                       a.forward.error_h, a.forward.error_w, parts.map_blocks, map_parts.data_ptr(),
                       grad_flows.data_ptr(), grad_errors.data_ptr()},
                      scope.stream());
  return {grad_keys, grad_values, grad_flows, grad_errors, weight_parts.sum(0)};
}

}  // namespace

TORCH_LIBRARY_IMPL(gi, GI_DEVICE_KEY, m) {
  m.impl("deformable_aggregation", forward);
  m.impl("deformable_aggregation_backward", backward);
}

}  // namespace gi
