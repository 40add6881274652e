// Storage types and accumulation types: single numbers from one to the other. Host and device.
#pragma once

#include "common/platform.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

GI_BEGIN_VARIANT

template <class To, class From>
GI_HOST_DEVICE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

GI_HOST_DEVICE float scalar_from_half(uint16_t h) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(h));
#elif defined(__FLT16_MAX__) && !defined(__CUDACC__)
  return static_cast<float>(bit_cast<_Float16>(h));
#else
  // Scale by 2^112 moves the exponent; infinities and NaN need the full exponent.
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, rest = uint32_t(h & 0x7fffu) << 13;
  float f = bit_cast<float>(rest) * 0x1p112f;
  if ((h & 0x7c00u) == 0x7c00u) f = bit_cast<float>(rest | 0x7f800000u);
  return bit_cast<float>(bit_cast<uint32_t>(f) | sign);
#endif
}

GI_HOST_DEVICE uint16_t scalar_to_half(float f) {
#if defined(__CUDA_ARCH__)
  return __half_as_ushort(__float2half_rn(f));
#elif defined(__FLT16_MAX__) && !defined(__CUDACC__)
  return bit_cast<uint16_t>(static_cast<_Float16>(f));
#else
  const uint32_t u = bit_cast<uint32_t>(f);
  const uint16_t sign = uint16_t((u >> 16) & 0x8000u);
  const uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return sign | 0x7e00u;
  if (a >= 0x477ff000u) return sign | 0x7c00u;
  if (a < 0x38800000u) {  // subnormal: adding 0.5 aligns the mantissa and rounds to even
    const float r = bit_cast<float>(a) + 0.5f;
    return sign | uint16_t(bit_cast<uint32_t>(r) - 0x3f000000u);
  }
  return sign | uint16_t((a + 0xfffu + ((a >> 13) & 1u) - 0x38000000u) >> 13);
#endif
}

GI_HOST_DEVICE float to_accumulate(float v) { return v; }
GI_HOST_DEVICE double to_accumulate(double v) { return v; }
GI_HOST_DEVICE float to_accumulate(bf16 v) { return bit_cast<float>(uint32_t(v.bits) << 16); }
GI_HOST_DEVICE float to_accumulate(f16 v) { return scalar_from_half(v.bits); }

template <class T> struct Rounded;
template <> struct Rounded<float> { static GI_HOST_DEVICE float from(float v) { return v; } };
template <> struct Rounded<double> { static GI_HOST_DEVICE double from(double v) { return v; } };
template <> struct Rounded<f16> {
  static GI_HOST_DEVICE f16 from(float v) { return {scalar_to_half(v)}; }
};
template <> struct Rounded<bf16> {
  static GI_HOST_DEVICE bf16 from(float v) {
#if defined(__CUDA_ARCH__)
    return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
#else
    const uint32_t u = bit_cast<uint32_t>(v);
    if (v != v) return {0x7fc0};
    return {uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
#endif
  }
};

// Calls f with a value of the array's element type, for template dispatch.
template <class F>
inline void with_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f32: f(float{}); break;
    case Dtype::f64: f(double{}); break;
    case Dtype::bf16: f(bf16{}); break;
    case Dtype::f16: f(f16{}); break;
  }
}

GI_END_VARIANT
