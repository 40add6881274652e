#include "convex_upsample/cuda.h"

GI_BEGIN_VARIANT

namespace {

constexpr i64 kFactor = 8;
constexpr i64 kFine = kFactor * kFactor;  // fine pixels of a coarse one
constexpr int kNeighbours = 9;

// An item is a coarse pixel. With its logits contiguous, each thread of its team has V fine pixels of
// one row; else one thread has all of them and neighbouring threads read neighbouring logits.

// The 3x3 neighbours of coarse pixel (y, x), in fine pixels; zeros outside the map.
template <class A> struct Neighbours {
  A value[2][kNeighbours];

  GI_HOST_DEVICE Neighbours(const A* flow, i64 h, i64 w, i64 y, i64 x) {
    GI_UNROLL
    for (int k = 0; k < kNeighbours; ++k) {
      const i64 row = y + k / 3 - 1, column = x + k % 3 - 1;
      const bool inside = row >= 0 && row < h && column >= 0 && column < w;
      GI_UNROLL
      for (int i = 0; i < 2; ++i) value[i][k] = inside ? A(kFactor) * flow[(i * h + row) * w + column] : A(0);
    }
  }
};

// Softmax over the neighbours, of V fine pixels from s on.
template <class T, int V> struct Weights {
  using A = typename Accumulate<T>::type;
  A weight[kNeighbours][V];

  GI_HOST_DEVICE Weights(const T* logits, const Map<const T>& mask, i64 s) {
    Pack<T, V> pack[kNeighbours];
    GI_UNROLL
    for (int k = 0; k < kNeighbours; ++k) pack[k] = read<T, V>(logits + mask.template channel<V>(k * kFine + s));
    GI_UNROLL
    for (int k = 0; k < kNeighbours; ++k) widen(pack[k], weight[k]);
    GI_UNROLL
    for (int i = 0; i < V; ++i) {
      A most = weight[0][i], sum = 0;
      GI_UNROLL
      for (int k = 1; k < kNeighbours; ++k) most = maximum(most, weight[k][i]);
      GI_UNROLL
      for (int k = 0; k < kNeighbours; ++k) {
        weight[k][i] = exponential<T>(weight[k][i] - most);
        sum += weight[k][i];
      }
      const A scale = A(1) / sum;
      GI_UNROLL
      for (int k = 0; k < kNeighbours; ++k) weight[k][i] *= scale;
    }
  }
};

template <class T, int V> struct Forward {
  static constexpr const char* kName = "convex_upsample";
  using A = typename Accumulate<T>::type;
  const A* flow;  // [B,2,h,w]
  Map<const T> mask;
  A* output;  // [B,2,8h,8w]
  i64 h, w;

  GI_HOST_DEVICE void operator()(i64 b, i64 pixel, const Team& team) const {
    i64 y, x;
    split(pixel, w, y, x);
    const Neighbours<A> from(flow + b * 2 * h * w, h, w, y, x);
    GI_NO_UNROLL
    for (i64 s = team.lane * V; s < kFine; s += i64(team.lanes) * V) {
      const Weights<T, V> weights(mask.at(b, y, x), mask, s);
      GI_UNROLL
      for (int i = 0; i < 2; ++i) {
        const i64 row = ((b * 2 + i) * h + y) * kFactor + s / kFactor;
        A* out = output + (row * w + x) * kFactor + s % kFactor;
        A fine[V] = {};
        GI_UNROLL
        for (int k = 0; k < kNeighbours; ++k)
          GI_UNROLL
          for (int v = 0; v < V; ++v) fine[v] += weights.weight[k][v] * from.value[i][k];
        write_wide(out, fine);
      }
    }
  }
};

template <class T, int V> struct Backward {
  static constexpr const char* kName = "convex_upsample_backward";
  using A = typename Accumulate<T>::type;
  Map<const A> grad;  // [B,2,8h,8w]
  const A* flow;
  Map<const T> mask;
  Map<T> grad_mask;  // data null if not wanted
  A* parts;          // [B,h,w,2,9], or null
  i64 h, w;

  GI_HOST_DEVICE void operator()(i64 b, i64 pixel, const Team& team) const {
    i64 y, x;
    split(pixel, w, y, x);
    const Neighbours<A> from(flow + b * 2 * h * w, h, w, y, x);
    A sums[2 * kNeighbours] = {};
    GI_NO_UNROLL
    for (i64 s = team.lane * V; s < kFine; s += i64(team.lanes) * V) {
      const Weights<T, V> weights(mask.at(b, y, x), mask, s);
      const A* fine = grad.at(b, y * kFactor + s / kFactor, x * kFactor + s % kFactor);
      A g[2][V], mean[V] = {};
      GI_UNROLL
      for (int v = 0; v < V; ++v) {
        GI_UNROLL
        for (int i = 0; i < 2; ++i) g[i][v] = fine[i * grad.sc + v * grad.sx];
        GI_UNROLL
        for (int k = 0; k < kNeighbours; ++k) {
          mean[v] += weights.weight[k][v] * (g[0][v] * from.value[0][k] + g[1][v] * from.value[1][k]);
          GI_UNROLL
          for (int i = 0; i < 2; ++i) sums[i * kNeighbours + k] += weights.weight[k][v] * g[i][v];
        }
      }
      if (!grad_mask.data) continue;
      GI_UNROLL
      for (int k = 0; k < kNeighbours; ++k) {
        A of_logit[V];
        GI_UNROLL
        for (int v = 0; v < V; ++v)
          of_logit[v] = weights.weight[k][v] * (g[0][v] * from.value[0][k] + g[1][v] * from.value[1][k] - mean[v]);
        write(grad_mask.at(b, y, x) + grad_mask.template channel<V>(k * kFine + s), of_logit);
      }
    }
    if (!parts) return;
    team.sum(sums);
    if (!team.leader()) return;
    A* part = parts + (b * h * w + pixel) * 2 * kNeighbours;
    GI_UNROLL
    for (int n = 0; n < 2 * kNeighbours; ++n) part[n] = A(kFactor) * sums[n];
  }
};

// Each flow value collects what its neighbours hold for it.
template <class A> struct Collect {
  static constexpr const char* kName = "convex_upsample_reduce";
  const A* parts;
  A* grad_flow;  // [B,2,h,w]
  i64 h, w;

  GI_HOST_DEVICE void operator()(i64 map, i64 pixel, const Team&) const {
    const i64 b = map / 2, i = map % 2;
    i64 y, x;
    split(pixel, w, y, x);
    A sum = 0;
    for (int k = 0; k < kNeighbours; ++k) {
      const i64 row = y - (k / 3 - 1), column = x - (k % 3 - 1);
      if (row >= 0 && row < h && column >= 0 && column < w)
        sum += parts[((b * h * w + row * w + column) * 2 + i) * kNeighbours + k];
    }
    grad_flow[map * h * w + pixel] = sum;
  }
};

template <class T> int lanes_of(const Array& mask, int V) {
  return mask.stride[1] == 1 ? int(minimum<i64>(kWarp, kFine / V)) : 1;
}

template <class T> void forward(const ConvexUpsampleForward& a, Stream stream) {
  using A = typename Accumulate<T>::type;
  const i64 B = a.mask.size[0], h = a.mask.size[2], w = a.mask.size[3];
  with_width<T>(packed<T>(a.mask, 4, 1), [&](auto width) {
    constexpr int V = decltype(width)::value;
    const Forward<T, V> body{static_cast<const A*>(a.flow), Map<const T>(a.mask), static_cast<A*>(a.output), h, w};
    launch_teams(body, B, h * w, lanes_of<T>(a.mask, V), stream);
  });
}

template <class T> void backward(const ConvexUpsampleBackward& a, Stream stream) {
  using A = typename Accumulate<T>::type;
  const i64 B = a.mask.size[0], h = a.mask.size[2], w = a.mask.size[3];
  with_width<T>(packed<T>(a.mask, 4, 1) && packed<T>(a.grad_mask, 4, 1), [&](auto width) {
    constexpr int V = decltype(width)::value;
    const Backward<T, V> body{Map<const A>(a.grad), static_cast<const A*>(a.flow), Map<const T>(a.mask),
                              Map<T>(a.grad_mask), static_cast<A*>(a.flow_parts), h, w};
    launch_teams(body, B, h * w, lanes_of<T>(a.mask, V), stream);
  });
}

}  // namespace

GI_END_VARIANT

namespace gi {

void convex_upsample_forward(const ConvexUpsampleForward& a, Stream stream) {
  GI_VARIANT::with_dtype(a.mask.dtype, [&](auto t) { GI_VARIANT::forward<decltype(t)>(a, stream); });
}

void convex_upsample_backward(const ConvexUpsampleBackward& a, Stream stream) {
  GI_VARIANT::with_dtype(a.mask.dtype, [&](auto t) { GI_VARIANT::backward<decltype(t)>(a, stream); });
}

void convex_upsample_reduce(const ConvexUpsampleReduce& a, i64 batch, Stream stream) {
  const auto collect = [&](auto accumulator) {
    using A = decltype(accumulator);
    GI_VARIANT::launch_items(GI_VARIANT::Collect<A>{static_cast<const A*>(a.flow_parts), static_cast<A*>(a.grad_flow),
                                                    a.height, a.width},
                             batch * 2, a.height * a.width, stream);
  };
  if (a.dtype == Dtype::f64) collect(double{});
  else collect(float{});
}

}  // namespace gi
