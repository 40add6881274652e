// Matrix products of tensors by our kernels: PyTorch's float32 products run at half the speed of these
// on some CPUs, cannot add to a part of a tensor, and copy what they do not find as they want it.
#pragma once

#include "common/binding.h"
#include "product/kernel.h"

namespace gi {

// c [I,M,N] = a [I,S,M,K] times b [I,S,K,N], summed over S; or added to c. c is in the accumulation
// type of a and b, its columns contiguous; a and b may be expanded.
inline void multiply(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool add) {
  if (c.numel() == 0) return;
  Product p;
  p.batch = c.size(0);
  p.sums = a.size(1);
  p.rows = c.size(1);
  p.columns = c.size(2);
  p.depth = a.size(3);
  p.a = {a.const_data_ptr(), dtype_of(a), a.stride(0), a.stride(1), a.stride(2), a.stride(3)};
  p.b = {b.const_data_ptr(), dtype_of(b), b.stride(0), b.stride(1), b.stride(3), b.stride(2)};
  p.c = c.data_ptr();
  p.c_batch = c.stride(0);
  p.c_row = c.stride(1);
  p.add = add;
  // A piece of work packs its part of b: over many rows if there are many, for little of b if not.
  p.item_rows = 512;
  p.item_columns = p.rows > p.item_rows ? 256 : 64;
  const auto& kernels = product_kernels_for_this_cpu();
  run_items(kernels.items(p), kernels.multiply, p);
}

// pixels [N,1,P,C] times the transpose of weights [O,C] -> [N,P,O], by PyTorch, whose low-precision
// products are the fastest. As one product of rows: more dimensions may be folded, or not, and rounded
// accordingly.
inline at::Tensor project_low(const at::Tensor& pixels, const at::Tensor& weights) {
  const i64 N = pixels.size(0), P = pixels.size(2), C = pixels.size(3);
  return at::linear(pixels.reshape({N * P, C}), weights).view({N, P, weights.size(0)});
}

// Whether sums are kept in a wider type than the tensor's own.
inline bool is_low(const at::Tensor& t) { return t.scalar_type() != accumulation_type(t); }

}  // namespace gi
