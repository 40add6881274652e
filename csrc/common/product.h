// Matrix products on blocks that fit the caches: the inner part of attention and of projections.
//
// A block of C [rows, columns] is the product of A [rows, depth], read where it is at any strides,
// and B [depth, columns], packed into panels of kPanel columns. A tile of C stays in registers while
// the depth is walked; a panel stays in the first-level cache while the rows are.
#pragma once

#include "common/staging.h"

GI_BEGIN_VARIANT

// Vectors side by side in a tile. With kTileRows rows of them the accumulators fill most of the
// registers, and every loaded number of A and vector of B is used several times.
constexpr int kTileVectors = 2;
#if defined(__AVX512F__)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif

template <class A> constexpr i64 kPanel = kTileVectors * kLanes<A>;

// Columns rounded up to whole panels.
template <class A> GI_HOST_DEVICE i64 paneled(i64 columns) {
  return (columns + kPanel<A> - 1) / kPanel<A> * kPanel<A>;
}

// Panels <- B: element (k, n) at source[k * k_stride + n * n_stride]. Panel j holds columns
// [j * kPanel, (j + 1) * kPanel) of all rows; columns beyond the last are zero.
template <class A, class T>
inline void pack_panels(const T* source, i64 k_stride, i64 n_stride, i64 depth, i64 columns, A* panels) {
  for (i64 n = 0; n < columns; n += kPanel<A>, panels += depth * kPanel<A>)
    stage_row<A, T>(source + n * n_stride, n_stride, k_stride, minimum(kPanel<A>, columns - n), depth, panels,
                    kPanel<A>);
}

template <class A> struct Factor {
  const A* data;
  i64 row, depth;  // strides
};

template <class A> struct Panels {
  const A* data;
  i64 stride;  // between panels; the rows of a panel follow each other
};

enum class Into { overwrite, add };

template <int R> struct Height {
  static constexpr int value = R;
};

template <int R, class A>
GI_HOST_DEVICE void multiply_tile(const A* a, const Factor<A>& f, const A* panel, i64 depth, A* c, i64 c_row, Into into) {
  constexpr i64 L = kLanes<A>;
  Vec<A> sum[R][kTileVectors];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kTileVectors; ++v)
      sum[r][v] = into == Into::add ? load<A>(c + r * c_row + v * L) : Vec<A>{};
  for (i64 k = 0; k < depth; ++k, panel += kPanel<A>) {
    Vec<A> b[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) b[v] = load<A>(panel + v * L);
    for (int r = 0; r < R; ++r) {
      const Vec<A> s = splat<A>(a[r * f.row + k * f.depth]);
      for (int v = 0; v < kTileVectors; ++v) sum[r][v] += s * b[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kTileVectors; ++v) store<A>(c + r * c_row + v * L, sum[r][v]);
}

// C = A B, or C += A B. Rows of C hold whole panels: what the columns beyond the last receive is zero.
template <class A>
inline void multiply(i64 rows, i64 columns, i64 depth, const Factor<A>& a, const Panels<A>& b, A* c, i64 c_row,
                     Into into) {
  for (i64 n = 0; n < columns; n += kPanel<A>) {
    const A* panel = b.data + n / kPanel<A> * b.stride;
    const auto tile = [&](auto height, i64 m) {
      multiply_tile<decltype(height)::value, A>(a.data + m * a.row, a, panel, depth, c + m * c_row + n, c_row, into);
    };
    i64 m = 0;
    for (; m + kTileRows <= rows; m += kTileRows) tile(Height<kTileRows>{}, m);
    if (kTileRows > 4 && m + 4 <= rows) tile(Height<4>{}, m), m += 4;
    if (m + 2 <= rows) tile(Height<2>{}, m), m += 2;
    if (m < rows) tile(Height<1>{}, m);
  }
}

GI_END_VARIANT
