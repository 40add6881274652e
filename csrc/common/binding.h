// The torch side of a kernel: turning tensors into arrays and running pieces of work in parallel.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/platform.h"
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

// An uninitialised result with the layout of `t`. Large ones are put on huge pages where the system
// leaves that choice to programs: touching fresh 4 KiB pages would cost more than the kernel itself.
inline at::Tensor advise_huge_pages(at::Tensor t) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(t.data_ptr()) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(t.data_ptr()) + t.nbytes()) / kHuge * kHuge;
  if (end > begin + kHuge) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return t;
}

inline at::Tensor empty_output_like(const at::Tensor& t) { return advise_huge_pages(at::empty_like(t)); }

// An uninitialised gradient with the layout of `t`, or contiguous; with no element where none is
// wanted: operators cannot return nothing.
inline at::Tensor empty_gradient(const at::Tensor& t, bool wanted) {
  return wanted ? empty_output_like(t) : at::empty({0}, t.options());
}

inline at::Tensor empty_contiguous_gradient(const at::Tensor& t, bool wanted) {
  return wanted ? advise_huge_pages(at::empty(t.sizes(), t.options())) : at::empty({0}, t.options());
}

// Runs kernel(arguments, begin, end) over [0, items) on torch's threads.
template <class Kernel, class Arguments>
void run_items(i64 items, Kernel kernel, const Arguments& arguments) {
  at::parallel_for(0, items, 1, [&](i64 begin, i64 end) { kernel(arguments, begin, end); });
}

}  // namespace gi
