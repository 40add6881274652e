#include "common/binding.h"
#include "fused_convolution/kernel.h"

namespace gi {
namespace {

// Scratch memory of a piece of work: what the second-level and a share of the third-level cache hold.
constexpr i64 kScratch = i64(3) << 20;

Taps taps_of(i64 height, i64 width) {
  if (height == 3 && width == 3) return Taps::three_by_three;
  if (height == 1 && width == 5) return Taps::one_by_five;
  TORCH_CHECK_VALUE(height == 5 && width == 1, "expected a kernel of 3x3, 1x5 or 5x1, got ", height, "x", width);
  return Taps::five_by_one;
}

// As few tiles for each piece of work as let all threads have one, as many as the scratch memory holds
// for one image, and the same for all pieces.
i64 item_tiles(const FusedConvolution& f, const FusedConvolutionKernels& kernels) {
  const i64 tiles = kernels.tiles(f), threads = at::get_num_threads();
  const i64 fair = (f.output.size[0] * tiles + threads - 1) / threads;
  const i64 most = std::max<i64>(8, std::min(fair, kScratch / std::max<i64>(1, kernels.tile_bytes(f))));
  const i64 runs = (tiles + most - 1) / most;
  return std::max<i64>(1, (tiles + runs - 1) / runs);
}

// Channels are contiguous, but for a map of one channel, where any stride will do.
at::Tensor with_contiguous_channels(const at::Tensor& t) {
  return t.stride(1) == 1 || t.size(1) <= 1 ? t : t.contiguous(at::MemoryFormat::ChannelsLast);
}

at::Tensor pack(const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const auto& kernels = fused_convolution_kernels_for_this_cpu();
  ConvolutionWeight w;
  w.weight = array_of(weight);
  if (bias) w.bias = array_of(*bias);
  w.taps = taps_of(weight.size(2), weight.size(3));
  const i64 numbers = kernels.packed_size(w.taps, w.weight.dtype, weight.size(1), weight.size(0));
  const at::Tensor packed = empty_result({numbers}, weight.options().dtype(accumulation_type(weight)));
  w.packed = packed.data_ptr();
  run_items(kernels.pack_items(w), kernels.pack, w);
  return packed;
}

at::Tensor convolve(const at::TensorList& inputs, const at::Tensor& packed, i64 channels, at::IntArrayRef size,
                    const std::optional<at::Tensor>& addend, i64 activation, bool reflect) {
  const auto& kernels = fused_convolution_kernels_for_this_cpu();
  TORCH_CHECK_VALUE(inputs.size() >= 1 && inputs.size() <= FusedConvolution::kMostInputs,
                    "inputs: expected 1 to 4, got ", inputs.size());
  const at::Tensor& like = inputs[0];
  const at::Tensor output = empty_result({like.size(0), channels, like.size(2), like.size(3)}, like.options(),
                                         at::MemoryFormat::ChannelsLast);
  if (output.numel() == 0) return output;
  std::vector<at::Tensor> maps;  // alive until the end
  FusedConvolution f;
  f.count = 0;
  for (const at::Tensor& input : inputs) {
    if (input.size(1) == 0) continue;  // has no memory to point at
    maps.push_back(with_contiguous_channels(input));
    f.inputs[f.count++] = array_of(maps.back());
  }
  if (addend) {
    maps.push_back(with_contiguous_channels(*addend));
    f.addend = array_of(maps.back());
  }
  i64 depth = 0;
  for (int i = 0; i < f.count; ++i) depth += f.inputs[i].size[1];
  f.output = array_of(output);
  f.taps = taps_of(size[0], size[1]);
  const i64 numbers = kernels.packed_size(f.taps, f.output.dtype, depth, channels);
  TORCH_CHECK_VALUE(packed.is_contiguous() && packed.scalar_type() == accumulation_type(like) && packed.numel() == numbers,
                    "packed: expected ", numbers, " numbers for inputs of ", like.scalar_type(), ", got ",
                    packed.numel(), " of ", packed.scalar_type());
  f.packed = packed.const_data_ptr();
  f.activation = static_cast<Activation>(activation);
  f.reflect = reflect;
  f.item_tiles = item_tiles(f, kernels);
  run_items(kernels.items(f), kernels.convolve, f);
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(gi, CPU, m) {
  m.impl("fused_convolution_pack", pack);
  m.impl("fused_convolution", convolve);
}

}  // namespace gi
