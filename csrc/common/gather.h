// Gathering rows of channels at bilinear taps, scattering them back, and the parts that warping and
// aggregation share. "Row" means the channels of one pixel in one channel block.
#pragma once

#include <type_traits>

#include "common/bilinear.h"
#include "common/staging.h"

GI_BEGIN_VARIANT

// Most channels a block holds; also the size of the row of zeros.
constexpr i64 kMaxBlock = 1024;

// Channels of a block whose gradient is summed by one piece of work.
constexpr i64 kGradientBlock = 64;

// Pixels gathered into a tile before they are written channel by channel.
constexpr i64 kTilePixels = 64;

// What a tap outside the frame reads.
alignas(64) static const char kZeroRow[kMaxBlock * sizeof(double)] = {};

// A channel block of one image, channels contiguous: pixel (y, x) starts at y*sy + x*sx.
template <class S> struct Block {
  S* data = nullptr;
  i64 sy = 0, sx = 0;

  GI_HOST_DEVICE S* at(i64 y, i64 x) const { return data + y * sy + x * sx; }
};

template <class A, class S> struct RowTaps {
  const S* row[4];
  A weight[4];
};

template <class A, class S>
GI_HOST_DEVICE RowTaps<A, S> row_taps(const Taps<A>& t, const Block<S>& block) {
  RowTaps<A, S> r;
  for (int k = 0; k < 4; ++k) {
    r.weight[k] = t.weight(k);
    r.row[k] = t.inside[k] ? block.at(t.y(k), t.x(k)) : reinterpret_cast<const S*>(kZeroRow);
  }
  return r;
}

template <class A, class S>
GI_HOST_DEVICE Vec<A> gather(const RowTaps<A, S>& t, i64 c) {
  return load<A>(t.row[0] + c) * t.weight[0] + load<A>(t.row[1] + c) * t.weight[1] +
         load<A>(t.row[2] + c) * t.weight[2] + load<A>(t.row[3] + c) * t.weight[3];
}

// The taps of kLanes<A> positions, as bilinear_taps gives them for one. Columns and rows are moved into
// the frame, so that all taps can be read; values of those that are not inside must not be used.
template <class A>
struct VecTaps {
  IntVec<A> x[2], y[2], inside[4];
  Vec<A> weight[4];

  GI_HOST_DEVICE VecTaps(const Vec<A>& px, const Vec<A>& py, i64 height, i64 width) {
    const IntVec<A> near = (px >= -1) & (px < A(width)) & (py >= -1) & (py < A(height));
    const Vec<A> fx = axis(near ? px : splat<A>(0), x), fy = axis(near ? py : splat<A>(0), y);
    const IntVec<A> columns[2] = {near & (x[0] >= 0), near & (x[1] < Index(width))};
    const IntVec<A> rows[2] = {y[0] >= 0, y[1] < Index(height)};
    for (int k = 0; k < 4; ++k) {
      inside[k] = columns[k & 1] & rows[k >> 1];
      weight[k] = (k & 1 ? fx : 1 - fx) * (k & 2 ? fy : 1 - fy);
    }
    x[0] = columns[0] ? x[0] : IntVec<A>{};
    x[1] = columns[1] ? x[1] : x[0];
    y[0] = rows[0] ? y[0] : IntVec<A>{};
    y[1] = rows[1] ? y[1] : y[0];
  }

 private:
  using Index = std::remove_reference_t<decltype(IntVec<A>{}[0])>;

  // Sets the two whole neighbours of a position; returns its fractional part.
  static GI_HOST_DEVICE Vec<A> axis(const Vec<A>& position, IntVec<A> (&whole)[2]) {
    whole[0] = __builtin_convertvector(position, IntVec<A>);
    whole[0] += __builtin_convertvector(whole[0], Vec<A>) > position;  // a true lane is -1
    whole[1] = whole[0] + 1;
    return position - __builtin_convertvector(whole[0], Vec<A>);
  }
};

template <class T>
GI_HOST_DEVICE Plane<T> plane_of(const Array& a, i64 b, i64 c) {
  return {static_cast<T*>(a.data) + b * a.stride[0] + c * a.stride[1], a.stride[1], a.stride[2], a.stride[3]};
}

// Frame t of item b of an array [B,T,C,H,W].
template <class T>
GI_HOST_DEVICE Plane<T> frame_of(const Array& a, i64 b, i64 t, i64 c) {
  return {static_cast<T*>(a.data) + b * a.stride[0] + t * a.stride[1] + c * a.stride[2], a.stride[2], a.stride[3],
          a.stride[4]};
}

// Channels of a slab block: as many as keep the slab of one frame at about half a megabyte.
template <class A>
inline i64 slab_channels(i64 C, i64 pixels) {
  i64 channels = kLanes<A>;
  while (channels * 2 <= minimum<i64>(64, padded<A>(C)) && pixels * channels * 2 * i64(sizeof(A)) <= (i64(1) << 19))
    channels *= 2;
  return channels;
}

// Whether kernels can read the rows of a map where they are: contiguous, in whole vectors.
template <class A, class T>
GI_HOST_DEVICE bool in_place(const Plane<T>& map, i64 channels) {
  return map.sc == 1 && channels % kLanes<A> == 0;
}

// Rows of a map in accumulation type: in place where that is possible, else copied to `slab`.
template <class A, class T>
inline Block<const A> rows_of(const Plane<const T>& map, i64 channels, i64 H, i64 W, Scratch& slab) {
  if constexpr (sizeof(A) == sizeof(T))
    if (in_place<A>(map, channels)) return {map.data, map.sy, map.sx};
  const i64 stride = padded<A>(channels);
  slab.reserve(H * W * stride * i64(sizeof(A)));
  stage<A, T>(map, channels, 0, H, W, slab.as<A>(), stride);
  return {slab.as<A>(), W * stride, stride};
}

// A channel block of a gradient that is summed row by row: in place where that is possible, else in
// memory for H*W padded rows, from which finish() writes it out. Starts at zero.
template <class A, class T> struct GradientBlock {
  Block<A> block;

  void start(const Plane<T>& target, i64 channels, i64 H, i64 W, A* memory) {
    target_ = target;
    channels_ = channels;
    H_ = H;
    W_ = W;
    staged_ = !(sizeof(A) == sizeof(T) && in_place<A>(target, channels));
    if (!staged_) {
      block = {reinterpret_cast<A*>(target.data), target.sy, target.sx};
      for (i64 y = 0; y < H; ++y)
        for (i64 x = 0; x < W; ++x) std::memset(block.at(y, x), 0, channels * sizeof(A));
      return;
    }
    const i64 stride = padded<A>(channels);
    std::memset(memory, 0, H * W * stride * sizeof(A));
    block = {memory, W * stride, stride};
  }

  void finish() const {
    if (staged_) unstage<A, T>(block.data, block.sx, channels_, 0, H_, W_, target_);
  }

 private:
  Plane<T> target_;
  i64 channels_, H_, W_;
  bool staged_;
};

// Turns the gradient of a resized flow or error map, [channels, H, W] summed over `parts` partial
// maps that lie `part_stride` apart, into the gradient of the original [channels, h, w].
template <class A>
inline void resize_backward(const A* parts, i64 part_count, i64 part_stride, int channels, int H, int W,
                            const A* scale, A* grad, int h, int w) {
  const bool same = h == H && w == W;
  const ResizeAxis<A> rows(h, H), columns(w, W);
  for (int channel = 0; channel < channels; ++channel) {
    A* target = grad + i64(channel) * h * w;
    for (i64 i = 0; i < i64(h) * w; ++i) target[i] = 0;
    for (int y = 0; y < H; ++y) {
      int y0 = y, y1 = y;
      A fy = 0;
      if (!same) rows.at(y, y0, y1, fy);
      for (int x = 0; x < W; ++x) {
        const A* from = parts + (i64(channel) * H + y) * W + x;
        A g = 0;
        for (i64 part = 0; part < part_count; ++part) g += from[part * part_stride];
        if (same) {
          target[i64(y) * w + x] = g;
          continue;
        }
        g *= scale[channel];
        int x0, x1;
        A fx;
        columns.at(x, x0, x1, fx);
        target[i64(y0) * w + x0] += (1 - fy) * (1 - fx) * g;
        target[i64(y0) * w + x1] += (1 - fy) * fx * g;
        target[i64(y1) * w + x0] += fy * (1 - fx) * g;
        target[i64(y1) * w + x1] += fy * fx * g;
      }
    }
  }
}

GI_END_VARIANT
