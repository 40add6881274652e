// Unit test of the matrix products, built once per instruction set; no torch, no framework.
#include <cmath>
#include <cstdio>
#include <vector>

#include "common/product.h"

using namespace gi;
using namespace gi::GI_VARIANT;

static int failures = 0;

static void expect(bool ok, const char* what, i64 rows, i64 columns, i64 depth) {
  if (ok) return;
  if (++failures < 20) std::printf("FAILED: %s, %d x %d x %d\n", what, int(rows), int(columns), int(depth));
}

// Small numbers that are exact in every type, so that sums of their products are too.
template <class T> static std::vector<T> numbers(i64 count, i64 seed) {
  std::vector<T> all(count);
  for (i64 i = 0; i < count; ++i) all[i] = Rounded<T>::from(float((i + seed) * 37 % 29 - 14) / 4);
  return all;
}

// Arrays have `gap` numbers between neighbours; the summed index comes first where they are `turned`.
template <class T> static void test_product(i64 rows, i64 columns, i64 depth, i64 gap, bool turned) {
  using S = typename Terms<T>::type;
  using A = Sum<S>;
  const i64 a_row = gap * (turned ? 1 : depth), a_depth = gap * (turned ? rows : 1);
  const i64 b_column = gap * (turned ? 1 : depth), b_depth = gap * (turned ? columns : 1);
  const auto a = numbers<T>(gap * rows * depth, 0), b = numbers<T>(gap * columns * depth, 5);
  const i64 a_stride = padded_terms<S>(depth), width = paneled<S>(columns), panel = terms<S>(depth) * kPanel<S>;
  Scratch left(rows * a_stride * i64(sizeof(S))), right(width / kPanel<S> * panel * i64(sizeof(S))),
      result(rows * width * i64(sizeof(A)));
  std::memset(result.as<char>(), 0xff, rows * width * sizeof(A));  // NaN
  pack_rows(a.data(), a_depth, a_row, depth, rows, left.as<S>(), a_stride);
  pack_panels(b.data(), b_depth, b_column, depth, columns, right.as<S>());
  A* c = result.as<A>();
  for (const Into into : {Into::overwrite, Into::add}) {
    multiply<S>(rows, columns, depth, {left.as<S>(), a_stride, 1}, {right.as<S>(), panel}, c, width, into);
    for (i64 m = 0; m < rows; ++m)
      for (i64 n = 0; n < width; ++n) {
        A sum = 0;
        for (i64 k = 0; k < depth && n < columns; ++k)
          sum += to_accumulate(a[m * a_row + k * a_depth]) * to_accumulate(b[k * b_depth + n * b_column]);
        expect(c[m * width + n] == (into == Into::add ? 2 : 1) * sum, into == Into::add ? "sum" : "product", rows,
               columns, depth);
      }
  }
}

template <class T> static void test_products() {
  for (const i64 rows : {1, 15, 33})
    for (const i64 columns : {1, 16, 40, 64})
      for (const i64 depth : {1, 2, 31, 64, 67})
        for (const bool turned : {false, true})
          for (const i64 gap : {1, 3}) test_product<T>(rows, columns, depth, gap, turned);
}

#if defined(__AVX512BF16__)
// Rows of float32 numbers that become rows of pairs in place.
static void test_rounded_rows(i64 rows, i64 columns) {
  constexpr i64 stride = 64;
  float sums[9 * stride], given[9 * stride];
  for (i64 i = 0; i < 9 * stride; ++i) given[i] = 1 + float(i % 41) / 128 + float(i % 7) / 512;
  std::memcpy(sums, given, sizeof sums);
  const Factor<Pair> factor = as_factor<Pair>(sums, stride, rows, columns);
  for (i64 r = 0; r < rows; ++r) {
    float total = 0;
    for (i64 j = 0; j < columns + columns % 2; ++j) {
      const bf16 rounded = Rounded<bf16>::from(j < columns ? given[r * stride + j] : 0);
      const uint32_t pair = factor.data[r * factor.row + j / 2 * factor.depth].bits;
      expect(uint16_t(j % 2 ? pair >> 16 : pair) == rounded.bits, "rounded rows", r, j, columns);
      total += to_accumulate(rounded);
    }
    expect(std::fabs(sum_pairs(factor.data + r * factor.row, columns) - total) < 1e-4, "sum of a row", r, 0, columns);
  }
}
#endif

int main() {
#if defined(__AVX512BF16__)
  if (!__builtin_cpu_supports("avx512bf16")) {
    std::printf("skipped: this CPU does not multiply pairs of bfloat16 numbers\n");
    return 77;
  }
  for (const i64 columns : {1, 16, 31, 50, 64}) test_rounded_rows(9, columns);
#endif
  test_products<float>();
  test_products<double>();
  test_products<bf16>();
  test_products<f16>();
  std::printf(failures ? "%d failures\n" : "all passed\n", failures);
  return failures != 0;
}
