#include "flow_consistency/kernel.h"

#include "common/gather.h"

GI_BEGIN_VARIANT

namespace {

// `count` numbers of a row, `step` apart; lanes beyond are zero.
template <class A, class T>
Vec<A> load_some(const T* from, i64 step, i64 count) {
  if (step == 1 && count == kLanes<A>) return load<A>(from);
  Vec<A> v = {};
  for (i64 i = 0; i < count; ++i) v[i] = to_accumulate(from[i * step]);
  return v;
}

template <class A, class T>
void store_some(T* to, i64 step, i64 count, const Vec<A>& v) {
  if (step == 1 && count == kLanes<A>) return store<A>(to, v);
  for (i64 i = 0; i < count; ++i) to[i * step] = Rounded<T>::from(v[i]);
}

template <class T>
void forward_typed(const FlowConsistency& a, i64 begin, i64 end) {
  using A = typename Accumulate<T>::type;
  constexpr i64 L = kLanes<A>;
  const i64 H = a.flow.size[2], W = a.flow.size[3];
  Vec<A> lane;
  for (i64 i = 0; i < L; ++i) lane[i] = A(i);
  for (i64 item = begin; item < end; ++item) {
    const i64 b = item / H, y = item % H;
    const auto flow = plane_of<const T>(a.flow, b, 0), back = plane_of<const T>(a.flow_backward, b, 0);
    const auto out = plane_of<T>(a.output, b, 0);
    for (i64 x = 0; x < W; x += L) {
      const i64 count = minimum(L, W - x);
      const T* at = flow.data + y * flow.sy + x * flow.sx;
      const Vec<A> u[2] = {load_some<A>(at, flow.sx, count), load_some<A>(at + flow.sc, flow.sx, count)};
      const VecTaps<A> taps(A(x) + lane + u[0], A(y) + u[1], H, W);
      A tap[2][4][L];
      for (i64 i = 0; i < L; ++i)
        for (int k = 0; k < 4; ++k) {
          const T* from = back.data + taps.y[k >> 1][i] * back.sy + taps.x[k & 1][i] * back.sx;
          tap[0][k][i] = to_accumulate(from[0]);
          tap[1][k][i] = to_accumulate(from[back.sc]);
        }
      Vec<A> sum = {};
      for (int c = 0; c < 2; ++c) {
        Vec<A> sample = {};
        for (int k = 0; k < 4; ++k) sample += taps.weight[k] * (taps.inside[k] ? load<A>(tap[c][k]) : splat<A>(0));
        const Vec<A> difference = u[c] + sample;
        sum += difference < 0 ? -difference : difference;
      }
      store_some<A>(out.data + y * out.sy + x * out.sx, out.sx, count, sum / 2);
    }
  }
}

void forward(const FlowConsistency& a, i64 begin, i64 end) {
  with_dtype(a.flow.dtype, [&](auto t) { forward_typed<decltype(t)>(a, begin, end); });
}

}  // namespace

extern const FlowConsistencyKernels flow_consistency_kernels;
const FlowConsistencyKernels flow_consistency_kernels = {forward};

GI_END_VARIANT
