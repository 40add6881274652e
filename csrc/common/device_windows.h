// Windows of a map on a device: the three products between their pixels and one row of channels per head
// that pooling, spreading and their gradients are made of, and the weights that go with them.
#pragma once

#include "common/device.h"

GI_BEGIN_VARIANT

// How a map splits into windows.
struct Windows {
  i64 rows, columns;           // windows down and across
  i64 height, width;           // pixels of a window
  i64 batch, heads, map_width;

  Windows(const Array& logits, i64 rows_, i64 columns_)
      : rows(rows_), columns(columns_), height(logits.size[2] / rows_), width(logits.size[3] / columns_),
        batch(logits.size[0]), heads(logits.size[1]), map_width(logits.size[3]) {}

  GI_HOST_DEVICE i64 count() const { return rows * columns; }
  GI_HOST_DEVICE i64 window_pixels() const { return height * width; }
  GI_HOST_DEVICE i64 pixels() const { return count() * window_pixels(); }

  // Pixel n of a window.
  GI_HOST_DEVICE void pixel(i64 window, i64 n, i64& y, i64& x) const {
    i64 row, column, dy, dx;
    split(window, columns, row, column);
    split(n, width, dy, dx);
    y = row * height + dy;
    x = column * width + dx;
  }
  GI_HOST_DEVICE i64 window_of(i64 y, i64 x) const {
    i64 row, column, rest;
    split(y, height, row, rest);
    split(x, width, column, rest);
    return row * columns + column;
  }
  // Where the numbers of a pixel's heads begin in memory [B,H,W,heads].
  GI_HOST_DEVICE i64 at(i64 b, i64 y, i64 x) const { return ((b * rows * height + y) * map_width + x) * heads; }
};

// Rows [B,windows,heads,C] of any strides.
template <class T> struct HeadRows {
  T* data;
  i64 sb, sw, sh, sc;

  explicit HeadRows(const Array& a)
      : data(static_cast<T*>(a.data)), sb(a.stride[0]), sw(a.stride[1]), sh(a.stride[2]), sc(a.stride[3]) {}

  GI_HOST_DEVICE T* at(i64 b, i64 window, i64 head, i64 c) const {
    return data + b * sb + window * sw + head * sh + c * sc;
  }
};

// ---- weights, [B,H,W,heads] in accumulation type ----

// Softmax of the logits over each window; an item is a window and head.
template <class T> struct SoftmaxWeights {
  static constexpr const char* kName = "window_softmax";
  using A = typename Accumulate<T>::type;
  Windows windows;
  Map<const T> logits;
  A* weights;

  GI_HOST_DEVICE void operator()(i64 b, i64 item, const Team& team) const {
    i64 window, head, y, x;
    split(item, windows.heads, window, head);
    const auto logit = [&](i64 n) {
      windows.pixel(window, n, y, x);
      return to_accumulate(logits.at(b, y, x)[head * logits.sc]);
    };
    A top = logit(0), sum[1] = {0};
    for (i64 n = team.lane; n < windows.window_pixels(); n += team.lanes) top = maximum(top, logit(n));
    top = team.largest(top);
    for (i64 n = team.lane; n < windows.window_pixels(); n += team.lanes) sum[0] += exponential<T>(logit(n) - top);
    team.sum(sum);
    const A scale = 1 / sum[0];
    for (i64 n = team.lane; n < windows.window_pixels(); n += team.lanes) {
      const A weight = exponential<T>(logit(n) - top) * scale;
      weights[windows.at(b, y, x) + head] = weight;
    }
  }
};

// Gradient of the weights -> gradient of the logits.
template <class T> struct SoftmaxGradient {
  static constexpr const char* kName = "window_softmax_backward";
  using A = typename Accumulate<T>::type;
  Windows windows;
  const A *weights, *grad;
  Map<T> grad_logits;

  GI_HOST_DEVICE void operator()(i64 b, i64 item, const Team& team) const {
    i64 window, head, y, x;
    split(item, windows.heads, window, head);
    A mean[1] = {0};
    for (i64 n = team.lane; n < windows.window_pixels(); n += team.lanes) {
      windows.pixel(window, n, y, x);
      const i64 at = windows.at(b, y, x) + head;
      mean[0] += weights[at] * grad[at];
    }
    team.sum(mean);
    for (i64 n = team.lane; n < windows.window_pixels(); n += team.lanes) {
      windows.pixel(window, n, y, x);
      const i64 at = windows.at(b, y, x) + head;
      grad_logits.at(b, y, x)[head * grad_logits.sc] = Rounded<T>::from(weights[at] * (grad[at] - mean[0]));
    }
  }
};

// Sigmoid of each logit.
template <class T> struct Gates {
  static constexpr const char* kName = "window_gates";
  using A = typename Accumulate<T>::type;
  Windows windows;
  Map<const T> logits;
  A* gates;

  GI_HOST_DEVICE void operator()(i64 b, i64 item, const Team&) const {
    i64 pixel, head, y, x;
    split(item, windows.heads, pixel, head);
    split(pixel, windows.map_width, y, x);
    const A logit = to_accumulate(logits.at(b, y, x)[head * logits.sc]);
    gates[windows.at(b, y, x) + head] = 1 / (1 + exponential<T>(-logit));
  }
};

template <class T> struct GateGradient {
  static constexpr const char* kName = "window_gates_backward";
  using A = typename Accumulate<T>::type;
  Windows windows;
  const A *gates, *grad;
  Map<T> grad_logits;

  GI_HOST_DEVICE void operator()(i64 b, i64 item, const Team&) const {
    i64 pixel, head, y, x;
    split(item, windows.heads, pixel, head);
    split(pixel, windows.map_width, y, x);
    const i64 at = windows.at(b, y, x) + head;
    grad_logits.at(b, y, x)[head * grad_logits.sc] = Rounded<T>::from(grad[at] * (gates[at] * (1 - gates[at])));
  }
};

// ---- products ----

constexpr int kPoolHeads = 4;  // that one thread sums at a time
constexpr int kDotHeads = 8;

// rows[w][h][c] = sum over the pixels p of window w of weights[p][h] * in[p][c]; lanes share the pixels.
template <class T, int V> struct Pool {
  static constexpr const char* kName = "window_pool";
  using A = typename Accumulate<T>::type;
  static constexpr int kSumBytes = kPoolHeads * V * int(sizeof(A));
  Windows windows;
  Map<const T> in;
  const A* weights;
  HeadRows<T> out;
  i64 vectors, groups;  // of channels, of heads

  template <class AnyTeam> GI_HOST_DEVICE void operator()(i64 b, i64 item, const AnyTeam& team) const {
    i64 rest, vector, window, group;
    split(item, vectors, rest, vector);
    split(rest, groups, window, group);
    const i64 c = vector * V, head = group * kPoolHeads, heads = minimum<i64>(kPoolHeads, windows.heads - head);
    A sum[kPoolHeads * V] = {};
    for (i64 n = team.lane; n < windows.window_pixels(); n += team.lanes) {
      i64 y, x;
      windows.pixel(window, n, y, x);
      A value[V];
      widen(read<T, V>(in.at(b, y, x) + in.template channel<V>(c)), value);
      const A* weight = weights + windows.at(b, y, x) + head;
      GI_UNROLL
      for (int m = 0; m < kPoolHeads; ++m) {
        const A w = m < heads ? weight[m] : A(0);
        GI_UNROLL
        for (int v = 0; v < V; ++v) sum[m * V + v] += w * value[v];
      }
    }
    team.sum(sum);
    if (!team.leader()) return;
    GI_UNROLL
    for (int m = 0; m < kPoolHeads; ++m) {
      if (m >= heads) break;
      A row[V];
      GI_UNROLL
      for (int v = 0; v < V; ++v) row[v] = sum[m * V + v];
      write(out.at(b, window, head + m, c), row);
    }
  }
};

// out[p][c] = sum over heads h of weights[p][h] * rows[window of p][h][c].
template <class T, int V> struct Spread {
  static constexpr const char* kName = "window_spread";
  using A = typename Accumulate<T>::type;
  Windows windows;
  HeadRows<const T> rows;
  const A* weights;
  Map<T> out;
  i64 channels;

  GI_HOST_DEVICE void operator()(i64 b, i64 pixel, const Team& team) const {
    i64 y, x;
    split(pixel, windows.map_width, y, x);
    const i64 window = windows.window_of(y, x);
    const A* weight = weights + windows.at(b, y, x);
    for (i64 c = team.lane * V; c < channels; c += i64(team.lanes) * V) {
      A sum[V] = {};
      const T* row = rows.at(b, window, 0, c);
      for (i64 head = 0; head < windows.heads; ++head) add(sum, weight[head], read<T, V>(row + head * rows.sh));
      write(out.at(b, y, x) + out.template channel<V>(c), sum);
    }
  }
};

// dots[p][h] = sum over channels c of in[p][c] * rows[window of p][h][c]; lanes share the channels.
template <class T, int V> struct Dots {
  static constexpr const char* kName = "window_dots";
  using A = typename Accumulate<T>::type;
  Windows windows;
  Map<const T> in;
  HeadRows<const T> rows;
  A* dots;
  i64 channels;

  GI_HOST_DEVICE void operator()(i64 b, i64 pixel, const Team& team) const {
    i64 y, x;
    split(pixel, windows.map_width, y, x);
    const i64 window = windows.window_of(y, x);
    for (i64 head = 0; head < windows.heads; head += kDotHeads) {
      A sum[kDotHeads] = {};
      for (i64 c = team.lane * V; c < channels; c += i64(team.lanes) * V) {
        A value[V];
        widen(read<T, V>(in.at(b, y, x) + in.template channel<V>(c)), value);
        const T* row = rows.at(b, window, head, c);
        GI_UNROLL
        for (int m = 0; m < kDotHeads; ++m)
          if (head + m < windows.heads) sum[m] += dot(value, read<T, V>(row + m * rows.sh));
      }
      team.sum(sum);
      if (!team.leader()) continue;
      GI_UNROLL
      for (int m = 0; m < kDotHeads; ++m)
        if (head + m < windows.heads) dots[windows.at(b, y, x) + head + m] = sum[m];
    }
  }
};

// ---- launches ----

// With the channels of a pixel apart in memory, threads are neighbours along the pixels.
inline int channel_lanes(const Array& map, int V) {
  return map.stride[1] == 1 ? lanes_for((map.size[1] + V - 1) / V) : 1;
}

template <class T, class A>
void launch_pool(const Windows& windows, const Array& in, const A* weights, const Array& out, Stream stream) {
  with_width<T>(packed<T>(in, 4, 1) && packed<T>(out, 4, 3), [&](auto width) {
    constexpr int V = decltype(width)::value;
    const i64 vectors = in.size[1] / V, groups = (windows.heads + kPoolHeads - 1) / kPoolHeads;
    const Pool<T, V> body{windows, Map<const T>(in), weights, HeadRows<T>(out), vectors, groups};
    if (in.stride[1] == 1) launch_columns(body, windows.batch, windows.count() * groups * vectors, stream);
    else launch_teams(body, windows.batch, windows.count() * groups * vectors, kWarp, stream);
  });
}

template <class T, class A>
void launch_spread(const Windows& windows, const Array& rows, const A* weights, const Array& out, Stream stream) {
  with_width<T>(packed<T>(rows, 4, 3) && packed<T>(out, 4, 1), [&](auto width) {
    constexpr int V = decltype(width)::value;
    const Spread<T, V> body{windows, HeadRows<const T>(rows), weights, Map<T>(out), out.size[1]};
    launch_teams(body, windows.batch, windows.pixels(), channel_lanes(out, V), stream);
  });
}

template <class T, class A>
void launch_dots(const Windows& windows, const Array& in, const Array& rows, A* dots, Stream stream) {
  with_width<T>(packed<T>(in, 4, 1) && packed<T>(rows, 4, 3), [&](auto width) {
    constexpr int V = decltype(width)::value;
    const Dots<T, V> body{windows, Map<const T>(in), HeadRows<const T>(rows), dots, in.size[1]};
    launch_teams(body, windows.batch, windows.pixels(), channel_lanes(in, V), stream);
  });
}

GI_END_VARIANT
