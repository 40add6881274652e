// Where the window of a lookup lies in a level. Host and device.
//
// The (2r+1)^2 samples of a window share one fractional part, so a window is a blend of a patch of
// n x n whole pixels, n = 2r+2.
#pragma once

#include "common/bilinear.h"

GI_BEGIN_VARIANT

// Patch pixel (j, i) is map pixel (y + j, x + i); those with j in [j0, j1) and i in [i0, i1) are inside
// the map.
template <class A> struct Place {
  i64 x = 0, y = 0;
  A fx = 0, fy = 0;
  i64 i0 = 0, i1 = 0, j0 = 0, j1 = 0;

  GI_HOST_DEVICE bool empty() const { return j0 >= j1 || i0 >= i1; }
};

// The place of a window around (x, y) in pixels of a level [height, width].
template <class A>
GI_HOST_DEVICE Place<A> place_of(A x, A y, i64 radius, i64 height, i64 width) {
  Place<A> p;
  const A reach = A(radius);
  const i64 n = 2 * radius + 2;
  // Also true of positions that are not numbers. A sample is in reach from -1 up to the size.
  if (!(x >= -1 - reach && x < A(width) + reach && y >= -1 - reach && y < A(height) + reach)) return p;
  p.x = floor_of<i64>(x);
  p.y = floor_of<i64>(y);
  p.fx = x - A(p.x);
  p.fy = y - A(p.y);
  p.x -= radius;
  p.y -= radius;
  p.i0 = maximum<i64>(0, -p.x);
  p.i1 = minimum(n, width - p.x);
  p.j0 = maximum<i64>(0, -p.y);
  p.j1 = minimum(n, height - p.y);
  return p;
}

// The place for a pixel whose position in level 0 is (x, y).
template <class A>
GI_HOST_DEVICE Place<A> place_in_level(A x, A y, int level, i64 radius, i64 height, i64 width) {
  if (height * width == 0) return {};
  const A scale = A(1) / A(i64(1) << level);
  return place_of<A>(x * scale, y * scale, radius, height, width);
}

GI_END_VARIANT
