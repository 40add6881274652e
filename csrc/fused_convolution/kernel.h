// A convolution of maps side by side that keeps their size, with the sum and the activation that follow:
// arguments and the table of CPU kernels.
#pragma once

#include "common/platform.h"
#include "common/select.h"

namespace gi {

enum class Activation { none, relu, sigmoid, tanh };

// Kernels of these sizes are served, height x width.
enum class Taps { three_by_three, one_by_five, five_by_one };

struct FusedConvolution {
  static constexpr int kMostInputs = 4;
  Array inputs[kMostInputs];  // [N,C_i,H,W], channels contiguous
  int count;                  // of inputs
  Array addend;               // [N,O,H,W], channels contiguous; without data: none
  Array output;               // [N,O,H,W], channels contiguous
  const void* packed;         // by FusedConvolutionKernels::pack
  Taps taps;
  Activation activation;
  bool reflect;     // at the frame's border, instead of zeros outside
  i64 item_tiles;  // of one piece of work; they do not change the result
};

// The weight [O,C,h,w] and the bias [O], of any strides, without data: none.
struct ConvolutionWeight {
  Array weight, bias;
  Taps taps;
  void* packed;  // in accumulation type
};

struct FusedConvolutionKernels {
  // Numbers that a packed weight has.
  i64 (*packed_size)(Taps taps, Dtype dtype, i64 channels, i64 outputs);
  i64 (*pack_items)(const ConvolutionWeight&);
  void (*pack)(const ConvolutionWeight&, i64 begin, i64 end);
  i64 (*tiles)(const FusedConvolution&);       // of one image
  i64 (*tile_bytes)(const FusedConvolution&);  // of scratch memory, for one tile
  i64 (*items)(const FusedConvolution&);
  void (*convolve)(const FusedConvolution&, i64 begin, i64 end);
};

}  // namespace gi

GI_DECLARE_KERNELS(FusedConvolutionKernels, fused_convolution_kernels)
