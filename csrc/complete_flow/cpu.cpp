#include "complete_flow/kernel.h"

#include "common/gather.h"

GI_BEGIN_VARIANT

namespace {

// Whether (y, x) is on the rim: above one half, with a neighbour of the 3x3 cross at or below it, and
// not on the frame's edge.
template <class T>
bool on_rim(const Plane<const T>& mask, i64 y, i64 x) {
  const T* m = mask.data + y * mask.sy + x * mask.sx;
  const auto inside = [](T v) { return to_accumulate(v) > 0.5f; };
  // Written so that a NaN counts as neither above nor below.
  const auto outside = [](T v) { return to_accumulate(v) <= 0.5f; };
  return inside(m[0]) && (outside(m[-mask.sy]) || outside(m[mask.sy]) || outside(m[-mask.sx]) || outside(m[mask.sx]));
}

template <class T>
void draw_typed(const CompleteFlow& a, i64 begin, i64 end) {
  using A = typename Accumulate<T>::type;
  const i64 H = a.flow.size[2], W = a.flow.size[3];
  Scratch memory(H * i64(sizeof(i64)));
  i64* before = memory.as<i64>();  // rim pixels above row y
  for (i64 b = begin; b < end; ++b) {
    const auto mask = plane_of<const T>(a.mask, b, 0), flow = plane_of<const T>(a.flow, b, 0);
    i64 count = 0;
    for (i64 y = 0; y < H; ++y) {
      before[y] = count;
      if (y == 0 || y == H - 1) continue;
      for (i64 x = 1; x < W - 1; ++x) count += on_rim(mask, y, x);
    }
    DefaultRng1 rng;
    A* point = static_cast<A*>(a.points) + b * kPoints * 4;
    for (int i = 0; i < kPoints; ++i, point += 4) {
      i64 y = 0, x = 0;
      if (count > 0) {
        i64 wanted = rng.below(uint32_t(count));
        for (y = H - 1; before[y] > wanted; --y) {}
        wanted -= before[y];
        for (x = 1;; ++x)
          if (on_rim(mask, y, x) && wanted-- == 0) break;
      }
      const T* f = flow.data + y * flow.sy + x * flow.sx;
      point[0] = A(y);
      point[1] = A(x);
      point[2] = to_accumulate(f[0]);
      point[3] = to_accumulate(f[flow.sc]);
    }
  }
}

template <class T>
void fill_typed(const CompleteFlow& a, i64 begin, i64 end) {
  using A = typename Accumulate<T>::type;
  const i64 H = a.flow.size[2], W = a.flow.size[3];
  for (i64 item = begin; item < end; ++item) {
    const i64 b = item / H, y = item % H;
    const auto mask = plane_of<const T>(a.mask, b, 0), flow = plane_of<const T>(a.flow, b, 0);
    const auto out = plane_of<T>(a.output, b, 0);
    const A* points = static_cast<const A*>(a.points) + b * kPoints * 4;
    for (i64 x = 0; x < W; ++x) {
      const A m = to_accumulate(mask.data[y * mask.sy + x * mask.sx]);
      const T* f = flow.data + y * flow.sy + x * flow.sx;
      T* o = out.data + y * out.sy + x * out.sx;
      if (m == 0) {
        o[0] = f[0];
        o[out.sc] = f[flow.sc];
        continue;
      }
      A total = 0, sum[2] = {0, 0};
      for (int i = 0; i < kPoints; ++i) {
        const A* p = points + 4 * i;
        const A dy = A(y) - p[0], dx = A(x) - p[1], squared = dy * dy + dx * dx;
        const A w = squared > 0 ? 1 / (squared * squared * squared) : A(1e10);
        total += w;
        sum[0] += w * p[2];
        sum[1] += w * p[3];
      }
      for (int c = 0; c < 2; ++c) {
        const A filled = sum[c] / total;
        o[c * out.sc] = Rounded<T>::from(m == 1 ? filled : (1 - m) * to_accumulate(f[c * flow.sc]) + m * filled);
      }
    }
  }
}

void draw(const CompleteFlow& a, i64 begin, i64 end) {
  with_dtype(a.flow.dtype, [&](auto t) { draw_typed<decltype(t)>(a, begin, end); });
}

void fill(const CompleteFlow& a, i64 begin, i64 end) {
  with_dtype(a.flow.dtype, [&](auto t) { fill_typed<decltype(t)>(a, begin, end); });
}

}  // namespace

extern const CompleteFlowKernels complete_flow_kernels;
const CompleteFlowKernels complete_flow_kernels = {draw, fill};

GI_END_VARIANT
