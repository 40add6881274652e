// Launching device kernels, and what their bodies are written with. Torch-free.
//
// A kernel is a struct, its "body", whose operator()(outer, inner, team) does one item of work. The only
// launches of the project are in this file, so that each of them is on the given stream and is checked.
//
// Compiled by a plain C++ compiler, the same launches are loops on the CPU (the "emulation"): the very
// bodies that a GPU runs then pass the contract suite, under the sanitizers too, where there is no GPU.
// Items run in reverse there, so that nothing leans on an order; teams have fewer lanes.
#pragma once

#include <stdexcept>
#include <string>

#include "common/numbers.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "common/emulation.h"
#endif

#if defined(__CUDA_ARCH__)
#define GI_UNROLL _Pragma("unroll")
#define GI_NO_UNROLL _Pragma("unroll 1")
#else
#define GI_UNROLL
#define GI_NO_UNROLL
#endif

namespace gi {

// A cudaStream_t. Only DeviceScope (common/device_binding.h) makes one, from tensors it has looked at.
struct Stream {
  void* handle;
};

}  // namespace gi

GI_BEGIN_VARIANT

constexpr int kWarp = 32;
constexpr int kThreads = 256;       // of a block
constexpr i64 kMostOuter = 65535;   // blocks along y
constexpr i64 kMostBlocks = 2147483647;  // blocks along x
constexpr int kColumnLanes = 8;

// ---- what bodies are given ----

#if !defined(__CUDACC__)
template <class A, int N> void emulated_sum(int lanes, A (&v)[N]) {
  if (lanes == 1) return;
  const auto heard = EmulatedLanes::tell(v, sizeof v);
  for (int n = 0; n < N; ++n) {
    v[n] = 0;
    for (int l = 0; l < lanes; ++l) v[n] += heard.template at<A>(l, n);
  }
}
#endif

// Threads of one warp that do an item together. `lanes` is a power of two.
struct Team {
  int lane, lanes;

  GI_HOST_DEVICE bool leader() const { return lane == 0; }

  // Sums of v over the lanes, given to all of them; the same order every time.
  template <class A, int N> GI_HOST_DEVICE void sum([[maybe_unused]] A (&v)[N]) const {
#if defined(__CUDA_ARCH__)
    for (int step = lanes / 2; step > 0; step /= 2)
      for (int n = 0; n < N; ++n) v[n] += __shfl_xor_sync(mask(), v[n], step);
#elif !defined(__CUDACC__)
    emulated_sum(lanes, v);
#endif
  }
  template <class A> GI_HOST_DEVICE A largest(A v) const {
#if defined(__CUDA_ARCH__)
    for (int step = lanes / 2; step > 0; step /= 2) v = maximum(v, __shfl_xor_sync(mask(), v, step));
#elif !defined(__CUDACC__)
    if (lanes == 1) return v;
    const auto heard = EmulatedLanes::tell(&v, sizeof v);
    for (int l = 0; l < lanes; ++l) v = maximum(v, heard.template at<A>(l, 0));
#endif
    return v;
  }
  // Sum of v over the lanes before this one.
  GI_HOST_DEVICE i64 before([[maybe_unused]] i64 v) const {
#if defined(__CUDA_ARCH__)
    i64 sum = v;
    for (int step = 1; step < lanes; step *= 2) {
      const i64 other = __shfl_up_sync(mask(), sum, step, lanes);
      if (lane >= step) sum += other;
    }
    return sum - v;
#else
    i64 sum = 0;
#if !defined(__CUDACC__)
    if (lanes == 1) return 0;
    const auto heard = EmulatedLanes::tell(&v, sizeof v);
    for (int l = 0; l < lane; ++l) sum += heard.at<i64>(l, 0);
#endif
    return sum;
#endif
  }

 private:
#if defined(__CUDA_ARCH__)
  __device__ unsigned mask() const {
    const unsigned own = lanes == kWarp ? ~0u : (1u << lanes) - 1;
    return own << ((threadIdx.x % kWarp) & ~unsigned(lanes - 1));
  }
#endif
};

// As Team, but neighbouring threads do neighbouring items and the lanes of an item are in different
// warps: for sums over an axis along which memory is not contiguous.
struct ColumnTeam {
  int lane, lanes;
  bool active;  // whether there is an item at all; the others only take part in the sums

  GI_HOST_DEVICE bool leader() const { return lane == 0 && active; }

  // The leader gets the sums.
  template <class A, int N> GI_HOST_DEVICE void sum([[maybe_unused]] A (&v)[N]) const {
#if defined(__CUDA_ARCH__)
    extern __shared__ double shared[];
    A* memory = reinterpret_cast<A*>(shared) + threadIdx.x;
    GI_UNROLL
    for (int n = 0; n < N; ++n) memory[(n * kColumnLanes + lane) * kWarp] = v[n];
    __syncthreads();
    if (lane == 0) {
      GI_UNROLL
      for (int n = 0; n < N; ++n)
        for (int l = 1; l < kColumnLanes; ++l) v[n] += memory[(n * kColumnLanes + l) * kWarp];
    }
    __syncthreads();
#elif !defined(__CUDACC__)
    emulated_sum(lanes, v);
#endif
  }
};

// index = quotient * size + rest. Divisions of 64 bits are slow on a GPU and hardly ever needed.
GI_HOST_DEVICE void split(i64 index, i64 size, i64& quotient, i64& rest) {
#if defined(__CUDA_ARCH__)
  if (((index | size) >> 32) == 0) {
    const uint32_t q = uint32_t(index) / uint32_t(size);
    quotient = q;
    rest = uint32_t(index) - q * uint32_t(size);
    return;
  }
#endif
  quotient = index / size;
  rest = index - quotient * size;
}

// The old value at `to`, which becomes `value`; other threads may do the same at the same time.
GI_HOST_DEVICE i64 exchange(i64* to, i64 value) {
#if defined(__CUDA_ARCH__)
  return i64(atomicExch(reinterpret_cast<unsigned long long*>(to), (unsigned long long)(value)));
#else
  const i64 old = *to;
  *to = value;
  return old;
#endif
}

// ---- launches ----

#if defined(__CUDACC__)

inline void check_launch(const char* name) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(name) + ": the kernel could not be launched: " + cudaGetErrorString(error));
}

inline dim3 grid_of(const char* name, i64 outer, i64 blocks) {
  if (blocks > kMostBlocks) throw std::runtime_error(std::string(name) + ": the tensors are too large for one launch");
  return dim3(unsigned(blocks), unsigned(minimum(outer, kMostOuter)));
}

template <class Body>
__global__ void __launch_bounds__(kThreads, 1)
    team_kernel(const __grid_constant__ Body body, i64 outer, i64 inner, int log_lanes) {
  const i64 thread = i64(blockIdx.x) * kThreads + threadIdx.x;
  const i64 item = thread >> log_lanes;
  if (item >= inner) return;
  const Team team{int(threadIdx.x) & ((1 << log_lanes) - 1), 1 << log_lanes};
  for (i64 o = blockIdx.y; o < outer; o += gridDim.y) body(o, item, team);
}

template <class Body>
__global__ void __launch_bounds__(kThreads, 1) column_kernel(const __grid_constant__ Body body, i64 outer, i64 inner) {
  const i64 item = i64(blockIdx.x) * kWarp + threadIdx.x;
  const ColumnTeam team{int(threadIdx.y), kColumnLanes, item < inner};
  for (i64 o = blockIdx.y; o < outer; o += gridDim.y) body(o, minimum(item, inner - 1), team);
}

#endif

// Runs body(o, i, team) for all o in [0, outer) and i in [0, inner), each by a team of `lanes` threads.
template <class Body> void launch_teams(const Body& body, i64 outer, i64 inner, int lanes, Stream stream) {
  if (outer <= 0 || inner <= 0) return;
#if defined(__CUDACC__)
  int log_lanes = 0;
  while ((1 << log_lanes) < lanes) ++log_lanes;
  const i64 blocks = ((inner << log_lanes) + kThreads - 1) / kThreads;
  team_kernel<Body><<<grid_of(Body::kName, outer, blocks), kThreads, 0, static_cast<cudaStream_t>(stream.handle)>>>(
      body, outer, inner, log_lanes);
  check_launch(Body::kName);
#else
  (void)stream;
  lanes = minimum(lanes, int(EmulatedLanes::kMost));
  for (i64 o = outer; o-- > 0;)
    for (i64 i = inner; i-- > 0;) EmulatedLanes::run(lanes, [&](int lane) { body(o, i, Team{lane, lanes}); });
#endif
}

template <class Body> void launch_items(const Body& body, i64 outer, i64 inner, Stream stream) {
  launch_teams(body, outer, inner, 1, stream);
}

// As launch_teams with teams of kColumnLanes. `Body::kSumBytes` is the size of what one thread sums.
template <class Body> void launch_columns(const Body& body, i64 outer, i64 inner, Stream stream) {
  if (outer <= 0 || inner <= 0) return;
#if defined(__CUDACC__)
  column_kernel<Body><<<grid_of(Body::kName, outer, (inner + kWarp - 1) / kWarp), dim3(kWarp, kColumnLanes),
                        kThreads * Body::kSumBytes, static_cast<cudaStream_t>(stream.handle)>>>(body, outer, inner);
  check_launch(Body::kName);
#else
  (void)stream;
  constexpr int lanes = kColumnLanes < EmulatedLanes::kMost ? kColumnLanes : EmulatedLanes::kMost;
  for (i64 o = outer; o-- > 0;)
    for (i64 i = inner; i-- > 0;)
      EmulatedLanes::run(lanes, [&](int lane) { body(o, i, ColumnTeam{lane, lanes, true}); });
#endif
}

// The least power of two that is at least `count`, up to a warp.
inline int lanes_for(i64 count) {
  int lanes = 1;
  while (lanes < kWarp && lanes < count) lanes *= 2;
  return lanes;
}

// ---- memory ----

// V numbers that are read and written as one; 16 bytes where they are packed.
template <class T, int V> struct alignas(sizeof(T) * V) Pack {
  T value[V];
};
template <class T> constexpr int kPack = 16 / int(sizeof(T));

template <class T, int V> GI_HOST_DEVICE Pack<T, V> read(const T* from) {
#if defined(__CUDA_ARCH__)
  // As a vector type of the hardware: a struct of small members may be moved one by one.
  if constexpr (sizeof(Pack<T, V>) == 16) {
    const uint4 bits = *reinterpret_cast<const uint4*>(from);
    return bit_cast<Pack<T, V>>(bits);
  }
#endif
  return *reinterpret_cast<const Pack<T, V>*>(from);
}

// Zeros where there is nothing to read.
template <class T, int V> GI_HOST_DEVICE Pack<T, V> read_if(bool there, const T* from) {
  Pack<T, V> pack = {};
  if (there) pack = read<T, V>(from);
  return pack;
}

// sum += weight * pack
template <class A, class T, int V> GI_HOST_DEVICE void add(A (&sum)[V], A weight, const Pack<T, V>& pack) {
  GI_UNROLL
  for (int i = 0; i < V; ++i) sum[i] += weight * to_accumulate(pack.value[i]);
}

template <class A, class T, int V> GI_HOST_DEVICE A dot(const A (&a)[V], const Pack<T, V>& pack) {
  A sum = 0;
  GI_UNROLL
  for (int i = 0; i < V; ++i) sum += a[i] * to_accumulate(pack.value[i]);
  return sum;
}

template <class A, class T, int V> GI_HOST_DEVICE void widen(const Pack<T, V>& pack, A (&to)[V]) {
  GI_UNROLL
  for (int i = 0; i < V; ++i) to[i] = to_accumulate(pack.value[i]);
}

#if defined(__CUDA_ARCH__)
// Stores of 16 bytes, spelled out: the compiler takes structs of small members apart.
__device__ __forceinline__ void write_pack(float* to, const float (&v)[4]) {
  __stcg(reinterpret_cast<float4*>(to), make_float4(v[0], v[1], v[2], v[3]));
}
__device__ __forceinline__ void write_pack(double* to, const double (&v)[2]) {
  __stcg(reinterpret_cast<double2*>(to), make_double2(v[0], v[1]));
}
__device__ __forceinline__ uint32_t two(bf16, float low, float high) {
  return bit_cast<uint32_t>(__floats2bfloat162_rn(low, high));
}
__device__ __forceinline__ uint32_t two(f16, float low, float high) {
  return bit_cast<uint32_t>(__floats2half2_rn(low, high));
}
template <class T> __device__ __forceinline__ void write_pack(T* to, const float (&v)[8]) {
  __stcg(reinterpret_cast<uint4*>(to), make_uint4(two(T{}, v[0], v[1]), two(T{}, v[2], v[3]), two(T{}, v[4], v[5]),
                                                  two(T{}, v[6], v[7])));
}
#endif

template <class T, class A, int V> GI_HOST_DEVICE void write(T* to, const A (&from)[V]) {
#if defined(__CUDA_ARCH__)
  constexpr bool whole = V == kPack<T>;
#else
  constexpr bool whole = false;
#endif
  if constexpr (whole) {
    write_pack(to, from);
  } else {
    Pack<T, V> pack;
    for (int i = 0; i < V; ++i) pack.value[i] = Rounded<T>::from(from[i]);
    *reinterpret_cast<Pack<T, V>*>(to) = pack;
  }
}

// V numbers of accumulation type; `to` is aligned to 16 bytes if they are several.
template <class A, int V> GI_HOST_DEVICE void write_wide(A* to, const A (&from)[V]) {
  constexpr int step = V % kPack<A> == 0 ? kPack<A> : 1;
  GI_UNROLL
  for (int i = 0; i < V; i += step) {
    A part[step];
    GI_UNROLL
    for (int j = 0; j < step; ++j) part[j] = from[i + j];
    write(to + i, part);
  }
}

// A map [B,C,H,W] of any strides.
template <class T> struct Map {
  T* data = nullptr;
  i64 sb = 0, sc = 0, sy = 0, sx = 0;

  Map() = default;
  explicit Map(const Array& a)
      : data(static_cast<T*>(a.data)), sb(a.stride[0]), sc(a.stride[1]), sy(a.stride[2]), sx(a.stride[3]) {}

  GI_HOST_DEVICE T* at(i64 b, i64 y, i64 x) const { return data + b * sb + y * sy + x * sx; }
  // Offset of channel c, the first of V that are read at a time.
  template <int V> GI_HOST_DEVICE i64 channel(i64 c) const { return V == 1 ? c * sc : c; }
};

// Maps [B,T,C,H,W] of any strides.
template <class T> struct Frames {
  T* data = nullptr;
  i64 sb = 0, st = 0, sc = 0, sy = 0, sx = 0;

  Frames() = default;
  explicit Frames(const Array& a)
      : data(static_cast<T*>(a.data)), sb(a.stride[0]), st(a.stride[1]), sc(a.stride[2]), sy(a.stride[3]),
        sx(a.stride[4]) {}

  GI_HOST_DEVICE T* at(i64 b, i64 t, i64 y, i64 x) const { return data + b * sb + t * st + y * sy + x * sx; }
  template <int V> GI_HOST_DEVICE i64 channel(i64 c) const { return V == 1 ? c * sc : c; }
};

// Whether the channels (dimension `channel`) of every pixel can be read as whole packs.
template <class T> bool packed(const Array& a, int dimensions, int channel) {
  if (!a.data) return true;
  i64 offsets = reinterpret_cast<i64>(a.data) / i64(sizeof(T)) | a.size[channel];
  for (int d = 0; d < dimensions; ++d)
    if (d != channel && a.size[d] > 1) offsets |= a.stride[d];
  return a.stride[channel] == 1 && offsets % kPack<T> == 0;
}

// Calls f with the number of channels that are read at a time, as a type: whole packs or single ones.
template <int V> struct Width {
  static constexpr int value = V;
};
template <class T, class F> void with_width(bool packs, F&& f) {
  if (packs) f(Width<kPack<T>>{});
  else f(Width<1>{});
}

// e^x. For half precision storage the hardware's approximation, whose error is below that storage's.
template <class T> GI_HOST_DEVICE float exponential(float x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 2) return __expf(x);
  else return expf(x);
#else
  return __builtin_expf(x);
#endif
}
template <class T> GI_HOST_DEVICE double exponential(double x) {
#if defined(__CUDA_ARCH__)
  return exp(x);
#else
  return __builtin_exp(x);
#endif
}

GI_END_VARIANT
