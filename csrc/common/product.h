// Matrix products on blocks that fit the caches: the inner part of attention and of projections.
//
// A block of C [rows, columns] is the product of A [rows, depth], read where it is at any strides,
// and B [depth, columns], packed into panels of kPanel columns. A tile of C stays in registers while
// the depth is walked; a panel stays in the first-level cache while the rows are.
//
// The factors are made of "terms": numbers in accumulation type, or Pairs of bfloat16 numbers along the
// depth where the instruction set multiplies these.
#pragma once

#include <type_traits>

#include "common/pairs.h"
#include "common/staging.h"

GI_BEGIN_VARIANT

template <class S> struct TermTraits {
  using Sum = S;
  using Vector = Vec<S>;
  static constexpr i64 numbers = 1;

  static GI_HOST_DEVICE Vector load(const S* p) { return gi::GI_VARIANT::load<S>(p); }
  static GI_HOST_DEVICE Vector splat(S s) { return gi::GI_VARIANT::splat<S>(s); }
  static GI_HOST_DEVICE Vec<S> add(const Vec<S>& sum, const Vector& a, const Vector& b) { return sum + a * b; }
};

// The terms that arrays of T are multiplied as.
template <class T> struct Terms {
  using type = typename Accumulate<T>::type;
};

#if defined(__AVX512BF16__)
template <> struct TermTraits<Pair> {
  using Sum = float;
  using Vector = __m512i;
  static constexpr i64 numbers = 2;

  static GI_HOST_DEVICE Vector load(const Pair* p) { return _mm512_loadu_si512(p); }
  static GI_HOST_DEVICE Vector splat(Pair p) { return _mm512_set1_epi32(int(p.bits)); }
  static GI_HOST_DEVICE Vec<float> add(const Vec<float>& sum, Vector a, Vector b) { return add_products(sum, a, b); }
};

template <> struct Terms<bf16> {
  using type = Pair;
};
#endif

// What products of terms are summed in.
template <class S> using Sum = typename TermTraits<S>::Sum;

// Terms of `depth` numbers.
template <class S> GI_HOST_DEVICE i64 terms(i64 depth) {
  return (depth + TermTraits<S>::numbers - 1) / TermTraits<S>::numbers;
}

// Terms of a row of `depth` numbers, filled up to whole vectors.
template <class S> GI_HOST_DEVICE i64 padded_terms(i64 depth) { return padded<Sum<S>>(terms<S>(depth)); }

// Vectors side by side in a tile. With kTileRows rows of them the accumulators fill most of the
// registers, and every loaded term of A and vector of B is used several times.
constexpr int kTileVectors = 2;
#if defined(__AVX512F__)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif

template <class S> constexpr i64 kPanel = kTileVectors * kLanes<Sum<S>>;

// Columns rounded up to whole panels.
template <class S> GI_HOST_DEVICE i64 paneled(i64 columns) {
  return (columns + kPanel<S> - 1) / kPanel<S> * kPanel<S>;
}

// Rows of a left factor <- A: element (m, k) at source[m * row_stride + k * depth_stride]. Rows of `out` hold
// whole vectors; what comes after the last number is zero.
template <class A, class T>
inline void pack_rows(const T* source, i64 depth_stride, i64 row_stride, i64 depth, i64 rows, A* out, i64 out_stride) {
  stage_row<A, T>(source, depth_stride, row_stride, depth, rows, out, out_stride);
}

// Panels <- B: element (k, n) at source[k * depth_stride + n * column_stride]. Panel j holds columns
// [j * kPanel, (j + 1) * kPanel) of all terms(depth) rows; columns beyond the last are zero.
template <class A, class T>
inline void pack_panels(const T* source, i64 depth_stride, i64 column_stride, i64 depth, i64 columns, A* panels) {
  for (i64 n = 0; n < columns; n += kPanel<A>, panels += depth * kPanel<A>)
    stage_row<A, T>(source + n * column_stride, column_stride, depth_stride, minimum(kPanel<A>, columns - n), depth,
                    panels, kPanel<A>);
}

#if defined(__AVX512BF16__)
inline void pack_panels(const bf16* source, i64 depth_stride, i64 column_stride, i64 depth, i64 columns,
                        Pair* panels) {
  for (i64 n = 0; n < columns; n += kPanel<Pair>, panels += pairs(depth) * kPanel<Pair>)
    for (i64 v = 0; v < kPanel<Pair>; v += 16)
      pair_columns(source + (n + v) * column_stride, depth_stride, column_stride, depth, columns - n - v, panels + v,
                   kPanel<Pair>);
}
#endif

template <class S> struct Factor {
  const S* data;
  i64 row, depth;  // strides, in terms
};

template <class S> struct Panels {
  const S* data;
  i64 stride;  // between panels, in terms; the rows of a panel follow each other
};

// `rows` rows of sums as the left factor of the next product; rounded in place where terms are not sums.
template <class S>
inline Factor<S> as_factor(Sum<S>* sums, i64 sums_row, [[maybe_unused]] i64 rows, [[maybe_unused]] i64 columns) {
  S* terms = reinterpret_cast<S*>(sums);
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<S, Pair>)
    for (i64 r = 0; r < rows; ++r) pairs_along(sums + r * sums_row, columns, terms + r * sums_row);
#endif
  return {terms, sums_row, 1};
}

enum class Into { overwrite, add };

template <int R> struct Height {
  static constexpr int value = R;
};

// Part of a panel that is fetched into the second-level cache while a tile is computed: `step` terms for each
// term of the depth.
template <class S> struct Ahead {
  const S* data;
  i64 step;
};

template <int R, class S>
GI_HOST_DEVICE void multiply_tile(const S* a, const Factor<S>& f, const S* panel, i64 count, Sum<S>* c, i64 c_row,
                                  Into into, const Ahead<S>& ahead) {
  using A = Sum<S>;
  using Term = TermTraits<S>;
  constexpr i64 L = kLanes<A>;
  Vec<A> sum[R][kTileVectors];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kTileVectors; ++v)
      sum[r][v] = into == Into::add ? load<A>(c + r * c_row + v * L) : Vec<A>{};
  for (i64 k = 0; k < count; ++k, panel += kPanel<S>) {
    __builtin_prefetch(ahead.data + k * ahead.step, 0, 2);
    typename Term::Vector b[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) b[v] = Term::load(panel + v * L);
    for (int r = 0; r < R; ++r) {
      const auto s = Term::splat(a[r * f.row + k * f.depth]);
      for (int v = 0; v < kTileVectors; ++v) sum[r][v] = Term::add(sum[r][v], s, b[v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kTileVectors; ++v) store<A>(c + r * c_row + v * L, sum[r][v]);
}

// C = A B, or C += A B, over `depth` numbers. Rows of C hold whole panels: what the columns beyond the last
// receive is zero. `after`: the panel that the next call begins with, if that is known; panels that come from
// memory are fetched while the ones before them are multiplied.
template <class S>
inline void multiply(i64 rows, i64 columns, i64 depth, const Factor<S>& a, const Panels<S>& b, Sum<S>* c, i64 c_row,
                     Into into, const S* after = nullptr) {
  const i64 shares = maximum<i64>(1, rows / kTileRows), step = maximum<i64>(1, kPanel<S> / shares);
  for (i64 n = 0; n < columns; n += kPanel<S>) {
    const S* panel = b.data + n / kPanel<S> * b.stride;
    const S* next = n + kPanel<S> < columns ? panel + b.stride : after;
    const auto tile = [&](auto height, i64 m) {
      const i64 share = minimum(m / kTileRows, shares - 1);
      const Ahead<S> ahead = next ? Ahead<S>{next + share * step * terms<S>(depth), step} : Ahead<S>{panel, 0};
      multiply_tile<decltype(height)::value, S>(a.data + m * a.row, a, panel, terms<S>(depth), c + m * c_row + n, c_row,
                                                into, ahead);
    };
    i64 m = 0;
    for (; m + kTileRows <= rows; m += kTileRows) tile(Height<kTileRows>{}, m);
    if (kTileRows > 4 && m + 4 <= rows) tile(Height<4>{}, m), m += 4;
    if (m + 2 <= rows) tile(Height<2>{}, m), m += 2;
    if (m < rows) tile(Height<1>{}, m);
  }
}

GI_END_VARIANT
