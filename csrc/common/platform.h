// What every kernel header needs: the host+device marker, the variant namespace, element types.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define GI_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define GI_HOST_DEVICE inline __attribute__((always_inline))
#endif

// Each cpu.cpp is compiled once per instruction set. Everything it uses lives in a namespace of that
// name, so that the linker can never merge a function built for AVX-512 into the portable variant.
#if !defined(GI_VARIANT)
#define GI_VARIANT portable
#endif
#define GI_BEGIN_VARIANT namespace gi { namespace GI_VARIANT {
#define GI_END_VARIANT } }

namespace gi {

using i64 = int64_t;

enum class Dtype { f32, f64, bf16, f16 };

// A strided array as kernels see it; strides in elements. Leading dimensions first.
struct Array {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
  i64 size[6] = {};
  i64 stride[6] = {};
};

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

}  // namespace gi

GI_BEGIN_VARIANT

template <class T> GI_HOST_DEVICE T minimum(T a, T b) { return a < b ? a : b; }
template <class T> GI_HOST_DEVICE T maximum(T a, T b) { return a < b ? b : a; }

// Accumulation type of a storage type.
template <class T> struct Accumulate { using type = float; };
template <> struct Accumulate<double> { using type = double; };

GI_END_VARIANT
