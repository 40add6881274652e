#include "flow_consistency/kernel.h"

#include "common/gather.h"

GI_BEGIN_VARIANT

namespace {

template <class T>
void forward_typed(const FlowConsistency& a, i64 begin, i64 end) {
  using A = typename Accumulate<T>::type;
  const i64 H = a.flow.size[2], W = a.flow.size[3];
  for (i64 item = begin; item < end; ++item) {
    const i64 b = item / H, y = item % H;
    const auto flow = plane_of<const T>(a.flow, b, 0), back = plane_of<const T>(a.flow_backward, b, 0);
    const auto out = plane_of<T>(a.output, b, 0);
    for (i64 x = 0; x < W; ++x) {
      const T* at = flow.data + y * flow.sy + x * flow.sx;
      const A u[2] = {to_accumulate(at[0]), to_accumulate(at[flow.sc])};
      const Taps<A> taps = bilinear_taps<A>(A(x) + u[0], A(y) + u[1], int(H), int(W));
      A sum = 0;
      for (int i = 0; i < 2; ++i) {
        A sample = 0;
        for (int k = 0; k < 4; ++k)
          if (taps.inside[k])
            sample += taps.weight(k) *
                      to_accumulate(back.data[i * back.sc + taps.y(k) * back.sy + taps.x(k) * back.sx]);
        const A difference = u[i] + sample;
        sum += difference < 0 ? -difference : difference;
      }
      out.data[y * out.sy + x * out.sx] = Rounded<T>::from(sum / 2);
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
