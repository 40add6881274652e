#include "product/kernel.h"

#include <type_traits>

#include "common/product.h"

GI_BEGIN_VARIANT

namespace {

// Blocks of the factors that stay in the second-level cache: kDepth x item_columns of B, packed, and
// kRows x kDepth of A.
constexpr i64 kDepth = 512;
constexpr i64 kRows = 128;

// Calls f with a pointer to element `offset` of a factor, of its type, which terms S are made of.
template <class S, class F>
void with_element(const ProductFactor& factor, i64 offset, F&& f) {
  with_dtype(factor.dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (std::is_same_v<typename Accumulate<T>::type, S> || std::is_same_v<typename Terms<T>::type, S>)
      f(static_cast<const T*>(factor.data) + offset);
  });
}

// Rows of a left factor: where they are, if a step through the depth stays near, else copied.
template <class S>
Factor<S> left_factor(const ProductFactor& factor, i64 offset, i64 rows, i64 depth, Scratch& memory) {
  constexpr i64 kNear = 4096 / i64(sizeof(S));
  const bool stored_as_used = factor.dtype == (sizeof(S) == sizeof(double) ? Dtype::f64 : Dtype::f32);
  if (stored_as_used && (factor.depth == 1 || (factor.outer == 1 && factor.depth <= kNear)))
    return {static_cast<const S*>(factor.data) + offset, factor.outer, factor.depth};
  const i64 stride = padded_terms<S>(depth);
  memory.reserve(kRows * stride * i64(sizeof(S)));
  with_element<S>(factor, offset, [&](auto* a) {
    pack_rows(a, factor.depth, factor.outer, depth, rows, memory.as<S>(), stride);
  });
  return {memory.as<S>(), stride, 1};
}

// multiply() for a block of C that does not end with a whole panel: that writes whole ones.
template <class S>
void multiply_edge(i64 rows, i64 columns, i64 depth, const Factor<S>& a, const Panels<S>& b, Sum<S>* c, i64 c_row,
                   Into into, Scratch& memory) {
  using A = Sum<S>;
  const i64 width = paneled<S>(columns);
  memory.reserve(kRows * width * i64(sizeof(A)));
  A* block = memory.as<A>();
  if (into == Into::add) {
    std::memset(block, 0, rows * width * sizeof(A));
    for (i64 r = 0; r < rows; ++r) std::memcpy(block + r * width, c + r * c_row, columns * sizeof(A));
  }
  multiply<S>(rows, columns, depth, a, b, block, width, into);
  for (i64 r = 0; r < rows; ++r) std::memcpy(c + r * c_row, block + r * width, columns * sizeof(A));
}

i64 pieces(i64 size, i64 piece) { return (size + piece - 1) / piece; }

template <class S>
void multiply_typed(const Product& p, i64 begin, i64 end) {
  using A = Sum<S>;
  const i64 row_items = pieces(p.rows, p.item_rows), column_items = pieces(p.columns, p.item_columns);
  const i64 most_columns = paneled<S>(minimum(p.item_columns, p.columns));
  Scratch panels(terms<S>(minimum(kDepth, p.depth)) * most_columns * i64(sizeof(S))), left, edge;
  for (i64 item = begin; item < end; ++item) {
    const i64 n0 = item % column_items * p.item_columns, columns = minimum(p.item_columns, p.columns - n0);
    const i64 m0 = item / column_items % row_items * p.item_rows, m1 = minimum(p.rows, m0 + p.item_rows);
    const i64 i = item / column_items / row_items;
    const bool whole = columns % kPanel<S> == 0;
    for (i64 s = 0; s < p.sums; ++s)
      for (i64 k0 = 0; k0 == 0 || k0 < p.depth; k0 += kDepth) {
        const i64 depth = minimum(kDepth, p.depth - k0);
        const i64 a = i * p.a.batch + s * p.a.sum + k0 * p.a.depth, b = i * p.b.batch + s * p.b.sum + k0 * p.b.depth;
        const Into into = p.add || s > 0 || k0 > 0 ? Into::add : Into::overwrite;
        with_element<S>(p.b, b + n0 * p.b.outer, [&](auto* data) {
          pack_panels(data, p.b.depth, p.b.outer, depth, columns, panels.as<S>());
        });
        for (i64 m = m0; m < m1; m += kRows) {
          const i64 rows = minimum(kRows, m1 - m);
          const auto factor = left_factor<S>(p.a, a + m * p.a.outer, rows, depth, left);
          const Panels<S> right{panels.as<S>(), terms<S>(depth) * kPanel<S>};
          A* c = static_cast<A*>(p.c) + i * p.c_batch + m * p.c_row + n0;
          if (whole) multiply<S>(rows, columns, depth, factor, right, c, p.c_row, into);
          else multiply_edge<S>(rows, columns, depth, factor, right, c, p.c_row, into, edge);
        }
      }
  }
}

i64 items(const Product& p) {
  return p.batch * pieces(p.rows, p.item_rows) * pieces(p.columns, p.item_columns);
}

void multiply(const Product& p, i64 begin, i64 end) {
  if (p.a.dtype == Dtype::f64) multiply_typed<double>(p, begin, end);
  else if (p.a.dtype == Dtype::bf16 && p.b.dtype == Dtype::bf16)
    multiply_typed<typename Terms<bf16>::type>(p, begin, end);
  else multiply_typed<float>(p, begin, end);
}

}  // namespace

extern const ProductKernels product_kernels;
const ProductKernels product_kernels = {items, multiply};

GI_END_VARIANT
