#include "common/binding.h"
#include "fourier/kernel.h"

namespace gi {
namespace {

// Channels are contiguous, but for a map of one channel, where any stride will do.
at::Tensor with_contiguous_channels(const at::Tensor& t) {
  return t.stride(1) == 1 || t.size(1) <= 1 ? t : t.contiguous(at::MemoryFormat::ChannelsLast);
}

at::Tensor forward(const at::Tensor& x, double inner) {
  const i64 B = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  const at::Tensor spectrum = empty_result({B, 2 * C, H, W / 2 + 1}, x.options(), at::MemoryFormat::ChannelsLast);
  if (x.numel() == 0) return spectrum;
  const at::Tensor map = with_contiguous_channels(x);
  FourierTransform f{array_of(map), array_of(spectrum), {}, inner};
  const auto& kernels = fourier_kernels_for_this_cpu();
  run_items(kernels.items(f), kernels.forward, f);
  return spectrum;
}

at::Tensor inverse(const at::Tensor& spectrum, i64 width, const std::optional<at::Tensor>& addend, double inner) {
  const i64 B = spectrum.size(0), C = spectrum.size(1) / 2, H = spectrum.size(2);
  const at::Tensor map = empty_result({B, C, H, width}, spectrum.options(), at::MemoryFormat::ChannelsLast);
  if (map.numel() == 0) return map;
  const at::Tensor parts = with_contiguous_channels(spectrum);
  const at::Tensor given = addend ? with_contiguous_channels(*addend) : at::Tensor();
  FourierTransform f{array_of(map), array_of(parts), given.defined() ? array_of(given) : Array{}, inner};
  const auto& kernels = fourier_kernels_for_this_cpu();
  run_items(kernels.items(f), kernels.inverse, f);
  return map;
}

}  // namespace

TORCH_LIBRARY_IMPL(gi, CPU, m) {
  m.impl("fourier", forward);
  m.impl("fourier_inverse", inverse);
}

}  // namespace gi
