// Bilinear taps with zeros outside the frame, and resizing with align_corners. Host and device.
#pragma once

#include "common/platform.h"

GI_BEGIN_VARIANT

// The largest integer that is at most x, which must be in range: truncation needs no library call.
template <class I, class A>
GI_HOST_DEVICE I floor_of(A x) {
  const I whole = static_cast<I>(x);
  return A(whole) > x ? whole - 1 : whole;
}

// The four taps of one sampling position in an H x W frame. Taps are ordered (y0,x0), (y0,x1),
// (y1,x0), (y1,x1). A tap outside the frame has `inside` false and must be treated as a zero, not
// read: the frame may hold infinities.
template <class A>
struct Taps {
  int x0, y0;
  A fx, fy;  // fractional parts, in [0, 1)
  bool inside[4];

  GI_HOST_DEVICE A weight(int k) const {
    return ((k & 1) ? fx : 1 - fx) * ((k & 2) ? fy : 1 - fy);
  }
  // Derivatives of the weights along x and y.
  GI_HOST_DEVICE A weight_dx(int k) const {
    return ((k & 1) ? A(1) : A(-1)) * ((k & 2) ? fy : 1 - fy);
  }
  GI_HOST_DEVICE A weight_dy(int k) const {
    return ((k & 2) ? A(1) : A(-1)) * ((k & 1) ? fx : 1 - fx);
  }
  GI_HOST_DEVICE int x(int k) const { return x0 + (k & 1); }
  GI_HOST_DEVICE int y(int k) const { return y0 + (k >> 1); }
  GI_HOST_DEVICE bool any() const { return inside[0] | inside[1] | inside[2] | inside[3]; }
};

// Taps of position (x, y) in pixels. Positions that touch no pixel, NaN and infinite ones included,
// have no tap inside.
template <class A>
GI_HOST_DEVICE Taps<A> bilinear_taps(A x, A y, int height, int width) {
  Taps<A> t;
  if (!(x >= -1 && x < width && y >= -1 && y < height)) {
    t.x0 = t.y0 = 0;
    t.fx = t.fy = 0;
    t.inside[0] = t.inside[1] = t.inside[2] = t.inside[3] = false;
    return t;
  }
  t.x0 = floor_of<int>(x);
  t.y0 = floor_of<int>(y);
  t.fx = x - A(t.x0);
  t.fy = y - A(t.y0);
  const bool left = t.x0 >= 0, right = t.x0 + 1 < width;
  const bool top = t.y0 >= 0, bottom = t.y0 + 1 < height;
  t.inside[0] = left & top;
  t.inside[1] = right & top;
  t.inside[2] = left & bottom;
  t.inside[3] = right & bottom;
  return t;
}

// One axis of a resize from `from` to `to` pixels with align_corners: output i lies between inputs
// i0 and i1 at fraction f.
template <class A>
struct ResizeAxis {
  A scale;
  int from;

  GI_HOST_DEVICE ResizeAxis(int from_, int to)
      : scale(to > 1 ? A(from_ - 1) / A(to - 1) : A(0)), from(from_) {}

  GI_HOST_DEVICE void at(int i, int& i0, int& i1, A& f) const {
    const A position = scale * A(i);
    i0 = minimum(static_cast<int>(position), from - 1);
    i1 = minimum(i0 + 1, from - 1);
    f = position - A(i0);
  }
};

// A contiguous map [channels, h, w] read as if resized to H x W.
template <class A>
struct ResizedMap {
  const A* data;
  int h, w;
  ResizeAxis<A> rows, columns;
  bool same;

  GI_HOST_DEVICE ResizedMap(const A* data_, int h_, int w_, int height, int width)
      : data(data_), h(h_), w(w_), rows(h_, height), columns(w_, width),
        same(h_ == height && w_ == width) {}

  GI_HOST_DEVICE A at(int channel, int y, int x) const {
    const A* plane = data + i64(channel) * h * w;
    if (same) return plane[i64(y) * w + x];
    int y0, y1, x0, x1;
    A fy, fx;
    rows.at(y, y0, y1, fy);
    columns.at(x, x0, x1, fx);
    const A top = (1 - fx) * plane[i64(y0) * w + x0] + fx * plane[i64(y0) * w + x1];
    const A bottom = (1 - fx) * plane[i64(y1) * w + x0] + fx * plane[i64(y1) * w + x1];
    return (1 - fy) * top + fy * bottom;
  }
};

// A flow [2, h, w] read at H x W, its components scaled with the frame.
template <class A>
struct FlowField {
  ResizedMap<A> map;
  A scale_x, scale_y;
  int height, width;

  GI_HOST_DEVICE FlowField(const A* data, int h, int w, int height_, int width_)
      : map(data, h, w, height_, width_), scale_x(A(width_) / A(w)), scale_y(A(height_) / A(h)),
        height(height_), width(width_) {}

  // Of another frame, when the flows of all frames follow each other.
  GI_HOST_DEVICE FlowField frame(i64 index) const {
    FlowField other = *this;
    other.map.data += index * 2 * map.h * map.w;
    return other;
  }

  // Where output pixel (y, x) samples.
  GI_HOST_DEVICE Taps<A> taps(int y, int x) const {
    A u = map.at(0, y, x), v = map.at(1, y, x);
    if (!map.same) {
      u *= scale_x;
      v *= scale_y;
    }
    return bilinear_taps<A>(A(x) + u, A(y) + v, height, width);
  }
};

GI_END_VARIANT
