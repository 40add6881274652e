// The torch side of a kernel: turning tensors into arrays and running pieces of work in parallel.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "common/platform.h"
#include "common/result_memory.h"
#include "common/select.h"

namespace gi {

inline Dtype dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return Dtype::f32;
    case at::kDouble: return Dtype::f64;
    case at::kBFloat16: return Dtype::bf16;
    case at::kHalf: return Dtype::f16;
    default: TORCH_CHECK_TYPE(false, "expected a floating tensor, got ", t.scalar_type());
  }
}

inline at::ScalarType accumulation_type(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline Array array_of(const at::Tensor& t) {
  TORCH_CHECK(t.dim() <= 6, "expected at most 6 dimensions");
  Array a;
  a.data = t.data_ptr();
  a.dtype = dtype_of(t);
  for (int i = 0; i < t.dim(); ++i) {
    a.size[i] = t.size(i);
    a.stride[i] = t.stride(i);
  }
  return a;
}

// An uninitialised gradient with the layout of `t`, or contiguous; with no element where none is
// wanted: operators cannot return nothing.
inline at::Tensor empty_gradient(const at::Tensor& t, bool wanted) {
  return wanted ? empty_result_like(t) : at::empty({0}, t.options());
}

inline at::Tensor empty_contiguous_gradient(const at::Tensor& t, bool wanted) {
  return wanted ? empty_result(t.sizes(), t.options()) : at::empty({0}, t.options());
}

// Runs kernel(arguments, begin, end) over [0, items) on torch's threads.
template <class Kernel, class Arguments>
void run_items(i64 items, Kernel kernel, const Arguments& arguments) {
  at::parallel_for(0, items, 1, [&](i64 begin, i64 end) { kernel(arguments, begin, end); });
}

}  // namespace gi
