// Fourier transforms of real maps, orthonormal, rows and columns: arguments and the table of CPU kernels.
#pragma once

#include "common/platform.h"
#include "common/select.h"

namespace gi {

struct FourierTransform {
  Array map;       // [B,C,H,W], channels contiguous
  Array spectrum;  // [B,2C,H,W/2+1], channels contiguous: real and imaginary part of each channel side by side
  Array addend;    // like map, for the inverse to add to it; without data: none
  double inner;    // factor of the spectrum's columns that stand for two: neither the first nor, of even W, the last
};

// Work is cut into `items` independent pieces; a kernel does pieces [begin, end).
struct FourierKernels {
  i64 (*items)(const FourierTransform&);
  void (*forward)(const FourierTransform&, i64 begin, i64 end);  // spectrum <- map
  void (*inverse)(const FourierTransform&, i64 begin, i64 end);  // map <- spectrum
};

}  // namespace gi

GI_DECLARE_KERNELS(FourierKernels, fourier_kernels)
