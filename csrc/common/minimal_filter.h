// Minimal filtering: M neighbouring results of a correlation with K taps from M + K - 1 products instead
// of M K, as
//   y = output ((weight g) * (input d)),
// d the M + K - 1 numbers under the taps (Winograd, "Arithmetic Complexity of Computations", 1980; in two
// dimensions Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015).
//
// The matrices evaluate polynomials at 0, at pairs of opposite points (rows 2i + 1 and
// 2i + 2) and at infinity. The points are
// few, near one and short binary fractions: rounding grows with their powers and their inverses'. The
// matrices of input and output hold exact numbers; that of the weight is applied in double precision.
#pragma once

#include <type_traits>

#include "common/simd.h"

GI_BEGIN_VARIANT

template <int M, int K> struct MinimalFilter {
  static constexpr int results = M, taps = K, size = M + K - 1;
  static constexpr int finite = size - 1;  // points; the last is infinity
  static_assert(size == 1 || size == 6 || size == 8 || size == 12, "points are chosen for these");

  double input[size][size] = {}, weight[size][K] = {}, output[M][size] = {};

  static constexpr double point(int j) {
    constexpr double kPairs6[] = {0.75, 1.5}, kPairs8[] = {0.5, 1, 2}, kPairs12[] = {0.375, 0.625, 1, 1.5, 2.5};
    if (j == 0) return 0;
    const double* pairs = size == 6 ? kPairs6 : size == 8 ? kPairs8 : kPairs12;
    return j % 2 ? pairs[(j - 1) / 2] : -pairs[(j - 1) / 2];
  }

  constexpr MinimalFilter() {
    for (int j = 0; j < size; ++j) {
      // Row j of the input's matrix: coefficients of the product of (x - p) over the other points p.
      double c[size + 1] = {1}, scale = 1, power = 1;
      for (int l = 0, degree = 0; l < finite; ++l) {
        if (l == j) continue;
        for (int k = ++degree; k > 0; --k) c[k] = c[k - 1] - point(l) * c[k];
        c[0] *= -point(l);
        if (j < finite) scale *= point(j) - point(l);
      }
      for (int k = 0; k < size; ++k) {
        input[j][k] = c[k];
        if (k < K) weight[j][k] = j < finite ? power / scale : k == K - 1;
        if (k < M) output[k][j] = j < finite ? power : k == M - 1;
        power *= j < finite ? point(j) : 1;
      }
    }
  }
};

// A sum of terms c x whose c the compiler knows once loops are unrolled: no operation for a zero, nor for
// the first term's addition.
template <class V> struct ConstantSum {
  V value{};
  bool started = false;

  GI_HOST_DEVICE void add(double c, const V& x) {
    using A = std::remove_cvref_t<decltype(x[0])>;
    if (c == 0) return;
    const V term = c == 1 ? x : x * A(c);
    value = started ? value + term : term;
    started = true;
  }
};

// sum_k row[k] v[k] over every `step`-th k.
template <int N, class V> GI_HOST_DEVICE V constant_row(const double (&row)[N], const V* v, int first, int step) {
  ConstantSum<V> sum;
#pragma GCC unroll 12
  for (int k = first; k < N; k += step) sum.add(row[k], v[k]);
  return sum.value;
}

// v <- input v. Rows of opposite points share their even and, but for the sign, their odd terms.
template <class F, class V> GI_HOST_DEVICE void transform_input(V (&v)[F::size]) {
  static constexpr F f;
  V out[F::size];
  if constexpr (F::finite > 0) out[0] = constant_row(f.input[0], v, 0, 1);
#pragma GCC unroll 12
  for (int i = 1; i < F::finite; i += 2) {
    const V even = constant_row(f.input[i], v, 0, 2), odd = constant_row(f.input[i], v, 1, 2);
    out[i] = even + odd;
    out[i + 1] = even - odd;
  }
  out[F::finite] = constant_row(f.input[F::finite], v, 0, 1);
#pragma GCC unroll 12
  for (int k = 0; k < F::size; ++k) v[k] = out[k];
}

// y <- output v. Even powers of opposite points are the same, odd ones opposite.
template <class F, class V> GI_HOST_DEVICE void transform_output(const V (&v)[F::size], V (&y)[F::results]) {
  static constexpr F f;
#pragma GCC unroll 12
  for (int m = 0; m < F::results; ++m) {
    ConstantSum<V> total;
    if constexpr (F::finite > 0) total.add(f.output[m][0], v[0]);
#pragma GCC unroll 12
    for (int i = 1; i < F::finite; i += 2) total.add(f.output[m][i], m % 2 ? v[i] - v[i + 1] : v[i] + v[i + 1]);
    total.add(f.output[m][F::finite], v[F::finite]);
    y[m] = total.value;
  }
}

// u <- weight g.
template <class F, class V> GI_HOST_DEVICE void transform_weight(const V (&g)[F::taps], V (&u)[F::size]) {
  static constexpr F f;
#pragma GCC unroll 12
  for (int r = 0; r < F::size; ++r) u[r] = constant_row(f.weight[r], g, 0, 1);
}

GI_END_VARIANT
