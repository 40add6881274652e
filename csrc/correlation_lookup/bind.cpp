#include <vector>

#include "common/binding.h"
#include "correlation_lookup/kernel.h"

namespace gi {
namespace {

i64 channels_of(i64 levels, i64 radius) { return levels * (2 * radius + 1) * (2 * radius + 1); }

LookupWindow window_of(const at::Tensor& coords, size_t levels, i64 radius) {
  return {coords.const_data_ptr(), coords.size(0), coords.size(2), coords.size(3), int(levels), int(radius)};
}

at::Tensor empty_output(const LookupWindow& w, const at::TensorOptions& options) {
  return empty_result({w.batch, channels_of(w.levels, w.radius), w.height, w.width}, options,
                      at::MemoryFormat::ChannelsLast);
}

std::vector<Array> arrays_of(at::TensorList tensors) {
  std::vector<Array> arrays;
  for (const at::Tensor& t : tensors) arrays.push_back(array_of(t));
  return arrays;
}

at::Tensor forward(at::TensorList volumes, const at::Tensor& coords_, i64 radius) {
  const at::Tensor coords = coords_.contiguous();
  const LookupWindow window = window_of(coords, volumes.size(), radius);
  at::Tensor output = empty_output(window, volumes[0].options());
  if (output.numel() == 0) return output;
  const auto& kernels = correlation_lookup_kernels_for_this_cpu();
  const std::vector<Array> arrays = arrays_of(volumes);
  const LookupForward a{window, arrays.data(), output.data_ptr()};
  run_items(kernels.runs(window), kernels.forward, a);
  return output;
}

std::tuple<std::vector<at::Tensor>, at::Tensor> backward(const at::Tensor& grad, at::TensorList volumes,
                                                         const at::Tensor& coords_, i64 radius,
                                                         bool need_volumes, bool need_coords) {
  const at::Tensor coords = coords_.contiguous();
  const LookupWindow window = window_of(coords, volumes.size(), radius);
  std::vector<at::Tensor> grad_volumes;
  std::vector<void*> pointers;
  for (const at::Tensor& v : volumes) {
    grad_volumes.push_back(empty_contiguous_gradient(v, need_volumes));
    pointers.push_back(grad_volumes.back().data_ptr());
  }
  at::Tensor grad_coords = empty_contiguous_gradient(coords, need_coords);
  if (coords.numel() == 0) return {grad_volumes, grad_coords};
  const auto& kernels = correlation_lookup_kernels_for_this_cpu();
  const std::vector<Array> arrays = arrays_of(volumes);
  const LookupBackward a{window, array_of(grad), arrays.data(), need_volumes ? pointers.data() : nullptr,
                         need_coords ? grad_coords.data_ptr() : nullptr};
  run_items(kernels.runs(window), kernels.backward, a);
  return {grad_volumes, grad_coords};
}

// The levels of the second features as rows, and the memory of those that had to be copied.
struct StagedFeatures {
  std::vector<FeatureRows> rows;
  std::vector<at::Tensor> memory;

  StagedFeatures(const CorrelationLookupKernels& kernels, at::TensorList features2) {
    for (const at::Tensor& f : features2) {
      const Array from = array_of(f);
      const i64 B = f.size(0), H = f.size(2), W = f.size(3);
      if (f.numel() == 0 || kernels.usable_rows(from)) {
        rows.push_back({from.data, from.stride[0], from.stride[2], from.stride[3], H, W});
        continue;
      }
      const i64 stride = kernels.padded_channels(from.dtype, f.size(1));
      memory.push_back(empty_result({B, H, W, stride}, f.options().dtype(accumulation_type(f))));
      const FeatureStaging a{from, memory.back().data_ptr()};
      run_items(B * H, kernels.stage, a);
      rows.push_back({a.to, H * W * stride, W * stride, stride, H, W});
    }
  }
};

at::Tensor on_demand(const at::Tensor& features1, at::TensorList features2, const at::Tensor& coords_,
                     i64 radius) {
  const at::Tensor coords = coords_.contiguous();
  const LookupWindow window = window_of(coords, features2.size(), radius);
  at::Tensor output = empty_output(window, features1.options());
  if (output.numel() == 0) return output;
  const auto& kernels = correlation_lookup_kernels_for_this_cpu();
  const StagedFeatures staged(kernels, features2);
  const OnDemandForward a{window, array_of(features1), staged.rows.data(), output.data_ptr()};
  run_items(kernels.runs(window), kernels.on_demand, a);
  return output;
}

std::tuple<at::Tensor, std::vector<at::Tensor>, at::Tensor> on_demand_backward(
    const at::Tensor& grad, const at::Tensor& features1, at::TensorList features2, const at::Tensor& coords_,
    i64 radius, bool need_features1, bool need_features2, bool need_coords) {
  const at::Tensor coords = coords_.contiguous();
  const LookupWindow window = window_of(coords, features2.size(), radius);
  at::Tensor grad_features1 = empty_gradient(features1, need_features1);
  std::vector<at::Tensor> grad_features2;
  for (const at::Tensor& f : features2) grad_features2.push_back(empty_gradient(f, need_features2));
  at::Tensor grad_coords = empty_contiguous_gradient(coords, need_coords);
  if (coords.numel() == 0) {
    for (at::Tensor& g : grad_features2) g.zero_();
    return {grad_features1, grad_features2, grad_coords};
  }
  const auto& kernels = correlation_lookup_kernels_for_this_cpu();
  OnDemandBackward a{window, array_of(grad), array_of(features1), nullptr, {}, nullptr, nullptr};
  if (need_features1) a.grad_features1 = array_of(grad_features1);
  if (need_coords) a.grad_coords = grad_coords.data_ptr();
  if (need_features1 || need_coords) {
    const StagedFeatures staged(kernels, features2);
    a.features2 = staged.rows.data();
    run_items(kernels.runs(window), kernels.on_demand_backward, a);
    a.features2 = nullptr;
  }
  if (need_features2) {
    const std::vector<Array> arrays = arrays_of(grad_features2);
    a.grad_features2 = arrays.data();
    run_items(kernels.scatter_items(a), kernels.scatter, a);
  }
  return {grad_features1, grad_features2, grad_coords};
}

}  // namespace

TORCH_LIBRARY_IMPL(gi, CPU, m) {
  m.impl("correlation_lookup", forward);
  m.impl("correlation_lookup_backward", backward);
  m.impl("correlation_lookup_on_demand", on_demand);
  m.impl("correlation_lookup_on_demand_backward", on_demand_backward);
}

}  // namespace gi
