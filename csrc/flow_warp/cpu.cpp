#include "flow_warp/kernel.h"

#include "common/gather.h"

GI_BEGIN_VARIANT

// Three ways to reach the channels of a pixel:
// - in place: channels contiguous in whole vectors; a piece of work is a band of rows;
// - slab: a block of channels is first copied channels-last; a piece of work is one block;
// - strided: few channels, or a frame too large to copy; scalar, offsets shared by the channels.
enum class Path { in_place, slab, strided };

constexpr i64 kFewChannels = 8;
constexpr i64 kSlabBytes = i64(16) << 20;
constexpr i64 kBandRows = 4;

// A result of this size no longer fits the caches together with its input.
constexpr i64 kStreamedBytes = i64(16) << 20;

template <class A>
Path choose_path(const Array& input) {
  const i64 C = input.size[1], pixels = input.size[2] * input.size[3];
  if (input.stride[1] == 1 && C % kLanes<A> == 0 && C <= kMaxBlock) return Path::in_place;
  if (C < kFewChannels || pixels * kLanes<A> * i64(sizeof(A)) > kSlabBytes) return Path::strided;
  return Path::slab;
}

template <class A>
FlowField<A> flow_of(const void* flow, i64 b, int h, int w, int H, int W) {
  return FlowField<A>(static_cast<const A*>(flow) + b * 2 * h * w, h, w, H, W);
}

// ---- forward ----

// Whether a result is written past the caches: large, and in whole aligned vectors.
template <class A, class T>
bool streams(const Array& out) {
  if (!std::is_same_v<A, T> || out.stride[1] != 1 || out.size[1] % kLanes<A> != 0) return false;
  i64 bytes = sizeof(A), offsets = reinterpret_cast<i64>(out.data) / i64(sizeof(A));
  for (int i = 0; i < 4; ++i) {
    bytes *= out.size[i];
    if (i != 1) offsets |= out.stride[i];
  }
  return bytes >= kStreamedBytes && offsets % kLanes<A> == 0;
}

template <class A, class S, class T>
void forward_rows(const Block<S>& block, const FlowField<A>& flow, i64 channels, i64 y0, i64 y1,
                  const Plane<T>& out, bool streamed, A* tile) {
  constexpr i64 L = kLanes<A>;
  const i64 W = flow.width, stride = padded<A>(channels);
  const bool direct = out.sc == 1 && channels % L == 0;
  RowTaps<A, S> row[kTilePixels];  // all first: then the gathers of neighbours overlap
  for (i64 y = y0; y < y1; ++y)
    for (i64 x0 = 0; x0 < W; x0 += kTilePixels) {
      const i64 pixels = minimum(kTilePixels, W - x0);
      T* target = out.data + y * out.sy + x0 * out.sx;
      for (i64 p = 0; p < pixels; ++p) row[p] = row_taps(flow.taps(y, x0 + p), block);
      for (i64 p = 0; p < pixels; ++p) {
        const RowTaps<A, S> taps = row[p];
        if (streamed) {
          if constexpr (std::is_same_v<A, T>)
            for (i64 c = 0; c < channels; c += L) stream<A>(target + p * out.sx + c, gather<A, S>(taps, c));
        } else if (direct) {
          for (i64 c = 0; c < channels; c += L) store<A>(target + p * out.sx + c, gather<A, S>(taps, c));
        } else {
          for (i64 c = 0; c < channels; c += L) store<A>(tile + p * stride + c, gather<A, S>(taps, c));
        }
      }
      if (!direct) unstage_row<A, T>(tile, stride, channels, pixels, target, out.sc, out.sx);
    }
}

template <class A, class T>
void forward_strided(const Plane<const T>& in, const FlowField<A>& flow, i64 channels, i64 y0, i64 y1,
                     const Plane<T>& out) {
  for (i64 y = y0; y < y1; ++y)
    for (i64 x = 0; x < flow.width; ++x) {
      const Taps<A> t = flow.taps(y, x);
      i64 offset[4];
      A weight[4];
      for (int k = 0; k < 4; ++k) {
        offset[k] = t.y(k) * in.sy + t.x(k) * in.sx;
        weight[k] = t.weight(k);
      }
      for (i64 c = 0; c < channels; ++c) {
        A sum = 0;
        for (int k = 0; k < 4; ++k)
          if (t.inside[k]) sum += weight[k] * to_accumulate(in.data[offset[k] + c * in.sc]);
        out.data[y * out.sy + x * out.sx + c * out.sc] = Rounded<T>::from(sum);
      }
    }
}

struct Pieces {
  Path path;
  i64 rows, bands;      // rows of a band, bands of an image
  i64 channels, blocks;  // channels of a block, blocks of an image
};

template <class A>
Pieces pieces_of(const FlowWarpForward& a) {
  const i64 C = a.input.size[1], H = a.input.size[2], W = a.input.size[3];
  const Path path = choose_path<A>(a.input);
  if (path != Path::slab) return {path, kBandRows, (H + kBandRows - 1) / kBandRows, C, 1};
  const i64 channels = slab_channels<A>(C, H * W);
  return {path, H, 1, channels, (C + channels - 1) / channels};
}

template <class T>
void forward_typed(const FlowWarpForward& a, i64 begin, i64 end) {
  using A = typename Accumulate<T>::type;
  const i64 C = a.input.size[1], H = a.input.size[2], W = a.input.size[3];
  const Pieces s = pieces_of<A>(a);
  const bool streamed = streams<A, T>(a.output);
  Scratch slab, tile(kTilePixels * padded<A>(s.channels) * i64(sizeof(A)));
  for (i64 item = begin; item < end; ++item) {
    const i64 band = item % s.bands, block = item / s.bands % s.blocks, b = item / s.bands / s.blocks;
    const i64 y0 = band * s.rows, y1 = minimum(H, y0 + s.rows);
    const i64 c0 = block * s.channels, channels = minimum(s.channels, C - c0);
    const auto flow = flow_of<A>(a.flow, b, a.flow_h, a.flow_w, H, W);
    const auto in = plane_of<const T>(a.input, b, c0);
    const auto out = plane_of<T>(a.output, b, c0);
    if (s.path == Path::strided) {
      forward_strided<A, T>(in, flow, C, y0, y1, out);
    } else if (s.path == Path::in_place) {
      forward_rows<A, const T, T>({in.data, in.sy, in.sx}, flow, C, y0, y1, out, streamed, tile.as<A>());
    } else {
      const i64 stride = padded<A>(channels);
      slab.reserve(H * W * stride * i64(sizeof(A)));
      stage<A, T>(in, channels, 0, H, W, slab.as<A>(), stride);
      forward_rows<A, const A, T>({slab.as<A>(), W * stride, stride}, flow, channels, y0, y1, out, streamed,
                                  tile.as<A>());
    }
  }
  if (streamed) end_streaming();
}

i64 forward_items(const FlowWarpForward& a) {
  const Pieces s = a.input.dtype == Dtype::f64 ? pieces_of<double>(a) : pieces_of<float>(a);
  return a.input.size[0] * s.bands * s.blocks;
}

void forward(const FlowWarpForward& a, i64 begin, i64 end) {
  with_dtype(a.input.dtype, [&](auto t) { forward_typed<decltype(t)>(a, begin, end); });
}

// ---- backward: a piece of work is a channel block of one image, so no two pieces share a number ----

i64 backward_blocks(const FlowWarpBackward& a) {
  const i64 C = a.input.size[1];
  return C < kFewChannels ? 1 : (C + kGradientBlock - 1) / kGradientBlock;
}

template <class A, class S>
void backward_block(const Block<S>& in, const Block<const A>& grad, const FlowField<A>& flow, i64 channels,
                    const Block<A>& grad_input, A* grad_flow) {
  constexpr i64 L = kLanes<A>;
  const i64 H = flow.height, W = flow.width;
  for (i64 y = 0; y < H; ++y)
    for (i64 x = 0; x < W; ++x) {
      const Taps<A> t = flow.taps(y, x);
      const A* g = grad.at(y, x);
      if (grad_input.data)
        for (int k = 0; k < 4; ++k) {
          if (!t.inside[k]) continue;
          A* row = grad_input.at(t.y(k), t.x(k));
          const A weight = t.weight(k);
          for (i64 c = 0; c < channels; c += L) store<A>(row + c, load<A>(row + c) + load<A>(g + c) * weight);
        }
      if (grad_flow) {
        const auto rows = row_taps(t, in);
        Vec<A> dot[4] = {};
        for (i64 c = 0; c < channels; c += L) {
          const Vec<A> v = load<A>(g + c);
          for (int k = 0; k < 4; ++k) dot[k] += v * load<A>(rows.row[k] + c);
        }
        A gx = 0, gy = 0;
        for (int k = 0; k < 4; ++k) {
          const A d = sum_lanes<A>(dot[k]);
          gx += d * t.weight_dx(k);
          gy += d * t.weight_dy(k);
        }
        grad_flow[y * W + x] = gx;
        grad_flow[(H + y) * W + x] = gy;
      }
    }
}

// `grad_input` is [H*W,C] in accumulation type.
template <class A, class T>
void backward_strided(const Plane<const T>& in, const Plane<const T>& grad, const FlowField<A>& flow,
                      i64 channels, A* grad_input, A* grad_flow) {
  const i64 H = flow.height, W = flow.width;
  for (i64 y = 0; y < H; ++y)
    for (i64 x = 0; x < W; ++x) {
      const Taps<A> t = flow.taps(y, x);
      const T* g = grad.data + y * grad.sy + x * grad.sx;
      A gx = 0, gy = 0;
      for (int k = 0; k < 4; ++k) {
        if (!t.inside[k]) continue;
        const T* tap = in.data + t.y(k) * in.sy + t.x(k) * in.sx;
        A* target = grad_input ? grad_input + (t.y(k) * W + t.x(k)) * channels : nullptr;
        A dot = 0;
        for (i64 c = 0; c < channels; ++c) {
          const A v = to_accumulate(g[c * grad.sc]);
          dot += v * to_accumulate(tap[c * in.sc]);
          if (target) target[c] += v * t.weight(k);
        }
        gx += dot * t.weight_dx(k);
        gy += dot * t.weight_dy(k);
      }
      if (grad_flow) {
        grad_flow[y * W + x] = gx;
        grad_flow[(H + y) * W + x] = gy;
      }
    }
}

template <class T>
void backward_typed(const FlowWarpBackward& a, i64 begin, i64 end) {
  using A = typename Accumulate<T>::type;
  const i64 B = a.input.size[0], C = a.input.size[1], H = a.input.size[2], W = a.input.size[3];
  const i64 blocks = backward_blocks(a);
  Scratch in_slab, grad_slab, sum_slab;
  for (i64 item = begin; item < end; ++item) {
    const i64 block = item % blocks, b = item / blocks;
    const i64 c0 = block * kGradientBlock, channels = minimum(kGradientBlock, C - c0);
    const auto flow = flow_of<A>(a.flow, b, a.flow_h, a.flow_w, H, W);
    const auto in = plane_of<const T>(a.input, b, c0);
    const auto grad = plane_of<const T>(a.grad, b, c0);
    A* grad_flow = a.flow_parts ? static_cast<A*>(a.flow_parts) + (block * B + b) * 2 * H * W : nullptr;
    if (C < kFewChannels) {
      A* sum = nullptr;
      if (a.grad_input.data) {
        sum_slab.reserve((H * W * C + kLanes<A>) * i64(sizeof(A)));  // unstage reads whole vectors
        sum = sum_slab.as<A>();
        std::memset(sum, 0, H * W * C * sizeof(A));
      }
      backward_strided<A, T>(in, grad, flow, C, sum, grad_flow);
      if (sum) unstage<A, T>(sum, C, C, 0, H, W, plane_of<T>(a.grad_input, b, 0));
      continue;
    }
    GradientBlock<A, T> sum;
    if (a.grad_input.data) {
      sum_slab.reserve(H * W * padded<A>(channels) * i64(sizeof(A)));
      sum.start(plane_of<T>(a.grad_input, b, c0), channels, H, W, sum_slab.as<A>());
    }
    const Block<const A> g = rows_of<A, T>(grad, channels, H, W, grad_slab);
    if (in_place<A>(in, channels)) {
      backward_block<A, const T>({in.data, in.sy, in.sx}, g, flow, channels, sum.block, grad_flow);
    } else {
      const Block<const A> staged =
          grad_flow ? rows_of<A, T>(in, channels, H, W, in_slab) : Block<const A>{};
      backward_block<A, const A>(staged, g, flow, padded<A>(channels), sum.block, grad_flow);
    }
    if (a.grad_input.data) sum.finish();
  }
}

void backward(const FlowWarpBackward& a, i64 begin, i64 end) {
  with_dtype(a.input.dtype, [&](auto t) { backward_typed<decltype(t)>(a, begin, end); });
}

template <class A>
void reduce_typed(const FlowWarpReduce& a, i64 begin, i64 end) {
  const i64 plane = 2 * i64(a.height) * a.width;
  const A scale[2] = {A(a.width) / A(a.flow_w), A(a.height) / A(a.flow_h)};
  for (i64 b = begin; b < end; ++b)
    resize_backward<A>(static_cast<const A*>(a.flow_parts) + b * plane, a.blocks, a.batch * plane, 2, a.height,
                       a.width, scale, static_cast<A*>(a.grad_flow) + b * 2 * a.flow_h * a.flow_w, a.flow_h,
                       a.flow_w);
}

void reduce(const FlowWarpReduce& a, i64 begin, i64 end) {
  if (a.dtype == Dtype::f64) reduce_typed<double>(a, begin, end);
  else reduce_typed<float>(a, begin, end);
}

extern const FlowWarpKernels flow_warp_kernels;
const FlowWarpKernels flow_warp_kernels = {forward_items, forward, backward_blocks, backward, reduce};

GI_END_VARIANT
