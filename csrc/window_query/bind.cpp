#include "common/binding.h"
#include "window_query/kernel.h"

namespace gi {
namespace {

at::Tensor forward(const at::Tensor& features, const at::Tensor& queries, int64_t rows, int64_t columns) {
  at::Tensor output = empty_result({features.size(0), rows * columns, queries.size(0), features.size(1)},
                                   features.options());
  if (output.numel() == 0) return output;
  const auto& kernels = window_query_kernels_for_this_cpu();
  const WindowQueryForward a{array_of(features), array_of(queries), rows, columns, array_of(output)};
  run_items(kernels.forward_items(a), kernels.forward, a);
  return output;
}

std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad, const at::Tensor& features,
                                            const at::Tensor& queries, int64_t rows, int64_t columns,
                                            bool need_features, bool need_queries) {
  at::Tensor grad_features = empty_gradient(features, need_features);
  at::Tensor grad_queries = empty_contiguous_gradient(queries, need_queries);
  if (grad.numel() == 0) return {grad_features.zero_(), grad_queries.zero_()};
  const auto& kernels = window_query_kernels_for_this_cpu();
  WindowQueryBackward a{array_of(grad), array_of(features), array_of(queries), rows, columns, {}, {}};
  if (need_features) a.grad_features = array_of(grad_features);
  const i64 items = kernels.backward_items(a);
  at::Tensor query_sums;
  if (need_queries) {
    query_sums = at::empty({items, queries.size(0), queries.size(1)},
                           queries.options().dtype(accumulation_type(queries)));
    a.query_sums = array_of(query_sums);
  }
  run_items(items, kernels.backward, a);
  if (need_queries) grad_queries.copy_(query_sums.sum(0));
  return {grad_features, grad_queries};
}

}  // namespace

TORCH_LIBRARY_IMPL(gi, CPU, m) {
  m.impl("window_query", forward);
  m.impl("window_query_backward", backward);
}

}  // namespace gi
