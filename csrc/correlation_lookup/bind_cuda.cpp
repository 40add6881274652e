#include <vector>

#include "common/device_binding.h"
#include "correlation_lookup/cuda.h"

namespace gi {
namespace {

LookupWindow window_of(const at::Tensor& coords, size_t levels, i64 radius) {
  TORCH_CHECK_VALUE(levels <= kMostLevels, "levels: expected at most ", kMostLevels, " on a GPU, got ", levels);
  return {coords.const_data_ptr(), coords.size(0), coords.size(2), coords.size(3), int(levels), int(radius)};
}

at::Tensor empty_output(const LookupWindow& w, const at::TensorOptions& options) {
  const i64 channels = w.levels * (2 * w.radius + 1) * (2 * w.radius + 1);
  return at::empty({w.batch, channels, w.height, w.width}, options, at::MemoryFormat::ChannelsLast);
}

std::vector<Array> arrays_of(at::TensorList tensors) {
  std::vector<Array> arrays;
  for (const at::Tensor& t : tensors) arrays.push_back(array_of(t));
  return arrays;
}

at::Tensor forward(at::TensorList volumes, const at::Tensor& coords_, i64 radius) {
  const DeviceScope scope({volumes, coords_});
  const at::Tensor coords = coords_.contiguous();
  const LookupWindow window = window_of(coords, volumes.size(), radius);
  at::Tensor output = empty_output(window, volumes[0].options());
  if (output.numel() == 0) return output;
  correlation_lookup_forward({window, arrays_of(volumes).data(), output.data_ptr()}, scope.stream());
  return output;
}

std::tuple<std::vector<at::Tensor>, at::Tensor> backward(const at::Tensor& grad, at::TensorList volumes,
                                                         const at::Tensor& coords_, i64 radius,
                                                         bool need_volumes, bool need_coords) {
  const DeviceScope scope({grad, volumes, coords_});
  const at::Tensor coords = coords_.contiguous();
  const LookupWindow window = window_of(coords, volumes.size(), radius);
  std::vector<at::Tensor> grad_volumes;
  std::vector<void*> pointers;
  for (const at::Tensor& v : volumes) {
    grad_volumes.push_back(contiguous_device_gradient(v, need_volumes));
    pointers.push_back(grad_volumes.back().data_ptr());
  }
  at::Tensor grad_coords = contiguous_device_gradient(coords, need_coords);
  if (coords.numel() == 0) return {grad_volumes, grad_coords};
  const std::vector<Array> arrays = arrays_of(volumes);
  correlation_lookup_backward({window, array_of(grad), arrays.data(), need_volumes ? pointers.data() : nullptr,
                               need_coords ? grad_coords.data_ptr() : nullptr},
                              scope.stream());
  return {grad_volumes, grad_coords};
}

// ---- on demand ----

// The same map with the channels of a pixel contiguous and no gaps between rows: a copy where it is not so.
at::Tensor rows(const at::Tensor& t) {
  const bool as_it_is = t.stride(1) == 1 && t.stride(2) == t.size(3) * t.stride(3);
  return as_it_is ? t : t.movedim(1, -1).contiguous().movedim(-1, 1);
}

at::Tensor empty_rows(const at::Tensor& like) {
  return at::empty({like.size(0), like.size(2), like.size(3), like.size(1)}, like.options()).movedim(-1, 1);
}

std::vector<at::Tensor> all_rows(at::TensorList tensors) {
  std::vector<at::Tensor> found;
  for (const at::Tensor& t : tensors) found.push_back(rows(t));
  return found;
}

at::Tensor on_demand(const at::Tensor& features1_, at::TensorList features2_, const at::Tensor& coords_, i64 radius) {
  const DeviceScope scope({features1_, features2_, coords_});
  const at::Tensor coords = coords_.contiguous();
  const LookupWindow window = window_of(coords, features2_.size(), radius);
  at::Tensor output = empty_output(window, features1_.options());
  if (output.numel() == 0) return output;
  const at::Tensor features1 = rows(features1_);
  const std::vector<at::Tensor> features2 = all_rows(features2_);
  const std::vector<Array> arrays = arrays_of(features2);
  const at::Tensor patches = at::empty({correlation_patch_numbers(window)}, coords.options());
  correlation_on_demand_forward({window, array_of(features1), arrays.data()}, output.data_ptr(), patches.data_ptr(),
                                scope.stream());
  return output;
}

// Sum over the pixels of zero times the features, [B,C].
at::Tensor zero_times(const at::Tensor& features, at::ScalarType dtype) {
  return (features.to(dtype) * 0).sum(at::IntArrayRef{2, 3});
}

std::tuple<at::Tensor, std::vector<at::Tensor>, at::Tensor> on_demand_backward(
    const at::Tensor& grad, const at::Tensor& features1_, at::TensorList features2_, const at::Tensor& coords_,
    i64 radius, bool need_features1, bool need_features2, bool need_coords) {
  const DeviceScope scope({grad, features1_, features2_, coords_});
  const at::Tensor coords = coords_.contiguous();
  const LookupWindow window = window_of(coords, features2_.size(), radius);
  at::Tensor grad_features1 = device_gradient(features1_, need_features1);
  std::vector<at::Tensor> grad_features2;
  for (const at::Tensor& f : features2_) grad_features2.push_back(device_gradient(f, need_features2));
  at::Tensor grad_coords = contiguous_device_gradient(coords, need_coords);
  if (coords.numel() == 0) {
    for (at::Tensor& g : grad_features2) g.zero_();
    return {grad_features1, grad_features2, grad_coords};
  }
  const at::Tensor features1 = rows(features1_);
  const std::vector<at::Tensor> features2 = all_rows(features2_);
  const std::vector<Array> arrays = arrays_of(features2);
  DeviceOnDemandBackward a = {};
  a.forward = {window, array_of(features1), arrays.data()};
  a.grad = array_of(grad);
  const i64 numbers = correlation_patch_numbers(window);
  at::Tensor patches, grad_patches, lists, undefined1, undefined2, target1;
  std::vector<at::Tensor> targets2;
  std::vector<Array> target_arrays;
  if (need_coords) {
    a.grad_coords = grad_coords.data_ptr();
    patches = at::empty({numbers}, coords.options());
    a.patches = patches.data_ptr();
  }
  if (need_features1 || need_features2) {
    grad_patches = at::empty({numbers}, coords.options());
    a.grad_patches = grad_patches.data_ptr();
  }
  if (need_features1) {
    target1 = grad_features1.stride(1) == 1 ? grad_features1 : empty_rows(grad_features1);
    a.grad_features1 = array_of(target1);
    undefined1 = zero_times(features2[0], coords.scalar_type());
    for (size_t level = 1; level < features2.size(); ++level)
      undefined1 += zero_times(features2[level], coords.scalar_type());
    a.undefined1 = undefined1.data_ptr();
  }
  if (need_features2) {
    for (const at::Tensor& g : grad_features2) targets2.push_back(g.stride(1) == 1 ? g : empty_rows(g));
    target_arrays = arrays_of(targets2);
    a.grad_features2 = target_arrays.data();
    lists = device_memory(correlation_list_bytes(a.forward), coords);
    a.lists = lists.data_ptr();
    undefined2 = zero_times(features1, coords.scalar_type());
    a.undefined2 = undefined2.data_ptr();
  }
  correlation_on_demand_backward(a, scope.stream());
  if (need_features1 && !target1.is_same(grad_features1)) grad_features1.copy_(target1);
  for (size_t level = 0; level < targets2.size(); ++level)
    if (!targets2[level].is_same(grad_features2[level])) grad_features2[level].copy_(targets2[level]);
  return {grad_features1, grad_features2, grad_coords};
}

}  // namespace

TORCH_LIBRARY_IMPL(gi, GI_DEVICE_KEY, m) {
  m.impl("correlation_lookup", forward);
  m.impl("correlation_lookup_backward", backward);
  m.impl("correlation_lookup_on_demand", on_demand);
  m.impl("correlation_lookup_on_demand_backward", on_demand_backward);
}

}  // namespace gi
