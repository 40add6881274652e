#include "flow_consistency/cuda.h"

#include "common/bilinear.h"

GI_BEGIN_VARIANT

namespace {

template <class T> struct Consistency {
  static constexpr const char* kName = "flow_consistency";
  using A = typename Accumulate<T>::type;
  Map<const T> flow, back;
  Map<T> output;
  int height, width;

  GI_HOST_DEVICE void operator()(i64 b, i64 pixel, const Team&) const {
    i64 y, x;
    split(pixel, width, y, x);
    const T* at = flow.at(b, y, x);
    const A u[2] = {to_accumulate(at[0]), to_accumulate(at[flow.sc])};
    const Taps<A> t = bilinear_taps<A>(A(x) + u[0], A(y) + u[1], height, width);
    T tap[2][4] = {};
    GI_UNROLL
    for (int k = 0; k < 4; ++k) {
      if (!t.inside[k]) continue;
      const T* from = back.at(b, t.y(k), t.x(k));
      tap[0][k] = from[0];
      tap[1][k] = from[back.sc];
    }
    A sum = 0;
    GI_UNROLL
    for (int c = 0; c < 2; ++c) {
      A difference = u[c];
      GI_UNROLL
      for (int k = 0; k < 4; ++k) difference += t.weight(k) * to_accumulate(tap[c][k]);
      sum += difference < 0 ? -difference : difference;
    }
    *output.at(b, y, x) = Rounded<T>::from(sum / 2);
  }
};

}  // namespace

GI_END_VARIANT

namespace gi {

void flow_consistency_forward(const FlowConsistency& a, Stream stream) {
  GI_VARIANT::with_dtype(a.flow.dtype, [&](auto t) {
    using T = decltype(t);
    using namespace GI_VARIANT;
    const Consistency<T> body{Map<const T>(a.flow), Map<const T>(a.flow_backward), Map<T>(a.output),
                              int(a.flow.size[2]), int(a.flow.size[3])};
    launch_items(body, a.flow.size[0], a.flow.size[2] * a.flow.size[3], stream);
  });
}

}  // namespace gi
