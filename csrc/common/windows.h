// Windows of a map, the softmax over them, and the three matrix products between their pixels and one row
// of channels per head that pooling, spreading and their gradients are made of.
#pragma once

#include <type_traits>

#include "common/gather.h"

GI_BEGIN_VARIANT

// Least width of a piece of work, in pixels, where maps are used in place and where they are copied:
// copies of planes want whole cache lines.
constexpr i64 kPieceWidth = 16;
constexpr i64 kStagedPieceWidth = 64;

// Size of a slab of pixels, within the second-level cache, and the most channels it holds.
constexpr i64 kWindowSlabBytes = i64(256) << 10;
constexpr i64 kWindowSlabChannels = 256;

// Pixels that are summed into one number before it is added to the total.
constexpr i64 kSumPixels = 256;

// A piece of work: `count` windows side by side in one row of windows.
struct WindowPiece {
  i64 b, first, count;  // image; row-major index of the first window
  i64 y, x, width;      // first pixel; pixels across
};

// How a map [B,C,H,W] splits into windows and these into pieces.
struct WindowGrid {
  i64 rows, columns;  // windows down and across
  i64 height, width;  // pixels of a window
  i64 across;         // windows of a piece
  i64 pieces;         // pieces of a row of windows
  i64 batch;

  WindowGrid(const Array& map, i64 rows_, i64 columns_, bool staged, i64 staged_width = kStagedPieceWidth)
      : rows(rows_), columns(columns_), height(map.size[2] / rows_), width(map.size[3] / columns_),
        batch(map.size[0]) {
    const i64 least = staged ? staged_width : kPieceWidth;
    across = minimum(columns, (least + width - 1) / width);
    pieces = (columns + across - 1) / across;
  }

  i64 items() const { return batch * rows * pieces; }

  WindowPiece piece(i64 item) const {
    const i64 column = item % pieces * across, row = item / pieces % rows;
    const i64 count = minimum(across, columns - column);
    return {item / pieces / rows, row * columns + column, count, row * height, column * width, count * width};
  }
};

// A map from the first pixel of a piece on, channels from c0 on.
template <class T>
GI_HOST_DEVICE Plane<T> plane_of(const Array& a, const WindowPiece& piece, i64 c0) {
  Plane<T> plane = plane_of<T>(a, piece.b, c0);
  plane.data += piece.y * plane.sy + piece.x * plane.sx;
  return plane;
}

template <class T>
GI_HOST_DEVICE Block<T> rows_from(const Block<T>& block, i64 y, i64 x) {
  return {block.at(y, x), block.sy, block.sx};
}

template <class T> GI_HOST_DEVICE Block<const T> constant(const Block<T>& block) {
  return {block.data, block.sy, block.sx};
}

// The part of a piece that is worked on at a time.
struct WindowSteps {
  i64 channels, rows;

  template <class A>
  static WindowSteps of(i64 C, const WindowGrid& grid, bool staged, i64 slab_bytes = kWindowSlabBytes,
                        i64 slab_channels = kWindowSlabChannels) {
    if (!staged) return {C, grid.height};
    const i64 pixel = grid.across * grid.width * i64(sizeof(A));
    i64 channels = slab_channels;
    while (channels > kLanes<A> && pixel * channels > slab_bytes) channels /= 2;
    channels = minimum(channels, padded<A>(C));
    if (channels == 0) return {1, grid.height};
    return {channels, minimum(grid.height, maximum<i64>(1, slab_bytes / (pixel * channels)))};
  }
};

// Whether a map [B,C,H,W] must be copied to be read or written by whole vectors.
template <class A>
inline bool needs_slab(const Array& map) {
  return map.data && !(map.stride[1] == 1 && map.size[1] % kLanes<A> == 0);
}

// A slab of a part of a piece, uninitialised.
template <class A>
inline Block<A> slab_block(const WindowPiece& piece, i64 rows, i64 channels, Scratch& memory) {
  const i64 stride = padded<A>(channels);
  memory.reserve(rows * piece.width * stride * i64(sizeof(A)));
  return {memory.as<A>(), piece.width * stride, stride};
}

// Calls f with rows [y0, y0 + rows) of a piece, in place or copied.
template <class A, class T, class F>
inline void with_pixels(const Array& map, const WindowPiece& piece, i64 c0, i64 channels, i64 y0, i64 rows,
                        Scratch& memory, F&& f) {
  const auto plane = plane_of<const T>(map, piece, c0);
  if (!needs_slab<A>(map)) return f(Block<const T>{plane.data + y0 * plane.sy, plane.sy, plane.sx});
  const Block<A> slab = slab_block<A>(piece, rows, channels, memory);
  stage<A, T>(plane, channels, y0, y0 + rows, piece.width, slab.data, slab.sx);
  f(constant(slab));
}

// Calls f to write rows [y0, y0 + rows) of a piece, in place or to a slab that is then copied.
template <class A, class T, class F>
inline void write_pixels(const Array& map, const WindowPiece& piece, i64 c0, i64 channels, i64 y0, i64 rows,
                         Scratch& memory, F&& f) {
  const auto plane = plane_of<T>(map, piece, c0);
  if (!needs_slab<A>(map)) return f(Block<T>{plane.data + y0 * plane.sy, plane.sy, plane.sx});
  const Block<A> slab = slab_block<A>(piece, rows, channels, memory);
  f(slab);
  unstage<A, T>(slab.data, slab.sx, channels, y0, y0 + rows, piece.width, plane);
}

// ---- numbers per pixel and head: logits, weights and their gradients ----

// A piece of a map [B,h,H,W] in accumulation type; heads are padded with zeros to whole vectors.
template <class A, class T>
inline Block<A> stage_heads(const Array& map, const WindowPiece& piece, i64 height, Scratch& memory) {
  const Block<A> slab = slab_block<A>(piece, height, map.size[1], memory);
  stage<A, T>(plane_of<const T>(map, piece, 0), map.size[1], 0, height, piece.width, slab.data, slab.sx);
  return slab;
}

template <class A>
inline Block<A> zero_heads(i64 heads, const WindowPiece& piece, i64 height, Scratch& memory) {
  const Block<A> slab = slab_block<A>(piece, height, heads, memory);
  if (slab.data) std::memset(slab.data, 0, height * slab.sy * sizeof(A));
  return slab;
}

template <class A, class T>
inline void unstage_heads(const Block<A>& slab, const Array& map, const WindowPiece& piece, i64 height) {
  unstage<A, T>(slab.data, slab.sx, map.size[1], 0, height, piece.width, plane_of<T>(map, piece, 0));
}

// ---- softmax over a window, head by head in the lanes of vectors ----

// Turns logits into weights that sum to one.
template <class A>
inline void softmax(const Block<A>& logits, i64 height, i64 width, i64 heads) {
  for (i64 h = 0; h < heads; h += kLanes<A>) {
    Vec<A> top = load<A>(logits.data + h);
    for (i64 y = 0; y < height; ++y)
      for (i64 x = 0; x < width; ++x) top = vmax<A>(top, load<A>(logits.at(y, x) + h));
    Vec<A> sum{};
    for (i64 y = 0; y < height; ++y) {
      Vec<A> row{};
      for (i64 x = 0; x < width; ++x) {
        A* at = logits.at(y, x) + h;
        const Vec<A> e = vexp<A>(load<A>(at) - top);
        store<A>(at, e);
        row += e;
      }
      sum += row;
    }
    const Vec<A> scale = A(1) / sum;
    for (i64 y = 0; y < height; ++y)
      for (i64 x = 0; x < width; ++x) {
        A* at = logits.at(y, x) + h;
        store<A>(at, load<A>(at) * scale);
      }
  }
}

// Turns the gradient of the weights into that of the logits. What all pixels have in common has no effect:
// that of the first one, where finite, is subtracted, so that less is rounded and of equal ones nothing is left.
template <class A>
inline void softmax_backward(const Block<A>& weights, const Block<A>& grad, i64 height, i64 width, i64 heads) {
  for (i64 h = 0; h < heads; h += kLanes<A>) {
    const Vec<A> corner = load<A>(grad.data + h), nothing = corner - corner;
    const Vec<A> first = nothing == nothing ? corner : splat<A>(0);
    Vec<A> mean{};
    for (i64 y = 0; y < height; ++y) {
      Vec<A> row{};
      for (i64 x = 0; x < width; ++x) row += load<A>(weights.at(y, x) + h) * (load<A>(grad.at(y, x) + h) - first);
      mean += row;
    }
    for (i64 y = 0; y < height; ++y)
      for (i64 x = 0; x < width; ++x) {
        A* at = grad.at(y, x) + h;
        store<A>(at, load<A>(weights.at(y, x) + h) * (load<A>(at) - first - mean));
      }
  }
}

// ---- one row of channels per head of each window: an array [B,windows,h,C] ----

template <class A> struct HeadRows {
  A* data = nullptr;
  i64 window = 0, head = 0;  // strides

  A* at(i64 w) const { return data + w * window; }
};

// Whether rows can be used where they are.
template <class A, class T>
inline bool rows_in_place(const Array& rows, i64 channels) {
  return std::is_same_v<A, T> && rows.stride[3] == 1 && channels % kLanes<A> == 0;
}

template <class T>
inline T* row_at(const Array& rows, const WindowPiece& piece, i64 w, i64 c0) {
  return static_cast<T*>(rows.data) + piece.b * rows.stride[0] + (piece.first + w) * rows.stride[1] +
         c0 * rows.stride[3];
}

// Room for the rows of a piece.
template <class A>
inline HeadRows<A> rows_slab(const WindowPiece& piece, i64 heads, i64 channels, Scratch& memory) {
  const i64 stride = padded<A>(channels);
  memory.reserve(piece.count * heads * stride * i64(sizeof(A)));
  return {memory.as<A>(), heads * stride, stride};
}

// The rows of a piece, channels [c0, c0 + channels).
template <class A, class T>
inline HeadRows<const A> load_rows(const Array& rows, const WindowPiece& piece, i64 c0, i64 channels,
                                   Scratch& memory) {
  if constexpr (std::is_same_v<A, T>)
    if (rows_in_place<A, T>(rows, channels))
      return {row_at<const A>(rows, piece, 0, c0), rows.stride[1], rows.stride[2]};
  const HeadRows<A> slab = rows_slab<A>(piece, rows.size[2], channels, memory);
  for (i64 w = 0; w < piece.count; ++w)
    stage_row<A, T>(row_at<const T>(rows, piece, w, c0), rows.stride[3], rows.stride[2], channels, rows.size[2],
                    slab.at(w), slab.head);
  return {slab.data, slab.window, slab.head};
}

// Where the rows of a piece are summed; store_rows() brings them to their array.
template <class A, class T>
inline HeadRows<A> sum_rows(const Array& rows, const WindowPiece& piece, i64 c0, i64 channels, Scratch& memory) {
  if constexpr (std::is_same_v<A, T>)
    if (rows_in_place<A, T>(rows, channels))
      return {row_at<A>(rows, piece, 0, c0), rows.stride[1], rows.stride[2]};
  return rows_slab<A>(piece, rows.size[2], channels, memory);
}

template <class A, class T>
inline void store_rows(const HeadRows<A>& sums, const Array& rows, const WindowPiece& piece, i64 c0,
                       i64 channels) {
  if (rows_in_place<A, T>(rows, channels)) return;
  for (i64 w = 0; w < piece.count; ++w)
    unstage_row<A, T>(sums.at(w), sums.head, channels, rows.size[2], row_at<T>(rows, piece, w, c0),
                      rows.stride[3], rows.stride[2]);
}

// ---- matrix products; all leading dimensions hold whole vectors ----

// Sums held in registers: kTileHeads heads by two vectors of channels or by two pixels, or four
// pixels by kTileVectors vectors.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileHeads = 8, kTileVectors = 4;
#else
constexpr int kTileHeads = 4, kTileVectors = 2;
#endif

template <int N> using Count = std::integral_constant<int, N>;

// Cuts [0, total) into steps of Largest, then of half that, and so on: f(start, Count<step>).
template <int Largest, class F>
GI_HOST_DEVICE void in_steps(i64 start, i64 total, F&& f) {
  for (; start + Largest <= total; start += Largest) f(start, Count<Largest>{});
  if constexpr (Largest > 1)
    if (start < total) in_steps<Largest / 2>(start, total, f);
}

template <class A, class S, int M, int V>
inline void pool_tile(const Block<S>& in, i64 height, i64 width, const Block<const A>& weights, A* out,
                      i64 out_stride, bool add) {
  constexpr int L = kLanes<A>;
  Vec<A> sum[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[m][v] = Vec<A>{};
  for (i64 y = 0; y < height; ++y)
    for (i64 x = 0; x < width; ++x) {
      const S* pixel = in.at(y, x);
      const A* weight = weights.at(y, x);
      Vec<A> value[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) value[v] = load<A>(pixel + v * L);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[m][v] += value[v] * weight[m];
    }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      A* at = out + m * out_stride + v * L;
      store<A>(at, add ? load<A>(at) + sum[m][v] : sum[m][v]);
    }
}

// out[h][c] = sum over pixels p of weights[p][h] * in[p][c]; added to what is there if `add`.
template <class A, class S>
inline void pool_window(const Block<S>& in, i64 height, i64 width, const Block<const A>& weights, i64 heads,
                        i64 channels, A* out, i64 out_stride, bool add) {
  constexpr i64 L = kLanes<A>;
  // Summing parts of a large window apart keeps the rounding errors of long sums small.
  const i64 step = maximum<i64>(1, kSumPixels / width);
  for (i64 y = 0; y < height; y += step)
    in_steps<2>(0, (channels + L - 1) / L, [&](i64 block, auto V) {
      const Block<S> part{in.at(y, 0) + block * L, in.sy, in.sx};
      in_steps<kTileHeads>(0, heads, [&](i64 h, auto M) {
        pool_tile<A, S, M(), V()>(part, minimum(step, height - y), width,
                                  {weights.at(y, 0) + h, weights.sy, weights.sx},
                                  out + h * out_stride + block * L, out_stride, add || y > 0);
      });
    });
}

// Rows of channels, one per head, and the weight of each at every pixel.
template <class A> struct WeighedRows {
  const A* rows;
  i64 stride, heads;
  Block<const A> weights;
};

template <class A, int M, int V>
GI_HOST_DEVICE void add_weighed(const WeighedRows<A>& r, i64 y, i64 x, i64 channel, Vec<A> (&sum)[M][V]) {
  const A *rows = r.rows + channel, *weights = r.weights.at(y, x);
  for (i64 h = 0; h < r.heads; ++h) {
    Vec<A> value[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) value[v] = load<A>(rows + h * r.stride + v * kLanes<A>);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[m][v] += value[v] * weights[m * r.weights.sx + h];
  }
}

template <class A, class O, int M, int V, class... Rows>
inline void spread_tile(const Block<O>& out, i64 y, i64 x, i64 channel, const Rows&... rows) {
  Vec<A> sum[M][V] = {};
  (add_weighed<A, M, V>(rows, y, x, channel, sum), ...);
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store<A>(out.at(y, x + m) + channel + v * kLanes<A>, sum[m][v]);
}

// out[p][c] = sum over heads h of weights[p][h] * rows[h][c], and over all `rows` that are given.
template <class A, class O, class... Rows>
inline void spread_window(const Block<O>& out, i64 height, i64 width, i64 channels, const Rows&... rows) {
  constexpr i64 L = kLanes<A>;
  for (i64 y = 0; y < height; ++y)
    in_steps<4>(0, width, [&](i64 x, auto M) {
      in_steps<kTileVectors>(0, (channels + L - 1) / L, [&](i64 block, auto V) {
        spread_tile<A, O, M(), V()>(out, y, x, block * L, rows...);
      });
    });
}

// sums[i] = sum of the lanes of v[i].
template <class A, int N>
GI_HOST_DEVICE void sum_each(const Vec<A>* v, A* sums) {
  constexpr int L = kLanes<A>;
  if constexpr (2 * N < L) {
    for (int i = 0; i < N; ++i) sums[i] = sum_lanes<A>(v[i]);
    return;
  }
  for (int i = 0; i < N; i += L) {
    Vec<A> block[L];
#pragma GCC unroll 16
    for (int j = 0; j < L; ++j) block[j] = i + j < N ? v[i + j] : Vec<A>{};
    const Vec<A> total = sum_each_row<A>(block);
    for (int j = 0; j < L && i + j < N; ++j) sums[i + j] = total[j];
  }
}

template <class A, class S, int M, int N>
inline void dot_tile(const S* pixels, i64 pixel_stride, const A* rows, i64 row_stride, i64 channels, A* dots,
                     i64 dot_stride) {
  Vec<A> dot[N * M] = {};
  for (i64 c = 0; c < channels; c += kLanes<A>) {
    Vec<A> value[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) value[n] = load<A>(pixels + n * pixel_stride + c);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec<A> row = load<A>(rows + m * row_stride + c);
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) dot[n * M + m] += row * value[n];
    }
  }
  A sums[N * M];
  sum_each<A, N * M>(dot, sums);
  for (int n = 0; n < N; ++n)
    for (int m = 0; m < M; ++m) dots[n * dot_stride + m] += sums[n * M + m];
}

// dots[p][h] += sum over channels c of rows[h][c] * in[p][c].
template <class A, class S>
inline void dot_window(const Block<S>& in, i64 height, i64 width, const A* rows, i64 row_stride, i64 heads,
                       i64 channels, const Block<A>& dots) {
  for (i64 y = 0; y < height; ++y)
    in_steps<2>(0, width, [&](i64 x, auto N) {
      in_steps<kTileHeads>(0, heads, [&](i64 h, auto M) {
        dot_tile<A, S, M(), N()>(in.at(y, x), in.sx, rows + h * row_stride, row_stride, channels,
                                 dots.at(y, x) + h, dots.sx);
      });
    });
}

GI_END_VARIANT
