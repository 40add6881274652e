// Completion of flow inside a mask: the drawing of points (host and device), arguments, CPU kernels.
#pragma once

#include "common/platform.h"
#include "common/select.h"

namespace gi {

struct CompleteFlow {
  Array flow;    // [B,2,H,W]
  Array mask;    // [B,1,H,W]
  Array output;  // [B,2,H,W]
  // Drawn points of each frame, [B,20,4] in accumulation type: row, column, flow along x, along y.
  void* points;
};

struct CompleteFlowKernels {
  void (*draw)(const CompleteFlow&, i64 begin, i64 end);  // items are B
  void (*fill)(const CompleteFlow&, i64 begin, i64 end);  // items are B * H rows
};

}  // namespace gi

GI_DECLARE_KERNELS(CompleteFlowKernels, complete_flow_kernels)

GI_BEGIN_VARIANT

constexpr int kPoints = 20;

// NumPy's default generator (PCG64, XSL-RR output) as `numpy.random.default_rng(1)` starts it, and its
// bounded integers: 32-bit halves, low one first, multiplied into the range with rejection (Lemire).
class DefaultRng1 {
 public:
  GI_HOST_DEVICE uint32_t below(uint32_t count) {
    if (count <= 1) return 0;  // NumPy draws nothing for a range of one
    uint64_t product = uint64_t(next32()) * count;
    if (uint32_t(product) < count) {
      const uint32_t threshold = (0u - count) % count;
      while (uint32_t(product) < threshold) product = uint64_t(next32()) * count;
    }
    return uint32_t(product >> 32);
  }

 private:
  using u128 = unsigned __int128;

  GI_HOST_DEVICE uint32_t next32() {
    if (half_) {
      half_ = false;
      return kept_;
    }
    state_ = state_ * ((u128(0x2360ED051FC65DA4ull) << 64) | 0x4385DF649FCCF645ull) + increment();
    const uint64_t folded = uint64_t(state_ >> 64) ^ uint64_t(state_);
    const int turn = int(state_ >> 122);
    const uint64_t value = (folded >> turn) | (folded << ((64 - turn) & 63));
    half_ = true;
    kept_ = uint32_t(value >> 32);
    return uint32_t(value);
  }

  // State and increment of numpy.random.PCG64(1).
  static GI_HOST_DEVICE u128 increment() { return (u128(0x922af2da2645f895ull) << 64) | 0xa19857b95740937bull; }
  u128 state_ = (u128(0x9c5b484bfedb756cull) << 64) | 0x2a6e7d6f320fbc7eull;
  bool half_ = false;
  uint32_t kept_ = 0;
};

GI_END_VARIANT
