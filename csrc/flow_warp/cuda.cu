#include "flow_warp/cuda.h"

#include "common/contributors.h"

GI_BEGIN_VARIANT

namespace {

// An item is a pixel; its team shares the channels. A thread reads two packs of each tap at a time, so
// that eight reads are under way; with channels apart in memory a thread does all of its pixel's, so that
// neighbouring threads read neighbouring pixels.

template <class A> FlowField<A> field_of(const void* flow, int h, int w, const Array& map) {
  return FlowField<A>(static_cast<const A*>(flow), h, w, int(map.size[2]), int(map.size[3]));
}

constexpr int kPacks = 2;

template <class T> int team_lanes(const Array& map, int width, int packs) {
  return map.stride[1] == 1 ? lanes_for((map.size[1] + width * packs - 1) / (width * packs)) : 1;
}

template <class T, int V> struct Forward {
  static constexpr const char* kName = "flow_warp";
  using A = typename Accumulate<T>::type;
  Map<const T> input;
  Map<T> output;
  FlowField<A> flow;
  i64 channels;

  GI_HOST_DEVICE void operator()(i64 b, i64 pixel, const Team& team) const {
    i64 y, x;
    split(pixel, flow.width, y, x);
    const Taps<A> t = flow.frame(b).taps(int(y), int(x));
    const T* row[4];
    A weight[4];
    GI_UNROLL
    for (int k = 0; k < 4; ++k) {
      row[k] = input.at(b, t.y(k), t.x(k));
      weight[k] = t.weight(k);
    }
    T* out = output.at(b, y, x);
    const i64 step = i64(team.lanes) * V;
    for (i64 c0 = team.lane * V; c0 < channels; c0 += kPacks * step) {
      Pack<T, V> taps[kPacks][4];
      GI_UNROLL
      for (int p = 0; p < kPacks; ++p)
        GI_UNROLL
        for (int k = 0; k < 4; ++k) {
          const i64 c = c0 + p * step;
          taps[p][k] = read_if<T, V>(t.inside[k] && c < channels, row[k] + input.template channel<V>(c));
        }
      GI_UNROLL
      for (int p = 0; p < kPacks; ++p) {
        const i64 c = c0 + p * step;
        if (c >= channels) break;
        A sum[V] = {};
        GI_UNROLL
        for (int k = 0; k < 4; ++k) add(sum, weight[k], taps[p][k]);
        write(out + output.template channel<V>(c), sum);
      }
    }
  }
};

template <class T, int V> struct InputGradient {
  static constexpr const char* kName = "flow_warp_backward_input";
  using A = typename Accumulate<T>::type;
  ContributorLists<A> lists;
  Map<const T> grad;
  Map<T> grad_input;
  i64 channels;

  // What is summed in one walk through the lists: four reads of each are under way, and registers are short.
  static constexpr int kSums = V == 1 ? 2 : 1;

  GI_HOST_DEVICE void operator()(i64 b, i64 pixel, const Team& team) const {
    i64 y, x;
    split(pixel, lists.width, y, x);
    T* out = grad_input.at(b, y, x);
    const i64 step = i64(team.lanes) * V;
    for (i64 c0 = team.lane * V; c0 < channels; c0 += kSums * step) {
      A sum[kSums][V] = {};
      lists.for_each_four(b, y, x, [&](const i64 (&from)[4], const A (&weight)[4], const bool (&there)[4]) {
        Pack<T, V> taken[4][kSums];
        GI_UNROLL
        for (int k = 0; k < 4; ++k) {
          i64 v, u;
          split(from[k], lists.width, v, u);
          const T* g = grad.at(b, v, u);
          GI_UNROLL
          for (int p = 0; p < kSums; ++p) {
            const i64 c = c0 + p * step;
            taken[k][p] = read_if<T, V>(there[k] && c < channels, g + grad.template channel<V>(c));
          }
        }
        GI_UNROLL
        for (int k = 0; k < 4; ++k)
          GI_UNROLL
          for (int p = 0; p < kSums; ++p) add(sum[p], weight[k], taken[k][p]);
      });
      GI_UNROLL
      for (int p = 0; p < kSums; ++p)
        if (c0 + p * step < channels) write(out + grad_input.template channel<V>(c0 + p * step), sum[p]);
    }
  }
};

template <class T, int V> struct FlowGradient {
  static constexpr const char* kName = "flow_warp_backward_flow";
  using A = typename Accumulate<T>::type;
  Map<const T> grad, input;
  FlowField<A> flow;
  A* parts;  // [B,2,H,W]
  i64 channels;

  GI_HOST_DEVICE void operator()(i64 b, i64 pixel, const Team& team) const {
    i64 y, x;
    split(pixel, flow.width, y, x);
    const Taps<A> t = flow.frame(b).taps(int(y), int(x));
    const T* row[4];
    GI_UNROLL
    for (int k = 0; k < 4; ++k) row[k] = input.at(b, t.y(k), t.x(k));
    const T* g = grad.at(b, y, x);
    A dots[4] = {};
    for (i64 c = team.lane * V; c < channels; c += i64(team.lanes) * V) {
      A here[V];
      widen(read<T, V>(g + grad.template channel<V>(c)), here);
      const i64 offset = input.template channel<V>(c);
      GI_UNROLL
      for (int k = 0; k < 4; ++k) dots[k] += dot(here, read_if<T, V>(t.inside[k], row[k] + offset));
    }
    team.sum(dots);
    if (!team.leader()) return;
    A gx = 0, gy = 0;
    GI_UNROLL
    for (int k = 0; k < 4; ++k) {
      if (!t.inside[k]) continue;  // not zero where the gradient is NaN
      gx += dots[k] * t.weight_dx(k);
      gy += dots[k] * t.weight_dy(k);
    }
    const i64 plane = i64(flow.height) * flow.width;
    parts[b * 2 * plane + pixel] = gx;
    parts[(b * 2 + 1) * plane + pixel] = gy;
  }
};

i64 pixels_of(const Array& map) { return map.size[2] * map.size[3]; }

template <class T> void forward(const FlowWarpForward& a, Stream stream) {
  using A = typename Accumulate<T>::type;
  with_width<T>(packed<T>(a.input, 4, 1) && packed<T>(a.output, 4, 1), [&](auto width) {
    constexpr int V = decltype(width)::value;
    const Forward<T, V> body{Map<const T>(a.input), Map<T>(a.output), field_of<A>(a.flow, a.flow_h, a.flow_w, a.input),
                             a.input.size[1]};
    launch_teams(body, a.input.size[0], pixels_of(a.input), team_lanes<T>(a.input, V, kPacks), stream);
  });
}

template <class T> void backward(const FlowWarpBackward& a, void* memory, Stream stream) {
  using A = typename Accumulate<T>::type;
  const i64 B = a.input.size[0], C = a.input.size[1], pixels = pixels_of(a.input);
  const FlowField<A> flow = field_of<A>(a.flow, a.flow_h, a.flow_w, a.input);
  if (a.grad_input.data) {
    const auto lists = lists_in<A>(memory, B, flow.height, flow.width);
    make_lists(lists, flow, B, stream);
    with_width<T>(packed<T>(a.grad, 4, 1) && packed<T>(a.grad_input, 4, 1), [&](auto width) {
      constexpr int V = decltype(width)::value;
      const InputGradient<T, V> body{lists, Map<const T>(a.grad), Map<T>(a.grad_input), C};
      launch_teams(body, B, pixels, team_lanes<T>(a.grad_input, V, body.kSums), stream);
    });
  }
  if (a.flow_parts)
    with_width<T>(packed<T>(a.grad, 4, 1) && packed<T>(a.input, 4, 1), [&](auto width) {
      constexpr int V = decltype(width)::value;
      const FlowGradient<T, V> body{Map<const T>(a.grad), Map<const T>(a.input), flow, static_cast<A*>(a.flow_parts),
                                    C};
      launch_teams(body, B, pixels, team_lanes<T>(a.input, V, 1), stream);
    });
}

template <class A> void reduce(const FlowWarpReduce& a, Stream stream) {
  const i64 plane = i64(a.height) * a.width;
  ResizeAdjoint<A> body{static_cast<const A*>(a.flow_parts),
                        static_cast<A*>(a.grad_flow),
                        a.blocks,
                        a.batch * 2 * plane,
                        plane,
                        2 * plane,
                        a.height,
                        a.width,
                        a.flow_h,
                        a.flow_w,
                        2,
                        ResizeAxis<A>(a.flow_h, a.height),
                        ResizeAxis<A>(a.flow_w, a.width),
                        A(a.width) / A(a.flow_w),
                        A(a.height) / A(a.flow_h)};
  launch_adjoint(body, a.batch * 2, stream);
}

}  // namespace

GI_END_VARIANT

namespace gi {

void flow_warp_forward(const FlowWarpForward& a, Stream stream) {
  GI_VARIANT::with_dtype(a.input.dtype, [&](auto t) { GI_VARIANT::forward<decltype(t)>(a, stream); });
}

i64 flow_warp_list_bytes(const FlowWarpBackward& a) {
  const i64 B = a.input.size[0], H = a.input.size[2], W = a.input.size[3];
  return a.input.dtype == Dtype::f64 ? GI_VARIANT::contributor_bytes<double>(B, H, W)
                                     : GI_VARIANT::contributor_bytes<float>(B, H, W);
}

void flow_warp_backward(const FlowWarpBackward& a, void* lists, Stream stream) {
  GI_VARIANT::with_dtype(a.input.dtype, [&](auto t) { GI_VARIANT::backward<decltype(t)>(a, lists, stream); });
}

void flow_warp_reduce(const FlowWarpReduce& a, Stream stream) {
  if (a.dtype == Dtype::f64) GI_VARIANT::reduce<double>(a, stream);
  else GI_VARIANT::reduce<float>(a, stream);
}

}  // namespace gi
