// The scatter of a warp's gradient as a gather. Host and device.
//
// Every output pixel samples the four pixels of one "cell", whose upper left pixel is (y, x) in
// [-1, H-1] x [-1, W-1]. For each cell a linked list of the pixels that sample it is made, in the order
// of the pixels. A pixel's gradient is then a sum over the lists of four cells: no float atomics, no
// accumulator in memory, the same order and so the same bits every time.
#pragma once

#include "common/bilinear.h"
#include "common/device.h"

GI_BEGIN_VARIANT

constexpr i64 kEnd = -1;  // of a list

// An output pixel in the list of its cell.
template <class A> struct alignas(16) Contributor {
  A fx, fy;
  i64 next;
};

template <class A> struct ContributorLists {
  i64* first;               // [frames,H+1,W+1]
  Contributor<A>* members;  // [frames,H*W]
  int height, width;

  GI_HOST_DEVICE i64 cells() const { return i64(height + 1) * (width + 1); }
  GI_HOST_DEVICE i64 pixels() const { return i64(height) * width; }

  // Calls f(pixels, weights, there) with up to four output pixels that sample pixel (y, x) of a frame, until
  // it has been given all: the first of each cell's list, then the second of each, and so on, so that the
  // reads of four are under way. Where there is none the weight is zero and the pixel is 0.
  template <class F> GI_HOST_DEVICE void for_each_four(i64 frame, i64 y, i64 x, F&& f) const {
    const i64* cell = first + frame * cells() + y * (width + 1) + x;
    const Contributor<A>* member = members + frame * pixels();
    i64 at[4];
    GI_UNROLL
    for (int k = 0; k < 4; ++k) at[k] = cell[(k & 2 ? 0 : width + 1) + (k & 1 ? 0 : 1)];
    while (at[0] != kEnd || at[1] != kEnd || at[2] != kEnd || at[3] != kEnd) {
      bool there[4];
      Contributor<A> c[4];
      GI_UNROLL
      for (int k = 0; k < 4; ++k) {
        there[k] = at[k] != kEnd;
        at[k] = there[k] ? at[k] : 0;
        c[k] = {A(0), A(0), kEnd};
        if (there[k]) c[k] = member[at[k]];
      }
      A weight[4];
      GI_UNROLL
      for (int k = 0; k < 4; ++k)
        weight[k] = there[k] ? ((k & 1) ? c[k].fx : 1 - c[k].fx) * ((k & 2) ? c[k].fy : 1 - c[k].fy) : A(0);
      f(at, weight, there);
      GI_UNROLL
      for (int k = 0; k < 4; ++k) at[k] = c[k].next;
    }
  }
};

template <class A> i64 contributor_bytes(i64 frames, i64 H, i64 W) {
  return frames * H * W * i64(sizeof(Contributor<A>)) + frames * (H + 1) * (W + 1) * i64(sizeof(i64));
}

// Lists in memory of contributor_bytes().
template <class A> ContributorLists<A> lists_in(void* memory, i64 frames, int H, int W) {
  auto* members = static_cast<Contributor<A>*>(memory);
  return {reinterpret_cast<i64*>(members + frames * H * W), members, H, W};
}

template <class A> struct EmptyLists {
  static constexpr const char* kName = "empty_lists";
  ContributorLists<A> lists;

  GI_HOST_DEVICE void operator()(i64 frame, i64 cell, const Team&) const {
    lists.first[frame * lists.cells() + cell] = kEnd;
  }
};

template <class A> struct EnterPixels {
  static constexpr const char* kName = "enter_pixels";
  ContributorLists<A> lists;
  FlowField<A> flow;  // of frame 0; the next ones follow it

  GI_HOST_DEVICE void operator()(i64 frame, i64 pixel, const Team&) const {
    i64 y, x;
    split(pixel, lists.width, y, x);
    const Taps<A> t = flow.frame(frame).taps(int(y), int(x));
    if (!t.any()) return;
    i64* cell = lists.first + frame * lists.cells() + i64(t.y0 + 1) * (lists.width + 1) + t.x0 + 1;
    const i64 next = exchange(cell, pixel);
    lists.members[frame * lists.pixels() + pixel] = {t.fx, t.fy, next};
  }
};

// Brings a list, which was entered in any order, into the order of the pixels: merge sort from runs of
// one on, which needs no memory.
template <class Member> GI_HOST_DEVICE void order_list(i64& first, Member* member) {
  if (first == kEnd || member[first].next == kEnd) return;
  for (i64 run = 1;; run *= 2) {
    i64 rest = first, last = kEnd, merges = 0;
    while (rest != kEnd) {
      ++merges;
      i64 a = rest, b = rest, left = 0, right = run;
      for (; left < run && b != kEnd; ++left) b = member[b].next;
      while (left > 0 || (right > 0 && b != kEnd)) {
        const bool from_a = left > 0 && (right == 0 || b == kEnd || a < b);
        const i64 taken = from_a ? a : b, after = member[taken].next;
        if (from_a) a = after, --left;
        else b = after, --right;
        if (last == kEnd) first = taken;
        else member[last].next = taken;
        last = taken;
      }
      rest = b;
    }
    member[last].next = kEnd;
    if (merges == 1) return;
  }
}

template <class A> struct OrderLists {
  static constexpr const char* kName = "order_lists";
  ContributorLists<A> lists;

  GI_HOST_DEVICE void operator()(i64 frame, i64 cell, const Team&) const {
    order_list(lists.first[frame * lists.cells() + cell], lists.members + frame * lists.pixels());
  }
};

// Makes the lists of all frames for a flow.
template <class A>
void make_lists(const ContributorLists<A>& lists, const FlowField<A>& flow, i64 frames, Stream stream) {
  launch_items(EmptyLists<A>{lists}, frames, lists.cells(), stream);
  launch_items(EnterPixels<A>{lists, flow}, frames, lists.pixels(), stream);
  launch_items(OrderLists<A>{lists}, frames, lists.cells(), stream);
}

// ---- the gradient of a resized map ----

// Gradient [maps,H,W] of a map that was read at H x W -> gradient [maps,h,w] of the map, with its
// components scaled: a sum over the pixels that each coarse one was spread to.
template <class A> struct ResizeAdjoint {
  static constexpr const char* kName = "resize_adjoint";
  const A* parts;  // [blocks,maps,H,W], to be summed over the blocks
  A* grad;
  i64 blocks, block_stride, map_stride;  // of `parts`; maps of a frame follow each other
  i64 frame_stride;
  int H, W, h, w, channels;
  ResizeAxis<A> rows, columns;
  A scale_x, scale_y;  // of the first and the second component

  // [from, to): the pixels that may touch coarse pixel i, and possibly some that do not.
  static GI_HOST_DEVICE void reach(const ResizeAxis<A>& axis, int i, int count, int& from, int& to) {
    from = 0;
    to = count;
    if (!(axis.scale > 0)) return;
    const A first = (A(i) - 1) / axis.scale - 1, last = (A(i) + 1) / axis.scale + 2;
    if (first > 0) from = first < A(count) ? int(first) : count;
    if (last < A(count)) to = int(last);
  }
  // What pixel j takes from coarse pixel i: as the first and as the second of the two it lies between.
  struct Touch {
    bool is[2];
    A share[2];

    GI_HOST_DEVICE Touch(const ResizeAxis<A>& axis, int i, int j) {
      int i0, i1;
      A f;
      axis.at(j, i0, i1, f);
      is[0] = i0 == i;
      is[1] = i1 == i;
      share[0] = 1 - f;
      share[1] = f;
    }
  };

  GI_HOST_DEVICE void operator()(i64 map, i64 coarse, const Team& team) const {
    i64 frame, channel, i, j;
    split(map, channels, frame, channel);
    split(coarse, w, i, j);
    const A* from = parts + frame * frame_stride + channel * map_stride;
    A sum[1] = {0};
    const bool same = h == H && w == W;
    int y0 = int(i), y1 = y0 + 1, x0 = int(j), x1 = x0 + 1;
    if (!same) {
      reach(rows, int(i), H, y0, y1);
      reach(columns, int(j), W, x0, x1);
    }
    const i64 count = y1 > y0 && x1 > x0 ? i64(y1 - y0) * (x1 - x0) : 0;
    for (i64 n = team.lane; n < count; n += team.lanes) {
      i64 dy, dx;
      split(n, x1 - x0, dy, dx);
      const int y = y0 + int(dy), x = x0 + int(dx);
      A g = 0;
      for (i64 block = 0; block < blocks; ++block) g += from[block * block_stride + i64(y) * W + x];
      if (same) {
        sum[0] += g;
        continue;
      }
      const Touch along_y(rows, int(i), y), along_x(columns, int(j), x);
      GI_UNROLL
      for (int k = 0; k < 4; ++k)
        if (along_y.is[k >> 1] && along_x.is[k & 1]) sum[0] += along_y.share[k >> 1] * along_x.share[k & 1] * g;
    }
    team.sum(sum);
    if (team.leader()) grad[map * i64(h) * w + coarse] = sum[0] * (same ? A(1) : channel == 0 ? scale_x : scale_y);
  }
};

// How many pixels touch a coarse one decides how many threads sum them.
template <class A> void launch_adjoint(const ResizeAdjoint<A>& body, i64 maps, Stream stream) {
  const i64 touched = (2 * i64(body.H) / body.h + 1) * (2 * i64(body.W) / body.w + 1);
  launch_teams(body, maps, i64(body.h) * body.w, touched > 32 ? kWarp : 1, stream);
}

GI_END_VARIANT
