// Pairs of bfloat16 numbers, for the instruction that multiplies them twice as fast as float32 is: each of
// its 32-bit lanes adds the two products of a pair by a pair to a float32 sum. It takes subnormal numbers for
// zeros and rounds to nearest even, whatever the CPU's modes are; so does the conversion from float32.
#pragma once

#include "common/staging.h"

#if defined(__AVX512BF16__)

GI_BEGIN_VARIANT

// Two numbers that follow each other along the summed index, the first in the low half. After the last
// number of an odd count comes a zero.
struct Pair {
  uint32_t bits;
};

constexpr i64 pairs(i64 numbers) { return (numbers + 1) / 2; }

GI_HOST_DEVICE Vec<float> add_products(const Vec<float>& sum, __m512i a, __m512i b) {
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

// The first `count` of some numbers, then zeros; memory beyond is not touched.
GI_HOST_DEVICE __m512i first_of(const bf16* p, i64 count) {
  const __mmask32 mask = count >= 32 ? ~__mmask32(0) : (__mmask32(1) << maximum<i64>(count, 0)) - 1;
  return _mm512_maskz_loadu_epi16(mask, p);
}
GI_HOST_DEVICE __m512 first_of(const float* p, i64 count) {
  const __mmask16 mask = count >= 16 ? 0xffff : (1u << maximum<i64>(count, 0)) - 1;
  return _mm512_maskz_loadu_ps(mask, p);
}

// Lane i pairs number i of the low half with number i of the high half.
GI_HOST_DEVICE __m512i pair_halves(__m512i numbers) {
  const __m512i even = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                        23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(even, numbers);
}

// Pairs along a row of float32 numbers, which may be where they come from. Whole vectors of 16 pairs are written.
inline void pairs_along(const float* source, i64 count, Pair* out) {
  for (i64 i = 0; i < count; i += 32)
    _mm512_storeu_si512(out + i / 2, (__m512i)_mm512_cvtne2ps_pbh(first_of(source + i + 16, count - i - 16),
                                                                  first_of(source + i, count - i)));
}

// Sum of the numbers of a row that pairs_along() wrote.
inline float sum_pairs(const Pair* row, i64 count) {
  Vec<float> sum = {};
  for (i64 p = 0; p < pairs(count); p += 16)
    sum = add_products(sum, _mm512_loadu_si512(row + p), _mm512_set1_epi32(0x3f803f80));  // pairs of ones
  return sum_lanes<float>(sum);
}

// ---- from bfloat16 arrays of any strides ----

// Sixteen columns of pairs: row p of `out` holds pair p, numbers 2p and 2p+1, of each column. Columns beyond
// `columns` are zero.
inline void pair_columns(const bf16* source, i64 depth_stride, i64 column_stride, i64 depth, i64 columns, Pair* out,
                         i64 out_stride) {
  const i64 rows = pairs(depth);
  if (depth_stride == 1) {
    for (i64 p = 0; p < rows; p += 16) {
      Vec<float> block[16];
      for (i64 c = 0; c < 16; ++c)
        block[c] = (Vec<float>)(c < columns ? first_of(source + c * column_stride + 2 * p, depth - 2 * p)
                                            : _mm512_setzero_si512());
      transpose<float>(block);
      for (i64 i = 0; i < minimum<i64>(16, rows - p); ++i) store<float>((float*)(out + (p + i) * out_stride), block[i]);
    }
    return;
  }
  for (i64 p = 0; p < rows; ++p, source += 2 * depth_stride, out += out_stride) {
    const bool both = 2 * p + 1 < depth;
    if (column_stride == 1) {
      const __m512i low = first_of(source, minimum<i64>(16, columns));
      const __m512i high = both ? first_of(source + depth_stride, minimum<i64>(16, columns)) : _mm512_setzero_si512();
      _mm512_storeu_si512(out, pair_halves(_mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1)));
      continue;
    }
    for (i64 c = 0; c < 16; ++c) {
      const bf16* at = source + c * column_stride;
      out[c].bits = c < columns ? at->bits | uint32_t(both ? at[depth_stride].bits : 0) << 16 : 0;
    }
  }
}

// Rows of pairs <- element (r, k) at source[r * row_stride + k * depth_stride], two along the depth in a pair.
// Rows of `out` hold whole vectors of 16 pairs; what comes after the last number is zero.
inline void pack_rows(const bf16* source, i64 depth_stride, i64 row_stride, i64 depth, i64 rows, Pair* out,
                      i64 out_stride) {
  for (i64 r = 0; r < rows; r += depth_stride == 1 ? 1 : 16)
    for (i64 p = 0; p < out_stride; p += 16) {
      const bf16* at = source + r * row_stride + 2 * p * depth_stride;
      if (depth_stride == 1) {
        _mm512_storeu_si512(out + r * out_stride + p, first_of(at, depth - 2 * p));
        continue;
      }
      Vec<float> block[16] = {};
      const i64 count = minimum<i64>(16, rows - r);
      pair_columns(at, depth_stride, row_stride, minimum<i64>(32, depth - 2 * p), count, (Pair*)block, 16);
      transpose<float>(block);
      for (i64 i = 0; i < count; ++i) store<float>((float*)(out + (r + i) * out_stride + p), block[i]);
    }
}

GI_END_VARIANT

#endif
