// Vectors of float or double, as wide as the variant's registers, on GCC/Clang vector extensions.
// The same source serves SSE2, AVX2, AVX-512 and NEON.
#pragma once

#include "common/numbers.h"

#if defined(__AVX512F__)
#define GI_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define GI_VECTOR_BYTES 32
#else
#define GI_VECTOR_BYTES 16
#endif

#if defined(__SSE2__)
#include <immintrin.h>
#endif

GI_BEGIN_VARIANT

template <class A> struct SimdTypes;
template <> struct SimdTypes<float> {
  typedef float vector __attribute__((vector_size(GI_VECTOR_BYTES)));
  typedef int32_t integer __attribute__((vector_size(GI_VECTOR_BYTES)));
  typedef uint32_t bits __attribute__((vector_size(GI_VECTOR_BYTES)));
};
template <> struct SimdTypes<double> {
  typedef double vector __attribute__((vector_size(GI_VECTOR_BYTES)));
  typedef int64_t integer __attribute__((vector_size(GI_VECTOR_BYTES)));
  typedef uint64_t bits __attribute__((vector_size(GI_VECTOR_BYTES)));
};

template <class A> using Vec = typename SimdTypes<A>::vector;
template <class A> using IntVec = typename SimdTypes<A>::integer;
template <class A> using Bits = typename SimdTypes<A>::bits;  // wraps around
template <class A> constexpr int kLanes = GI_VECTOR_BYTES / sizeof(A);

typedef uint16_t HalfBits __attribute__((vector_size(GI_VECTOR_BYTES / 2)));
typedef uint32_t WordBits __attribute__((vector_size(GI_VECTOR_BYTES)));

template <class A> GI_HOST_DEVICE Vec<A> splat(A value) { return Vec<A>{} + value; }

// ---- loads and stores of kLanes<A> numbers, converting from and to the storage type ----

template <class A> GI_HOST_DEVICE Vec<A> load(const A* p) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class A> GI_HOST_DEVICE void store(A* p, const Vec<A>& v) { std::memcpy(p, &v, sizeof v); }

// Past the caches, where the system allows it and `p` is aligned to vectors: for results that would not
// stay there anyway, whose old content need not be read then. end_streaming() comes before others read.
template <class A> GI_HOST_DEVICE void stream(A* p, const Vec<A>& v) {
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)p, (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256((__m256i*)p, (__m256i)v);
#elif defined(__SSE2__)
  _mm_stream_si128((__m128i*)p, (__m128i)v);
#else
  store<A>(p, v);
#endif
}

GI_HOST_DEVICE void end_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <class A> GI_HOST_DEVICE Vec<A> load(const bf16* p) {
  HalfBits h;
  std::memcpy(&h, p, sizeof h);
  return bit_cast<Vec<float>>(__builtin_convertvector(h, WordBits) << 16);
}

// Round to nearest, ties to even; NaN stays NaN.
template <class A> GI_HOST_DEVICE void store(bf16* p, const Vec<float>& v) {
  const WordBits u = bit_cast<WordBits>(v);
  const WordBits rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const WordBits nan = (WordBits)(v != v);
  const WordBits bits = (nan & 0x7fc0u) | (~nan & rounded);
  const HalfBits h = __builtin_convertvector(bits, HalfBits);
  std::memcpy(p, &h, sizeof h);
}

template <class A> GI_HOST_DEVICE Vec<A> load(const f16* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_maskz_cvtph_ps(__mmask16(-1), _mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__) && defined(__AVX2__)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = scalar_from_half(p[i].bits);
  return v;
#endif
}

template <class A> GI_HOST_DEVICE void store(f16* p, const Vec<float>& v) {
#if defined(__AVX512F__)
  // With a full mask: GCC 12 warns of the undefined register inside the plain intrinsic.
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && defined(__AVX2__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i].bits = scalar_to_half(v[i]);
#endif
}

// ---- arithmetic ----

template <class A> GI_HOST_DEVICE Vec<A> vmax(const Vec<A>& a, const Vec<A>& b) { return a > b ? a : b; }

template <class A> GI_HOST_DEVICE A sum_lanes(const Vec<A>& v) {
  A total = 0;
  for (int i = 0; i < kLanes<A>; ++i) total += v[i];
  return total;
}

// e^x by reduction to r in [-ln2/2, ln2/2] and a polynomial of least relative error (by Remez's
// exchange, with the first two coefficients one): 3e-9 in float32, 4e-18 in float64. Below `lowest` the
// result is zero, above `highest` (a little under the overflow) infinite; NaN stays NaN.
template <class A> struct ExpConstants;
template <> struct ExpConstants<float> {
  static constexpr float lowest = -87.3f, highest = 88.3f, ln2_high = 0.693359375f,
                         ln2_low = -2.12194440e-4f, magic = 12582912.f;  // 1.5 * 2^23
  static constexpr int degree = 6, mantissa = 23;
  static constexpr float coefficient[degree + 1] = {
      1.f, 1.f, 0.49999993447796486827f, 0.16666520631709496887f, 0.041668388045313996659f,
      0.0083687168797281399469f, 0.0013814598646664034453f};
};
template <> struct ExpConstants<double> {
  static constexpr double lowest = -708.3, highest = 709.0, ln2_high = 6.93145751953125e-1,
                          ln2_low = 1.42860682030941723212e-6, magic = 6755399441055744.;  // 1.5 * 2^52
  static constexpr int degree = 11, mantissa = 52;
  static constexpr double coefficient[degree + 1] = {
      1., 1., 0.50000000000000106271, 0.16666666666666412523, 0.041666666666530158494,
      0.0083333333334944616639, 0.0013888888943630134161, 0.00019841269506578723932,
      0.000024801493098887391545, 2.7557586373785180954e-6, 2.763024838532302056e-7,
      2.5000061625531279587e-8};
};

template <class A> GI_HOST_DEVICE Vec<A> vexp(const Vec<A>& x) {
  using K = ExpConstants<A>;
  // Adding the magic number rounds to an integer n, which then sits in the low mantissa bits.
  const Vec<A> shifted = x * A(1.4426950408889634) + K::magic;
  const Vec<A> n = shifted - K::magic;
  const Vec<A> r = (x - n * K::ln2_high) - n * K::ln2_low;
  Vec<A> p = splat<A>(K::coefficient[K::degree]);
  for (int i = K::degree - 1; i >= 0; --i) p = p * r + K::coefficient[i];
  // Times 2^n, from n and the bias in the place of the exponent; the magic number's other bits are
  // shifted out. A product, so that a NaN stays one.
  const Bits<A> power = (bit_cast<Bits<A>>(shifted) << K::mantissa) + bit_cast<Bits<A>>(splat<A>(1));
  const Vec<A> y = p * bit_cast<Vec<A>>(power);
  const Vec<A> bounded = x > K::highest ? splat<A>(__builtin_huge_val()) : y;
  return x < K::lowest ? splat<A>(0) : bounded;
}

// Which lanes of two rows, numbered one after the other, a butterfly of width `step` takes for the
// first and for the second result: it swaps the off-diagonal blocks.
template <class A> struct Butterfly {
  IntVec<A> low, high;

  GI_HOST_DEVICE explicit Butterfly(int step) {
    constexpr int L = kLanes<A>;
    IntVec<A> lane;
    for (int j = 0; j < L; ++j) lane[j] = j;
    const IntVec<A> clear = (lane & step) == 0;
    low = clear ? lane : lane - step + L;
    high = clear ? lane + step : lane + L;
  }
};

// Transposes a kLanes x kLanes block held in registers.
template <class A> GI_HOST_DEVICE void transpose(Vec<A>* rows) {
  constexpr int L = kLanes<A>;
#if defined(__clang__)
  A block[L][L];
  for (int i = 0; i < L; ++i)
    for (int j = 0; j < L; ++j) block[j][i] = rows[i][j];
  for (int i = 0; i < L; ++i) rows[i] = load<A>(block[i]);
#else
#pragma GCC unroll 4
  for (int step = 1; step < L; step *= 2) {
    const Butterfly<A> lanes(step);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      if (i & step) continue;
      const Vec<A> a = rows[i], b = rows[i + step];
      rows[i] = __builtin_shuffle(a, b, lanes.low);
      rows[i + step] = __builtin_shuffle(a, b, lanes.high);
    }
  }
#endif
}

// Lane i of the result is the sum of the lanes of rows[i], for kLanes rows; these are overwritten.
template <class A> GI_HOST_DEVICE Vec<A> sum_each_row(Vec<A>* rows) {
  constexpr int L = kLanes<A>;
#if defined(__clang__)
  Vec<A> sums;
  for (int i = 0; i < L; ++i) sums[i] = sum_lanes<A>(rows[i]);
  return sums;
#else
#pragma GCC unroll 4
  for (int step = 1; step < L; step *= 2) {
    const Butterfly<A> lanes(step);
#pragma GCC unroll 16
    for (int i = 0; i < L; i += 2 * step)
      rows[i] = __builtin_shuffle(rows[i], rows[i + step], lanes.low) +
                __builtin_shuffle(rows[i], rows[i + step], lanes.high);
  }
  return rows[0];
#endif
}

GI_END_VARIANT
