#include "convex_upsample/kernel.h"

#include "common/staging.h"

GI_BEGIN_VARIANT

constexpr i64 kFactor = 8;
constexpr i64 kFine = kFactor * kFactor;  // fine pixels of a coarse one
constexpr int kNeighbours = 9;
constexpr i64 kMaskChannels = kNeighbours * kFine;

// Most coarse pixels whose logits are staged together: long rows of a channel are read faster.
constexpr i64 kStripPixels = 64;

// The 3x3 neighbours of coarse pixel (y, x), in fine pixels; zeros outside the map.
template <class A>
void neighbours(const A* flow, i64 h, i64 w, i64 y, i64 x, A (&values)[2][kNeighbours]) {
  for (int k = 0; k < kNeighbours; ++k) {
    const i64 row = y + k / 3 - 1, column = x + k % 3 - 1;
    const bool inside = row >= 0 && row < h && column >= 0 && column < w;
    for (int i = 0; i < 2; ++i) values[i][k] = inside ? A(kFactor) * flow[(i * h + row) * w + column] : A(0);
  }
}

// Softmax over the neighbours, whose logits lie `step` apart, of kLanes fine pixels.
template <class A, class S>
GI_HOST_DEVICE void softmax(const S* logits, i64 step, Vec<A> (&weight)[kNeighbours]) {
  for (int k = 0; k < kNeighbours; ++k) weight[k] = load<A>(logits + k * step);
  Vec<A> most = weight[0];
  for (int k = 1; k < kNeighbours; ++k) most = vmax<A>(most, weight[k]);
  Vec<A> sum = {};
  for (int k = 0; k < kNeighbours; ++k) {
    weight[k] = vexp<A>(weight[k] - most);
    sum += weight[k];
  }
  const Vec<A> scale = A(1) / sum;
  for (int k = 0; k < kNeighbours; ++k) weight[k] *= scale;
}

// Calls f(x, logits) for the pixels x of a coarse row from `first` on. The 576 logits are contiguous: read where
// they are, or staged strip by strip.
template <class A, class T, class F>
void for_logits(const Array& mask, i64 b, i64 y, i64 first, Scratch& slab, F&& f) {
  const i64 w = mask.size[3], sc = mask.stride[1], sx = mask.stride[3];
  const T* row = static_cast<const T*>(mask.data) + b * mask.stride[0] + y * mask.stride[2];
  if (sc == 1) {
    for (i64 x = first; x < w; ++x) f(x, row + x * sx);
    return;
  }
  slab.reserve(minimum(kStripPixels, w) * kMaskChannels * i64(sizeof(A)));
  for (i64 x0 = first; x0 < w; x0 += kStripPixels) {
    const i64 pixels = minimum(kStripPixels, w - x0);
    stage_row<A, T>(row + x0 * sx, sc, sx, mask.size[1], pixels, slab.as<A>(), mask.size[1]);
    for (i64 p = 0; p < pixels; ++p) f(x0 + p, static_cast<const A*>(slab.as<A>() + p * kMaskChannels));
  }
}

// ---- forward ----

// The fine pixels of kLanes coarse ones from x on, whose logits follow each other in every channel:
// they are lanes as they are, and only the result is transposed.
template <class A, class T>
void forward_lanes(const T* logits, i64 channel, const A* flow, i64 h, i64 w, i64 y, i64 x, A* out) {
  constexpr i64 L = kLanes<A>;
  constexpr i64 piece = L < kFactor ? L : kFactor;
  A from[2][kNeighbours][L];
  for (i64 lane = 0; lane < L; ++lane) {
    A values[2][kNeighbours];
    neighbours(flow, h, w, y, x + lane, values);
    for (int i = 0; i < 2; ++i)
      for (int k = 0; k < kNeighbours; ++k) from[i][k][lane] = values[i][k];
  }
  for (i64 s = 0; s < kFine; s += L) {
    Vec<A> fine[2][L];
    for (i64 j = 0; j < L; ++j) {
      Vec<A> weight[kNeighbours];
      softmax<A>(logits + (s + j) * channel, kFine * channel, weight);
      for (int i = 0; i < 2; ++i) {
        Vec<A> sum = {};
        for (int k = 0; k < kNeighbours; ++k) sum += weight[k] * load<A>(from[i][k]);
        fine[i][j] = sum;
      }
    }
    for (int i = 0; i < 2; ++i) {
      transpose<A>(fine[i]);
      for (i64 lane = 0; lane < L; ++lane)
        for (i64 j = 0; j < L; j += piece) {
          const i64 row = (s + j) / kFactor, column = (s + j) % kFactor;
          std::memcpy(out + ((i * h * kFactor + row) * w + x + lane) * kFactor + column,
                      reinterpret_cast<const A*>(&fine[i][lane]) + j, piece * sizeof(A));
        }
    }
  }
}

template <class T>
void forward_typed(const ConvexUpsampleForward& a, i64 begin, i64 end) {
  using A = typename Accumulate<T>::type;
  const i64 h = a.mask.size[2], w = a.mask.size[3];
  Scratch slab;
  for (i64 item = begin; item < end; ++item) {
    const i64 b = item / h, y = item % h;
    const A* flow = static_cast<const A*>(a.flow) + b * 2 * h * w;
    A* out = static_cast<A*>(a.output) + (b * 2 * h + y) * kFine * w;
    i64 first = 0;
    if (a.mask.stride[3] == 1)
      for (; first + kLanes<A> <= w; first += kLanes<A>)
        forward_lanes<A, T>(static_cast<const T*>(a.mask.data) + b * a.mask.stride[0] + y * a.mask.stride[2] + first,
                            a.mask.stride[1], flow, h, w, y, first, out);
    for_logits<A, T>(a.mask, b, y, first, slab, [&](i64 x, const auto* logits) {
      A from[2][kNeighbours];
      neighbours(flow, h, w, y, x, from);
      A fine[2][kFine];
      for (i64 s = 0; s < kFine; s += kLanes<A>) {
        Vec<A> weight[kNeighbours];
        softmax<A>(logits + s, kFine, weight);
        Vec<A> u = {}, v = {};
        for (int k = 0; k < kNeighbours; ++k) {
          u += weight[k] * from[0][k];
          v += weight[k] * from[1][k];
        }
        store<A>(fine[0] + s, u);
        store<A>(fine[1] + s, v);
      }
      for (int i = 0; i < 2; ++i)
        for (i64 row = 0; row < kFactor; ++row)
          std::memcpy(out + ((i * h * kFactor + row) * w + x) * kFactor, fine[i] + row * kFactor,
                      kFactor * sizeof(A));
    });
  }
}

void forward(const ConvexUpsampleForward& a, i64 begin, i64 end) {
  with_dtype(a.mask.dtype, [&](auto t) { forward_typed<decltype(t)>(a, begin, end); });
}

// ---- backward ----

// The incoming gradient of a coarse pixel's fine pixels.
template <class A>
void incoming(const Array& grad, i64 b, i64 y, i64 x, A (&fine)[2][kFine]) {
  const i64 sx = grad.stride[3];
  for (int i = 0; i < 2; ++i)
    for (i64 row = 0; row < kFactor; ++row) {
      const A* from = static_cast<const A*>(grad.data) + b * grad.stride[0] + i * grad.stride[1] +
                      (y * kFactor + row) * grad.stride[2] + x * kFactor * sx;
      A* to = fine[i] + row * kFactor;
      if (sx == 1) {
        std::memcpy(to, from, kFactor * sizeof(A));
      } else {
        for (i64 column = 0; column < kFactor; ++column) to[column] = from[column * sx];
      }
    }
}

template <class T>
void backward_typed(const ConvexUpsampleBackward& a, i64 begin, i64 end) {
  using A = typename Accumulate<T>::type;
  constexpr i64 L = kLanes<A>;
  const i64 h = a.mask.size[2], w = a.mask.size[3];
  const Array& gm = a.grad_mask;
  const bool direct = gm.data && gm.stride[1] == 1;
  Scratch slab, tile(direct ? 0 : minimum(kStripPixels, w) * kMaskChannels * i64(sizeof(A)));
  for (i64 item = begin; item < end; ++item) {
    const i64 b = item / h, y = item % h;
    const A* flow = static_cast<const A*>(a.flow) + b * 2 * h * w;
    T* target = gm.data ? static_cast<T*>(gm.data) + b * gm.stride[0] + y * gm.stride[2] : nullptr;
    A* parts = a.flow_parts ? static_cast<A*>(a.flow_parts) + item * w * 2 * kNeighbours : nullptr;
    for_logits<A, T>(a.mask, b, y, 0, slab, [&](i64 x, const auto* logits) {
      A from[2][kNeighbours];
      neighbours(flow, h, w, y, x, from);
      A fine[2][kFine];
      incoming(a.grad, b, y, x, fine);
      Vec<A> sums[2][kNeighbours] = {};
      for (i64 s = 0; s < kFine; s += L) {
        Vec<A> weight[kNeighbours];
        softmax<A>(logits + s, kFine, weight);
        const Vec<A> gu = load<A>(fine[0] + s), gv = load<A>(fine[1] + s);
        if (parts)
          for (int k = 0; k < kNeighbours; ++k) {
            sums[0][k] += weight[k] * gu;
            sums[1][k] += weight[k] * gv;
          }
        if (!target) continue;
        Vec<A> mean = {};
        for (int k = 0; k < kNeighbours; ++k) mean += weight[k] * (gu * from[0][k] + gv * from[1][k]);
        for (int k = 0; k < kNeighbours; ++k) {
          const Vec<A> g = weight[k] * (gu * from[0][k] + gv * from[1][k] - mean);
          if (direct) store<A>(target + x * gm.stride[3] + k * kFine + s, g);
          else store<A>(tile.as<A>() + x % kStripPixels * kMaskChannels + k * kFine + s, g);
        }
      }
      if (parts)
        for (int i = 0; i < 2; ++i)
          for (int k = 0; k < kNeighbours; ++k)
            parts[(x * 2 + i) * kNeighbours + k] = A(kFactor) * sum_lanes<A>(sums[i][k]);
      if (target && !direct && (x % kStripPixels == kStripPixels - 1 || x == w - 1)) {
        const i64 x0 = x / kStripPixels * kStripPixels;
        unstage_row<A, T>(tile.as<A>(), gm.size[1], gm.size[1], x + 1 - x0, target + x0 * gm.stride[3],
                          gm.stride[1], gm.stride[3]);
      }
    });
  }
}

void backward(const ConvexUpsampleBackward& a, i64 begin, i64 end) {
  with_dtype(a.mask.dtype, [&](auto t) { backward_typed<decltype(t)>(a, begin, end); });
}

// Each flow value collects what its neighbours hold for it, always in the same order.
template <class A>
void reduce_typed(const ConvexUpsampleReduce& a, i64 begin, i64 end) {
  const i64 h = a.height, w = a.width;
  for (i64 item = begin; item < end; ++item) {
    const i64 b = item / h, y = item % h;
    const A* parts = static_cast<const A*>(a.flow_parts) + b * h * w * 2 * kNeighbours;
    for (int i = 0; i < 2; ++i) {
      A* target = static_cast<A*>(a.grad_flow) + ((b * 2 + i) * h + y) * w;
      for (i64 x = 0; x < w; ++x) {
        A sum = 0;
        for (int k = 0; k < kNeighbours; ++k) {
          const i64 row = y - (k / 3 - 1), column = x - (k % 3 - 1);
          if (row >= 0 && row < h && column >= 0 && column < w)
            sum += parts[((row * w + column) * 2 + i) * kNeighbours + k];
        }
        target[x] = sum;
      }
    }
  }
}

void reduce(const ConvexUpsampleReduce& a, i64 begin, i64 end) {
  if (a.dtype == Dtype::f64) reduce_typed<double>(a, begin, end);
  else reduce_typed<float>(a, begin, end);
}

extern const ConvexUpsampleKernels convex_upsample_kernels;
const ConvexUpsampleKernels convex_upsample_kernels = {forward, backward, reduce};

GI_END_VARIANT
