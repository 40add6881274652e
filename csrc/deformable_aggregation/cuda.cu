#include "deformable_aggregation/cuda.h"

#include "common/contributors.h"

GI_BEGIN_VARIANT

namespace {

// Pixels of a strip, over which one team sums the gradients of the weights.
constexpr i64 kStrip = 8;

// What all kernels read; a thread has V channels from c on.
template <class T, int V> struct Sources {
  using A = typename Accumulate<T>::type;
  Frames<const T> keys, values;
  FlowField<A> flow;     // of frame 0; the next ones follow it
  ResizedMap<A> error;   // likewise
  const A *key_error_weight, *value_error_weight, *bias;
  i64 channels, frames;

  explicit Sources(const DeformableForward& a)
      : keys(a.keys), values(a.values),
        flow(static_cast<const A*>(a.flows), a.flow_h, a.flow_w, int(a.keys.size[3]), int(a.keys.size[4])),
        error(static_cast<const A*>(a.errors), a.error_h, a.error_w, int(a.keys.size[3]), int(a.keys.size[4])),
        key_error_weight(static_cast<const A*>(a.key_error_weight)),
        value_error_weight(static_cast<const A*>(a.value_error_weight)), bias(static_cast<const A*>(a.value_bias)),
        channels(a.keys.size[2]), frames(a.keys.size[1]) {}

  GI_HOST_DEVICE A error_at(i64 frame, i64 y, i64 x) const {
    ResizedMap<A> map = error;
    map.data += frame * map.h * map.w;
    return map.at(0, int(y), int(x));
  }
};

template <class A, int V> GI_HOST_DEVICE void load_weights(const A* weights, i64 c, bool there, A (&to)[V]) {
  GI_UNROLL
  for (int i = 0; i < V; ++i) to[i] = there ? weights[c + i] : A(0);
}

// Keys and values of one reference at one pixel, V channels of each: the taps as they are stored, and
// what they are blended to.
template <class T, int V> struct Sample {
  using A = typename Accumulate<T>::type;
  Taps<A> taps;
  A error;
  Pack<T, V> key_tap[4], value_tap[4];
  A key[V], value[V];

  GI_HOST_DEVICE Sample(const Sources<T, V>& s, i64 b, i64 t, i64 y, i64 x, i64 c, bool there, const A (&key_weight)[V],
                        const A (&value_weight)[V]) {
    const i64 frame = b * s.frames + t;
    taps = s.flow.frame(frame).taps(int(y), int(x));
    error = s.error_at(frame, y, x);
    GI_UNROLL
    for (int k = 0; k < 4; ++k) {
      const bool inside = taps.inside[k] && there;
      key_tap[k] = read_if<T, V>(inside, s.keys.at(b, t, taps.y(k), taps.x(k)) + s.keys.template channel<V>(c));
      value_tap[k] = read_if<T, V>(inside, s.values.at(b, t, taps.y(k), taps.x(k)) + s.values.template channel<V>(c));
    }
    GI_UNROLL
    for (int i = 0; i < V; ++i) {
      key[i] = error * key_weight[i];
      value[i] = error * value_weight[i];
    }
    GI_UNROLL
    for (int k = 0; k < 4; ++k) {
      add(key, taps.weight(k), key_tap[k]);
      add(value, taps.weight(k), value_tap[k]);
    }
  }
};

// Softmax over the references as they come: sum is that of exp(key - top) * value, total that of
// exp(key - top).
template <class T, int V> struct Running {
  using A = typename Accumulate<T>::type;
  A top[V], total[V], sum[V];

  GI_HOST_DEVICE void take(bool first, const Sample<T, V>& s) {
    GI_UNROLL
    for (int i = 0; i < V; ++i) {
      const A difference = s.key[i] - top[i];
      const bool higher = difference > 0;
      const A e = exponential<T>(higher ? -difference : difference);  // of the lower, to the higher
      const A old = higher ? e : A(1), now = higher ? A(1) : e;
      total[i] = first ? A(1) : total[i] * old + now;
      sum[i] = first ? s.value[i] : sum[i] * old + now * s.value[i];
      top[i] = first || higher ? s.key[i] : top[i];
    }
  }
  // Divides; an infinite key makes NaN, as in any softmax.
  GI_HOST_DEVICE void finish() {
    GI_UNROLL
    for (int i = 0; i < V; ++i) {
      total[i] = A(1) / (total[i] + (top[i] - top[i]));
      sum[i] *= total[i];
    }
  }
};

template <class T, int V> struct Forward {
  static constexpr const char* kName = "deformable_aggregation";
  using A = typename Accumulate<T>::type;
  Sources<T, V> sources;
  Map<const T> features;
  Map<T> output;

  GI_HOST_DEVICE void operator()(i64 b, i64 pixel, const Team& team) const {
    i64 y, x;
    split(pixel, sources.flow.width, y, x);
    for (i64 c = team.lane * V; c < sources.channels; c += i64(team.lanes) * V) {
      A key_weight[V], value_weight[V], bias[V], out[V];
      load_weights(sources.key_error_weight, c, true, key_weight);
      load_weights(sources.value_error_weight, c, true, value_weight);
      load_weights(sources.bias, c, true, bias);
      Running<T, V> running = {};
      for (i64 t = 0; t < sources.frames; ++t)
        running.take(t == 0, Sample<T, V>(sources, b, t, y, x, c, true, key_weight, value_weight));
      running.finish();
      widen(read<T, V>(features.at(b, y, x) + features.template channel<V>(c)), out);
      GI_UNROLL
      for (int i = 0; i < V; ++i) out[i] += bias[i] + running.sum[i];
      write(output.at(b, y, x) + output.template channel<V>(c), out);
    }
  }
};

// ---- backward ----

// An item is a strip of pixels in one block of channels; a thread has V channels, twice through the
// references: for the softmax, then for the gradients. Gradients of the warped keys and values are
// written to memory, from which SourceGradient gathers those of the keys and values.
template <class T, int V> struct Gradients {
  static constexpr const char* kName = "deformable_aggregation_backward";
  using A = typename Accumulate<T>::type;
  Sources<T, V> sources;
  Map<const T> grad;
  T *warped_keys, *warped_values;  // [B,T,H*W,C], or null
  A* map_parts;                    // [blocks,B,T,3,H*W], or null
  A* weight_parts;                 // [B,strips,3,C]
  i64 batch, blocks, strips, pixels;
  int block_lanes;

  GI_HOST_DEVICE void operator()(i64 item, i64 strip, const Team& team) const {
    i64 b, block;
    split(item, blocks, b, block);
    // Where the lanes of a block are not threads of their own, one does them all.
    for (int lane = team.lane; lane < block_lanes; lane += team.lanes) {
      const i64 c = (block * block_lanes + lane) * V;
      channels_of(b, block, strip, c, c < sources.channels, lane >= team.lanes, team);
    }
  }

 private:
  GI_HOST_DEVICE void channels_of(i64 b, i64 block, i64 strip, i64 c, bool there, bool more, const Team& team) const {
    const i64 T_ = sources.frames, C = sources.channels;
    A key_weight[V], value_weight[V];
    load_weights(sources.key_error_weight, c, there, key_weight);
    load_weights(sources.value_error_weight, c, there, value_weight);
    A sum_key[V] = {}, sum_value[V] = {}, sum_bias[V] = {};
    for (i64 pixel = strip * kStrip; pixel < minimum(pixels, (strip + 1) * kStrip); ++pixel) {
      i64 y, x;
      split(pixel, sources.flow.width, y, x);
      A g[V];
      widen(read_if<T, V>(there, grad.at(b, y, x) + grad.template channel<V>(c)), g);
      Running<T, V> running = {};
      for (i64 t = 0; t < T_; ++t)
        running.take(t == 0, Sample<T, V>(sources, b, t, y, x, c, there, key_weight, value_weight));
      running.finish();
      for (i64 t = 0; t < T_; ++t) {
        const Sample<T, V> s(sources, b, t, y, x, c, there, key_weight, value_weight);
        A of_key[V], of_value[V];
        A dots[5] = {};  // of the four taps, of the error
        GI_UNROLL
        for (int i = 0; i < V; ++i) {
          of_value[i] = exponential<T>(s.key[i] - running.top[i]) * running.total[i] * g[i];
          of_key[i] = of_value[i] * (s.value[i] - running.sum[i]);
          sum_key[i] += of_key[i] * s.error;
          sum_value[i] += of_value[i] * s.error;
          dots[4] += of_key[i] * key_weight[i] + of_value[i] * value_weight[i];
        }
        const i64 frame = b * T_ + t;
        if (warped_keys && there) {
          write(warped_keys + (frame * pixels + pixel) * C + c, of_key);
          write(warped_values + (frame * pixels + pixel) * C + c, of_value);
        }
        if (!map_parts) continue;
        GI_UNROLL
        for (int k = 0; k < 4; ++k) dots[k] = dot(of_key, s.key_tap[k]) + dot(of_value, s.value_tap[k]);
        if (!there)
          for (A& d : dots) d = 0;
        team.sum(dots);
        if (!team.leader()) continue;
        A gx = 0, gy = 0;
        GI_UNROLL
        for (int k = 0; k < 4; ++k) {
          if (!s.taps.inside[k]) continue;  // not zero where the gradient is NaN
          gx += dots[k] * s.taps.weight_dx(k);
          gy += dots[k] * s.taps.weight_dy(k);
        }
        A* part = map_parts + ((block * batch * T_ + frame) * 3) * pixels + pixel;
        part[0] = (more ? part[0] : A(0)) + gx;
        part[pixels] = (more ? part[pixels] : A(0)) + gy;
        part[2 * pixels] = (more ? part[2 * pixels] : A(0)) + dots[4];
      }
      GI_UNROLL
      for (int i = 0; i < V; ++i) sum_bias[i] += g[i];
    }
    if (!there) return;
    A* weights = weight_parts + (b * strips + strip) * 3 * C + c;
    GI_UNROLL
    for (int i = 0; i < V; ++i) {
      weights[i] = sum_key[i];
      weights[C + i] = sum_value[i];
      weights[2 * C + i] = sum_bias[i];
    }
  }
};

template <class T, int V> struct SourceGradient {
  static constexpr const char* kName = "deformable_aggregation_backward_sources";
  using A = typename Accumulate<T>::type;
  ContributorLists<A> lists;
  const T *warped_keys, *warped_values;  // as above
  Frames<T> grad_keys, grad_values;
  i64 channels, frames;

  GI_HOST_DEVICE void operator()(i64 frame, i64 pixel, const Team& team) const {
    i64 y, x, b, t;
    split(pixel, lists.width, y, x);
    split(frame, frames, b, t);
    const i64 first = frame * lists.pixels();
    for (i64 c = team.lane * V; c < channels; c += i64(team.lanes) * V) {
      A key[V] = {}, value[V] = {};
      lists.for_each_four(frame, y, x, [&](const i64 (&from)[4], const A (&weight)[4], const bool (&there)[4]) {
        Pack<T, V> of_key[4], of_value[4];
        GI_UNROLL
        for (int k = 0; k < 4; ++k) {
          of_key[k] = read_if<T, V>(there[k], warped_keys + (first + from[k]) * channels + c);
          of_value[k] = read_if<T, V>(there[k], warped_values + (first + from[k]) * channels + c);
        }
        GI_UNROLL
        for (int k = 0; k < 4; ++k) {
          add(key, weight[k], of_key[k]);
          add(value, weight[k], of_value[k]);
        }
      });
      write(grad_keys.at(b, t, y, x) + grad_keys.template channel<V>(c), key);
      write(grad_values.at(b, t, y, x) + grad_values.template channel<V>(c), value);
    }
  }
};

template <class T> bool packs(const DeformableForward& a) {
  return packed<T>(a.keys, 5, 2) && packed<T>(a.values, 5, 2);
}

template <class T> void forward(const DeformableForward& a, Stream stream) {
  with_width<T>(packs<T>(a) && packed<T>(a.features, 4, 1) && packed<T>(a.output, 4, 1), [&](auto width) {
    constexpr int V = decltype(width)::value;
    const Forward<T, V> body{Sources<T, V>(a), Map<const T>(a.features), Map<T>(a.output)};
    const int lanes = lanes_for((a.keys.size[2] + V - 1) / V);
    launch_teams(body, a.keys.size[0], a.keys.size[3] * a.keys.size[4], lanes, stream);
  });
}

// How the channels are cut into blocks, and the pixels into strips. The same for all strides, so that the
// parts can be allocated before.
template <class T> struct Cut {
  i64 strips, blocks;
  int lanes;

  Cut(const DeformableForward& a, int V)
      : strips((a.keys.size[3] * a.keys.size[4] + kStrip - 1) / kStrip),
        lanes(lanes_for((a.keys.size[2] + kPack<T> - 1) / kPack<T>) * kPack<T> / V) {
    const i64 channels = i64(lanes) * V;
    blocks = (a.keys.size[2] + channels - 1) / channels;
  }
};

template <class T> void backward(const DeformableBackward& back, void* memory, Stream stream) {
  using A = typename Accumulate<T>::type;
  const DeformableForward& a = back.forward;
  const i64 B = a.keys.size[0], frames = a.keys.size[1], C = a.keys.size[2], H = a.keys.size[3], W = a.keys.size[4];
  const bool sources = back.grad_keys.data;
  T* warped = sources ? static_cast<T*>(memory) : nullptr;
  const i64 warped_size = B * frames * H * W * C;
  with_width<T>(packs<T>(a) && packed<T>(back.grad, 4, 1), [&](auto width) {
    constexpr int V = decltype(width)::value;
    const Cut<T> cut(a, V);
    const Gradients<T, V> body{Sources<T, V>(a),
                               Map<const T>(back.grad),
                               warped,
                               sources ? warped + warped_size : nullptr,
                               static_cast<A*>(back.map_parts),
                               static_cast<A*>(back.weight_parts),
                               B,
                               cut.blocks,
                               cut.strips,
                               H * W,
                               cut.lanes};
    launch_teams(body, B * cut.blocks, cut.strips, minimum(cut.lanes, kWarp), stream);
  });
  if (!sources) return;
  const auto lists = lists_in<A>(warped + (2 * warped_size + 7) / 8 * 8, B * frames, int(H), int(W));
  make_lists(lists, Sources<T, 1>(a).flow, B * frames, stream);
  with_width<T>(packed<T>(back.grad_keys, 5, 2) && packed<T>(back.grad_values, 5, 2), [&](auto width) {
    constexpr int V = decltype(width)::value;
    const SourceGradient<T, V> body{lists,   warped, warped + warped_size, Frames<T>(back.grad_keys),
                                    Frames<T>(back.grad_values), C,      frames};
    launch_teams(body, B * frames, H * W, lanes_for((C + V - 1) / V), stream);
  });
}

template <class A> void reduce(const DeformableReduce& a, Stream stream) {
  const i64 plane = i64(a.height) * a.width;
  const A* parts = static_cast<const A*>(a.map_parts);
  const i64 block_stride = a.frames * 3 * plane;
  launch_adjoint(ResizeAdjoint<A>{parts, static_cast<A*>(a.grad_flows), a.blocks, block_stride, plane, 3 * plane,
                                  a.height, a.width, a.flow_h, a.flow_w, 2, ResizeAxis<A>(a.flow_h, a.height),
                                  ResizeAxis<A>(a.flow_w, a.width), A(a.width) / A(a.flow_w),
                                  A(a.height) / A(a.flow_h)},
                 a.frames * 2, stream);
  launch_adjoint(ResizeAdjoint<A>{parts + 2 * plane, static_cast<A*>(a.grad_errors), a.blocks, block_stride, plane,
                                  3 * plane, a.height, a.width, a.error_h, a.error_w, 1,
                                  ResizeAxis<A>(a.error_h, a.height), ResizeAxis<A>(a.error_w, a.width), A(1), A(1)},
                 a.frames, stream);
}

template <class T> i64 memory_bytes(const DeformableForward& a) {
  const i64 frames = a.keys.size[0] * a.keys.size[1], H = a.keys.size[3], W = a.keys.size[4];
  return (2 * frames * a.keys.size[2] * H * W + 7) / 8 * 8 * i64(sizeof(T)) +
         contributor_bytes<typename Accumulate<T>::type>(frames, H, W);
}

}  // namespace

GI_END_VARIANT

namespace gi {

void deformable_forward(const DeformableForward& a, Stream stream) {
  GI_VARIANT::with_dtype(a.keys.dtype, [&](auto t) { GI_VARIANT::forward<decltype(t)>(a, stream); });
}

DeformableParts deformable_parts(const DeformableForward& a) {
  DeformableParts parts = {};
  GI_VARIANT::with_dtype(a.keys.dtype, [&](auto t) {
    const GI_VARIANT::Cut<decltype(t)> cut(a, GI_VARIANT::kPack<decltype(t)>);
    parts = {cut.blocks, a.keys.size[0] * cut.strips};
  });
  return parts;
}

i64 deformable_memory_bytes(const DeformableForward& a) {
  i64 bytes = 0;
  GI_VARIANT::with_dtype(a.keys.dtype, [&](auto t) { bytes = GI_VARIANT::memory_bytes<decltype(t)>(a); });
  return bytes;
}

void deformable_backward(const DeformableBackward& a, void* memory, Stream stream) {
  GI_VARIANT::with_dtype(a.forward.keys.dtype,
                         [&](auto t) { GI_VARIANT::backward<decltype(t)>(a, memory, stream); });
}

void deformable_reduce(const DeformableReduce& a, Stream stream) {
  if (a.dtype == Dtype::f64) GI_VARIANT::reduce<double>(a, stream);
  else GI_VARIANT::reduce<float>(a, stream);
}

}  // namespace gi
