#include "deformable_aggregation/kernel.h"

#include "common/gather.h"

GI_BEGIN_VARIANT

namespace {

// ---- one pixel ----

// What all channels of a pixel share, per reference.
template <class A, class S> struct Reference {
  RowTaps<A, S> keys, values;
  A error;
};

template <class A> struct Weights {
  const A *key_error, *value_error, *bias;  // padded to whole vectors
};

// The key of reference `r` at channels c...: its warped key with the error's share.
template <class A, class S>
GI_HOST_DEVICE Vec<A> key_at(const Reference<A, S>& r, const Weights<A>& w, i64 c) {
  return gather<A, S>(r.keys, c) + load<A>(w.key_error + c) * r.error;
}

template <class A, class S>
GI_HOST_DEVICE Vec<A> value_at(const Reference<A, S>& r, const Weights<A>& w, i64 c) {
  return gather<A, S>(r.values, c) + load<A>(w.value_error + c) * r.error;
}

// Replaces the keys in k[0..T) by exp(k - max); returns one over their sum.
template <class A>
GI_HOST_DEVICE Vec<A> softmax_in_place(Vec<A>* k, i64 T) {
  Vec<A> top = k[0];
  for (i64 t = 1; t < T; ++t) top = vmax<A>(k[t], top);
  Vec<A> sum = {};
  for (i64 t = 0; t < T; ++t) {
    k[t] = vexp<A>(k[t] - top);
    sum += k[t];
  }
  return A(1) / sum;
}

// ---- forward ----

// Vectors of channels that go through the references together: the taps of one reference are read over
// a long stretch before those of the next, since memory serves few streams at a time well.
constexpr i64 kStretch = 32;

// `features` and `out` may be the same row; both hold `channels` rounded up to whole vectors. `k` holds
// T vectors for each of a stretch.
template <class A, class S, class F>
GI_HOST_DEVICE void aggregate_pixel(const Reference<A, S>* references, i64 T, const Weights<A>& weights,
                                    i64 channels, const F* features, F* out, Vec<A>* k) {
  constexpr i64 L = kLanes<A>;
  for (i64 c0 = 0; c0 < channels; c0 += kStretch * L) {
    const i64 count = minimum(kStretch, (channels - c0 + L - 1) / L);
    for (i64 t = 0; t < T; ++t)
      for (i64 i = 0; i < count; ++i) k[i * T + t] = key_at(references[t], weights, c0 + i * L);
    Vec<A> sum[kStretch];
    for (i64 i = 0; i < count; ++i) {
      const Vec<A> scale = softmax_in_place<A>(k + i * T, T);
      for (i64 t = 0; t < T; ++t) k[i * T + t] *= scale;
      sum[i] = load<A>(features + c0 + i * L) + load<A>(weights.bias + c0 + i * L);
    }
    for (i64 t = 0; t < T; ++t)
      for (i64 i = 0; i < count; ++i) sum[i] += k[i * T + t] * value_at(references[t], weights, c0 + i * L);
    for (i64 i = 0; i < count; ++i) store<A>(out + c0 + i * L, sum[i]);
  }
}

// Frames of item b whose channels [c0, c0 + channels) can be read as rows.
template <class S> struct Sources {
  const Block<S>*keys, *values;  // T each
};

template <class A>
struct Maps {
  const DeformableForward& a;
  i64 b, T;
  int H, W;

  FlowField<A> flow(i64 t) const {
    return FlowField<A>(static_cast<const A*>(a.flows) + (b * T + t) * 2 * a.flow_h * a.flow_w, a.flow_h, a.flow_w,
                        H, W);
  }
  ResizedMap<A> error(i64 t) const {
    return ResizedMap<A>(static_cast<const A*>(a.errors) + (b * T + t) * i64(a.error_h) * a.error_w, a.error_h,
                         a.error_w, H, W);
  }
};

template <class A, class S>
GI_HOST_DEVICE void look_up(Reference<A, S>& r, const Taps<A>& taps, A error, const Block<S>& keys,
                            const Block<S>& values) {
  r.keys = row_taps(taps, keys);
  r.values = row_taps(taps, values);
  r.error = error;
}

template <class A, class S, class T>
void forward_rows(const Maps<A>& maps, const Sources<S>& sources, const Weights<A>& weights, i64 channels, i64 y0,
                  i64 y1, const Plane<const T>& features, const Plane<T>& out, A* tile, Reference<A, S>* references,
                  Vec<A>* k) {
  const i64 W = maps.W, stride = padded<A>(channels), frames = maps.T;
  const bool direct = in_place<A>(features, channels) && in_place<A>(out, channels);
  for (i64 y = y0; y < y1; ++y)
    for (i64 x0 = 0; x0 < W; x0 += kTilePixels) {
      const i64 pixels = minimum(kTilePixels, W - x0);
      const T* from = features.data + y * features.sy + x0 * features.sx;
      T* to = out.data + y * out.sy + x0 * out.sx;
      if (!direct) stage_row<A, T>(from, features.sc, features.sx, channels, pixels, tile, stride);
      for (i64 p = 0; p < pixels; ++p) {
        for (i64 t = 0; t < frames; ++t)
          look_up(references[t], maps.flow(t).taps(y, x0 + p), maps.error(t).at(0, y, x0 + p), sources.keys[t],
                  sources.values[t]);
        if (direct)
          aggregate_pixel<A, S, T>(references, frames, weights, channels, from + p * features.sx, to + p * out.sx, k);
        else
          aggregate_pixel<A, S, A>(references, frames, weights, channels, tile + p * stride, tile + p * stride, k);
      }
      if (!direct) unstage_row<A, T>(tile, stride, channels, pixels, to, out.sc, out.sx);
    }
}

constexpr i64 kBandRows = 2;

struct Pieces {
  bool in_place;
  i64 rows, bands, channels, blocks;
};

template <class A>
bool rows_in_place(const DeformableForward& a) {
  return a.keys.stride[2] == 1 && a.values.stride[2] == 1 && a.keys.size[2] % kLanes<A> == 0;
}

template <class A>
Pieces pieces_of(const DeformableForward& a) {
  const i64 T = a.keys.size[1], C = a.keys.size[2], H = a.keys.size[3], W = a.keys.size[4];
  if (rows_in_place<A>(a) && C <= kMaxBlock) return {true, kBandRows, (H + kBandRows - 1) / kBandRows, C, 1};
  const i64 channels = slab_channels<A>(C, H * W * T);
  return {false, H, 1, channels, (C + channels - 1) / channels};
}

// The weights of channels [c0, c0 + channels), padded with zeros.
template <class A>
Weights<A> padded_weights(const DeformableForward& a, i64 c0, i64 channels, Scratch& memory) {
  const i64 stride = padded<A>(channels);
  memory.reserve(3 * stride * i64(sizeof(A)));
  const void* sources[3] = {a.key_error_weight, a.value_error_weight, a.value_bias};
  for (int i = 0; i < 3; ++i)
    for (i64 c = 0; c < stride; ++c)
      memory.as<A>()[i * stride + c] = c < channels ? static_cast<const A*>(sources[i])[c0 + c] : A(0);
  const A* w = memory.as<A>();
  return {w, w + stride, w + 2 * stride};
}

// Blocks of all frames' keys and values: in place if S is the storage type, else copied to `slab`.
template <class A, class S, class T>
Sources<const S> sources_of(const DeformableForward& a, i64 b, i64 c0, i64 channels, Scratch& blocks, Scratch& slab) {
  const i64 frames = a.keys.size[1], H = a.keys.size[3], W = a.keys.size[4];
  const i64 stride = padded<A>(channels), slab_size = H * W * stride;
  blocks.reserve(2 * frames * i64(sizeof(Block<const S>)));
  auto* list = blocks.as<Block<const S>>();
  for (i64 t = 0; t < frames; ++t)
    for (int which = 0; which < 2; ++which) {
      const auto map = frame_of<const T>(which ? a.values : a.keys, b, t, c0);
      auto& block = list[which * frames + t];
      if constexpr (sizeof(S) == sizeof(T)) {
        if (in_place<A>(map, channels)) {
          block = {reinterpret_cast<const S*>(map.data), map.sy, map.sx};
          continue;
        }
      }
      if constexpr (sizeof(S) == sizeof(A)) {
        slab.reserve(2 * frames * slab_size * i64(sizeof(A)));
        A* memory = slab.as<A>() + (which * frames + t) * slab_size;
        stage<A, T>(map, channels, 0, H, W, memory, stride);
        block = {memory, W * stride, stride};
      }
    }
  return {list, list + frames};
}

template <class S, class T>
void forward_typed(const DeformableForward& a, const Pieces& s, i64 begin, i64 end) {
  using A = typename Accumulate<T>::type;
  const i64 C = a.keys.size[2], H = a.keys.size[3], W = a.keys.size[4], frames = a.keys.size[1];
  Scratch weight_memory, blocks, slab, tile(kTilePixels * padded<A>(s.channels) * i64(sizeof(A))),
      references(frames * i64(sizeof(Reference<A, const S>))), k(kStretch * frames * i64(sizeof(Vec<A>)));
  for (i64 item = begin; item < end; ++item) {
    const i64 band = item % s.bands, block = item / s.bands % s.blocks, b = item / s.bands / s.blocks;
    const i64 c0 = block * s.channels, channels = minimum(s.channels, C - c0);
    const i64 y0 = band * s.rows, y1 = minimum(H, y0 + s.rows);
    const auto weights = padded_weights<A>(a, c0, channels, weight_memory);
    const auto sources = sources_of<A, S, T>(a, b, c0, channels, blocks, slab);
    forward_rows<A, const S, T>({a, b, frames, int(H), int(W)}, sources, weights, channels, y0, y1,
                                plane_of<const T>(a.features, b, c0), plane_of<T>(a.output, b, c0), tile.as<A>(),
                                references.as<Reference<A, const S>>(), k.as<Vec<A>>());
  }
}

i64 forward_items(const DeformableForward& a) {
  const Pieces s = a.keys.dtype == Dtype::f64 ? pieces_of<double>(a) : pieces_of<float>(a);
  return a.keys.size[0] * s.bands * s.blocks;
}

void forward(const DeformableForward& a, i64 begin, i64 end) {
  with_dtype(a.keys.dtype, [&](auto t) {
    using T = decltype(t);
    using A = typename Accumulate<T>::type;
    const Pieces s = pieces_of<A>(a);
    if (s.in_place) forward_typed<T, T>(a, s, begin, end);
    else forward_typed<A, T>(a, s, begin, end);
  });
}

// ---- backward: a piece of work is a channel block of one item, so no two pieces share a number ----

i64 backward_blocks(i64 channels) { return (channels + kGradientBlock - 1) / kGradientBlock; }

// Sums over the channels of a pixel, per reference.
template <class A> struct PixelSums {
  Vec<A> tap[4];  // gradient times the four taps of key and value
  Vec<A> error;
};

template <class A> struct PixelMemory {
  Vec<A>*k, *v;
  PixelSums<A>* sums;
};

template <class A, class S>
GI_HOST_DEVICE void backward_pixel(const Reference<A, S>* references, const Taps<A>* taps, i64 T,
                                   const Weights<A>& weights, i64 channels, const A* grad, bool need_sources,
                                   bool need_maps, A* const (*grad_keys)[4], A* const (*grad_values)[4],
                                   A* weight_sums, i64 weight_stride, const PixelMemory<A>& memory) {
  if (need_maps)
    for (i64 t = 0; t < T; ++t) memory.sums[t] = PixelSums<A>();
  for (i64 c = 0; c < channels; c += kLanes<A>) {
    for (i64 t = 0; t < T; ++t) memory.k[t] = key_at(references[t], weights, c);
    const Vec<A> scale = softmax_in_place<A>(memory.k, T);
    Vec<A> mean = {};
    for (i64 t = 0; t < T; ++t) {
      memory.v[t] = value_at(references[t], weights, c);
      memory.k[t] *= scale;
      mean += memory.k[t] * memory.v[t];
    }
    const Vec<A> g = load<A>(grad + c);
    Vec<A> key_weight = {}, value_weight = {};
    for (i64 t = 0; t < T; ++t) {
      const Vec<A> gv = memory.k[t] * g;                   // of value t
      const Vec<A> gk = gv * (memory.v[t] - mean);         // of key t
      key_weight += gk * references[t].error;
      value_weight += gv * references[t].error;
      if (need_sources)
        for (int i = 0; i < 4; ++i) {
          if (!taps[t].inside[i]) continue;
          const A w = references[t].keys.weight[i];
          A* row = grad_keys[t][i] + c;
          store<A>(row, load<A>(row) + gk * w);
          row = grad_values[t][i] + c;
          store<A>(row, load<A>(row) + gv * w);
        }
      if (need_maps) {
        auto& sums = memory.sums[t];
        sums.error += gk * load<A>(weights.key_error + c) + gv * load<A>(weights.value_error + c);
        for (int i = 0; i < 4; ++i)
          sums.tap[i] += gk * load<A>(references[t].keys.row[i] + c) + gv * load<A>(references[t].values.row[i] + c);
      }
    }
    store<A>(weight_sums + c, load<A>(weight_sums + c) + key_weight);
    store<A>(weight_sums + weight_stride + c, load<A>(weight_sums + weight_stride + c) + value_weight);
    store<A>(weight_sums + 2 * weight_stride + c, load<A>(weight_sums + 2 * weight_stride + c) + g);
  }
}

template <class S, class T>
void backward_typed(const DeformableBackward& back, i64 begin, i64 end) {
  using A = typename Accumulate<T>::type;
  const DeformableForward& a = back.forward;
  const i64 B = a.keys.size[0], frames = a.keys.size[1], C = a.keys.size[2], H = a.keys.size[3], W = a.keys.size[4];
  const i64 blocks = backward_blocks(C);
  const bool need_sources = back.grad_keys.data, need_maps = back.map_parts;
  Scratch weight_memory, block_memory, slab, grad_slab, sum_slab;
  Scratch references(frames * i64(sizeof(Reference<A, const S>))), taps(frames * i64(sizeof(Taps<A>))),
      k(frames * i64(sizeof(Vec<A>))), v(frames * i64(sizeof(Vec<A>))), sums(frames * i64(sizeof(PixelSums<A>))),
      rows(2 * frames * i64(sizeof(A* [4]))), gradients(2 * frames * i64(sizeof(GradientBlock<A, T>))),
      weight_sums(3 * kGradientBlock * i64(sizeof(A)));
  auto* reference = references.as<Reference<A, const S>>();
  auto* tap = taps.as<Taps<A>>();
  auto* row = rows.as<A* [4]>();
  auto* gradient = gradients.as<GradientBlock<A, T>>();
  const PixelMemory<A> memory{k.as<Vec<A>>(), v.as<Vec<A>>(), sums.as<PixelSums<A>>()};
  for (i64 item = begin; item < end; ++item) {
    const i64 block = item % blocks, b = item / blocks;
    const i64 c0 = block * kGradientBlock, channels = minimum(kGradientBlock, C - c0), stride = padded<A>(channels);
    const Maps<A> maps{a, b, frames, int(H), int(W)};
    const auto weights = padded_weights<A>(a, c0, channels, weight_memory);
    const auto sources = sources_of<A, S, T>(a, b, c0, channels, block_memory, slab);
    const auto grad = rows_of<A, T>(plane_of<const T>(back.grad, b, c0), channels, H, W, grad_slab);
    if (need_sources) {
      const bool staged = !(sizeof(A) == sizeof(T) && back.grad_keys.stride[2] == 1 &&
                            back.grad_values.stride[2] == 1 && channels % kLanes<A> == 0);
      if (staged) sum_slab.reserve(2 * frames * H * W * stride * i64(sizeof(A)));
      for (i64 i = 0; i < 2 * frames; ++i)
        gradient[i].start(frame_of<T>(i < frames ? back.grad_keys : back.grad_values, b, i % frames, c0), channels, H,
                          W, sum_slab.as<A>() + (staged ? i * H * W * stride : 0));
    }
    std::memset(weight_sums.as<A>(), 0, 3 * kGradientBlock * sizeof(A));
    A* map_parts = need_maps ? static_cast<A*>(back.map_parts) + (block * B + b) * frames * 3 * H * W : nullptr;
    for (i64 y = 0; y < H; ++y)
      for (i64 x = 0; x < W; ++x) {
        for (i64 t = 0; t < frames; ++t) {
          tap[t] = maps.flow(t).taps(y, x);
          look_up(reference[t], tap[t], maps.error(t).at(0, y, x), sources.keys[t], sources.values[t]);
          if (need_sources)
            for (int i = 0; i < 4; ++i)
              if (tap[t].inside[i]) {
                row[t][i] = gradient[t].block.at(tap[t].y(i), tap[t].x(i));
                row[frames + t][i] = gradient[frames + t].block.at(tap[t].y(i), tap[t].x(i));
              }
        }
        backward_pixel<A, const S>(reference, tap, frames, weights, stride, grad.at(y, x), need_sources, need_maps,
                                   row, row + frames, weight_sums.as<A>(), kGradientBlock, memory);
        if (need_maps)
          for (i64 t = 0; t < frames; ++t) {
            A gx = 0, gy = 0;
            for (int i = 0; i < 4; ++i) {
              if (!tap[t].inside[i]) continue;  // not zero where the gradient is NaN
              const A d = sum_lanes<A>(memory.sums[t].tap[i]);
              gx += d * tap[t].weight_dx(i);
              gy += d * tap[t].weight_dy(i);
            }
            A* part = map_parts + t * 3 * H * W + y * W + x;
            part[0] = gx;
            part[H * W] = gy;
            part[2 * H * W] = sum_lanes<A>(memory.sums[t].error);
          }
      }
    if (need_sources)
      for (i64 i = 0; i < 2 * frames; ++i) gradient[i].finish();
    for (int i = 0; i < 3; ++i)
      for (i64 c = 0; c < channels; ++c)
        static_cast<A*>(back.weight_parts)[(b * 3 + i) * C + c0 + c] = weight_sums.as<A>()[i * kGradientBlock + c];
  }
}

void backward(const DeformableBackward& back, i64 begin, i64 end) {
  with_dtype(back.forward.keys.dtype, [&](auto t) {
    using T = decltype(t);
    using A = typename Accumulate<T>::type;
    if (rows_in_place<A>(back.forward)) backward_typed<T, T>(back, begin, end);
    else backward_typed<A, T>(back, begin, end);
  });
}

template <class A>
void reduce_typed(const DeformableReduce& a, i64 begin, i64 end) {
  const i64 plane = i64(a.height) * a.width, stride = a.frames * 3 * plane;
  const A scale[2] = {A(a.width) / A(a.flow_w), A(a.height) / A(a.flow_h)}, one = 1;
  for (i64 f = begin; f < end; ++f) {
    const A* parts = static_cast<const A*>(a.map_parts) + f * 3 * plane;
    resize_backward<A>(parts, a.blocks, stride, 2, a.height, a.width, scale,
                       static_cast<A*>(a.grad_flows) + f * 2 * a.flow_h * a.flow_w, a.flow_h, a.flow_w);
    resize_backward<A>(parts + 2 * plane, a.blocks, stride, 1, a.height, a.width, &one,
                       static_cast<A*>(a.grad_errors) + f * i64(a.error_h) * a.error_w, a.error_h, a.error_w);
  }
}

void reduce(const DeformableReduce& a, i64 begin, i64 end) {
  if (a.dtype == Dtype::f64) reduce_typed<double>(a, begin, end);
  else reduce_typed<float>(a, begin, end);
}

}  // namespace

extern const DeformableKernels deformable_kernels;
const DeformableKernels deformable_kernels = {forward_items, forward, backward_blocks, backward, reduce};

GI_END_VARIANT
