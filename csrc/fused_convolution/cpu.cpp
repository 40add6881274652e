#include "fused_convolution/kernel.h"

#include <type_traits>

#include "common/minimal_filter.h"
#include "common/product.h"

GI_BEGIN_VARIANT

namespace {

// A tile of neighbouring results is transformed, multiplied and transformed back: with the channels as
// rows and columns, each number of a transformed tile is a matrix product of its own ("position"). The
// products of a piece of work, kColumns results wide, stay in the second-level cache.
constexpr i64 kColumns = 128;

template <class V, class H> struct Filter2d {
  using Vertical = V;
  using Horizontal = H;
  static constexpr int positions = V::size * H::size;
};

// Calls f with the filter of a kernel's size for maps of T. Longer tiles take fewer products but lose
// digits: of numbers that are rounded to few digits anyway, none of these.
template <class T, class F> void with_filter(Taps taps, F&& f) {
  using Square = MinimalFilter<4, 3>;
  using Line = std::conditional_t<sizeof(T) < sizeof(float), MinimalFilter<8, 5>, MinimalFilter<4, 5>>;
  using Point = MinimalFilter<1, 1>;
  switch (taps) {
    case Taps::three_by_three: f(Filter2d<Square, Square>{}); break;
    case Taps::one_by_five: f(Filter2d<Point, Line>{}); break;
    case Taps::five_by_one: f(Filter2d<Line, Point>{}); break;
  }
}

// Calls f with a number of the dtype and its filter.
template <class F> void with_case(Dtype dtype, Taps taps, F&& f) {
  with_dtype(dtype, [&](auto t) { with_filter<decltype(t)>(taps, [&](auto filter) { f(t, filter); }); });
}

i64 pieces(i64 size, i64 piece) { return (size + piece - 1) / piece; }

// ---- packed weights: panels [position][panel][channel][kPanel], then the bias, one number per column ----

// Columns of a packed weight, whole panels of every variant and type: shape functions do not know which.
i64 packed_columns(i64 outputs) { return pieces(outputs, 32) * 32; }

i64 packed_panels(i64 positions, i64 channels, i64 outputs) { return positions * channels * packed_columns(outputs); }

i64 packed_size(Taps taps, Dtype dtype, i64 channels, i64 outputs) {
  i64 numbers = 0;
  with_case(dtype, taps, [&](auto, auto filter) {
    numbers = packed_panels(filter.positions, channels, outputs) + packed_columns(outputs);
  });
  return numbers;
}

// Transforms the weight of one channel and of the columns from o on into their place in a panel.
template <class A, class T, class F>
void pack_row(const Array& weight, i64 o, i64 c, A* row, i64 position_stride) {
  constexpr int V = F::Vertical::taps, H = F::Horizontal::taps, L = kLanes<double>;
  const T* source = static_cast<const T*>(weight.data) + o * weight.stride[0] + c * weight.stride[1];
  for (i64 j = 0; j < kPanel<A>; j += L) {
    Vec<double> down[H][F::Vertical::size];
    for (int x = 0; x < H; ++x) {
      Vec<double> g[V];
      for (int y = 0; y < V; ++y)
        for (int i = 0; i < L; ++i)
          g[y][i] = o + j + i < weight.size[0]
                        ? double(to_accumulate(
                              source[(j + i) * weight.stride[0] + y * weight.stride[2] + x * weight.stride[3]]))
                        : 0;
      transform_weight<typename F::Vertical>(g, down[x]);
    }
    for (int y = 0; y < F::Vertical::size; ++y) {
      Vec<double> g[H], u[F::Horizontal::size];
      for (int x = 0; x < H; ++x) g[x] = down[x][y];
      transform_weight<typename F::Horizontal>(g, u);
      for (int x = 0; x < F::Horizontal::size; ++x)
        for (int i = 0; i < L; ++i) row[(y * F::Horizontal::size + x) * position_stride + j + i] = A(u[x][i]);
    }
  }
}

i64 pack_items(const ConvolutionWeight& w) {
  i64 panels = 0;
  with_dtype(w.weight.dtype, [&](auto t) {
    using A = typename Accumulate<decltype(t)>::type;
    static_assert(32 % kPanel<A> == 0);
    panels = packed_columns(w.weight.size[0]) / kPanel<A>;
  });
  return panels;
}

void pack(const ConvolutionWeight& w, i64 begin, i64 end) {
  const i64 O = w.weight.size[0], C = w.weight.size[1];
  with_case(w.weight.dtype, w.taps, [&](auto t, auto filter) {
    using T = decltype(t);
    using A = typename Accumulate<T>::type;
    A* packed = static_cast<A*>(w.packed);
    A* bias = packed + packed_panels(filter.positions, C, O);
    const T* given = static_cast<const T*>(w.bias.data);
    for (i64 panel = begin; panel < end; ++panel) {
      const i64 o = panel * kPanel<A>;
      for (i64 c = 0; c < C; ++c)
        pack_row<A, T, decltype(filter)>(w.weight, o, c, packed + (panel * C + c) * kPanel<A>, packed_columns(O) * C);
      for (i64 j = o; j < o + kPanel<A>; ++j) bias[j] = given && j < O ? to_accumulate(given[j * w.bias.stride[0]]) : 0;
    }
  });
}

// ---- tiles ----

// Numbers between the positions of transformed tiles. An odd number of cache lines more than whole pages
// would be: all positions of a tile are written in turn and must not compete for one set of the cache.
template <class A> i64 position_stride(i64 numbers) {
  constexpr i64 line = 64 / sizeof(A);
  return (numbers + 63 * line) / (64 * line) * (64 * line) + line;
}

template <class F> struct TileGrid {
  i64 rows, columns;

  explicit TileGrid(const Array& map)
      : rows(pieces(map.size[2], F::Vertical::results)), columns(pieces(map.size[3], F::Horizontal::results)) {}
};

// Where a line of the map is read for position `i`, which may lie outside; -1: nowhere, it is zero.
GI_HOST_DEVICE i64 line(i64 i, i64 length, bool reflect) {
  if (i >= 0 && i < length) return i;
  if (!reflect) return -1;
  const i64 mirrored = i < 0 ? -i : 2 * (length - 1) - i;
  return mirrored >= 0 && mirrored < length ? mirrored : -1;  // beyond: only results outside read it
}

// The first `count` of kLanes<A> numbers, zeros behind them.
template <class A, class T> GI_HOST_DEVICE Vec<A> load_first(const T* p, i64 count) {
  alignas(64) T lanes[kLanes<A>] = {};
  std::memcpy(lanes, p, count * sizeof(T));
  return load<A>(lanes);
}

template <class A, class T, class F> struct Tiles {
  using V = typename F::Vertical;
  using H = typename F::Horizontal;
  static constexpr int L = kLanes<A>;

  const FusedConvolution& f;
  const TileGrid<F> grid;
  const i64 height, width;

  explicit Tiles(const FusedConvolution& convolution)
      : f(convolution), grid(f.output), height(f.output.size[2]), width(f.output.size[3]) {}

  // Transformed tiles [position][tile][channel] <- tiles of image n; the channels of all inputs follow
  // each other. What is written beyond the last channel is overwritten by the next tile.
  void read(i64 n, i64 first, i64 count, const T* zeros, A* values, i64 depth, i64 stride) const {
    for (i64 t = 0; t < count; ++t, values += depth) {
      const i64 y0 = (first + t) / grid.columns * V::results - V::taps / 2;
      const i64 x0 = (first + t) % grid.columns * H::results - H::taps / 2;
      A* to = values;
      for (int i = 0; i < f.count; ++i) {
        const Array& map = f.inputs[i];
        const T* image = static_cast<const T*>(map.data) + n * map.stride[0];
        const T* pixels[V::size][H::size];
        i64 columns[H::size];
        for (int x = 0; x < H::size; ++x) columns[x] = line(x0 + x, width, f.reflect);
        for (int y = 0; y < V::size; ++y) {
          const i64 row = line(y0 + y, height, f.reflect);
          const T* start = image + maximum<i64>(row, 0) * map.stride[2];
          for (int x = 0; x < H::size; ++x)
            pixels[y][x] = row < 0 || columns[x] < 0 ? zeros : start + columns[x] * map.stride[3];
        }
        const i64 C = map.size[1];
        i64 c = 0;
        for (; c + L <= C; c += L) transform(pixels, to + c, stride, [&](const T* p) { return load<A>(p + c); });
        if (c < C)
          transform(pixels, to + c, stride, [&](const T* p) { return load_first<A>(p + c, C - c); });
        to += C;
      }
    }
  }

  // Results of the columns from `o` on <- their products [position][tile][kColumns].
  void write(i64 n, i64 first, i64 count, i64 o, i64 columns, const A* sums, i64 stride, const A* bias) const {
    for (i64 t = 0; t < count; ++t, sums += kColumns) {
      const i64 y0 = (first + t) / grid.columns * V::results, x0 = (first + t) % grid.columns * H::results;
      const i64 rows = minimum<i64>(V::results, height - y0), across = minimum<i64>(H::results, width - x0);
      for (i64 c = 0; c < columns; c += L) {
        Vec<A> y[V::results][H::results];
        transform_back(sums + c, stride, y);
        const i64 valid = minimum<i64>(L, columns - c);
        const Vec<A> shift = load<A>(bias + c);
        for (i64 v = 0; v < rows; ++v)
          for (i64 h = 0; h < across; ++h) finish(y[v][h] + shift, n, o + c, y0 + v, x0 + h, valid);
      }
    }
  }

 private:
  template <class Load>
  static GI_HOST_DEVICE void transform(const T* const (&pixels)[V::size][H::size], A* to, i64 stride, Load&& load) {
    Vec<A> down[H::size][V::size];
    for (int x = 0; x < H::size; ++x) {
#pragma GCC unroll 12
      for (int y = 0; y < V::size; ++y) down[x][y] = load(pixels[y][x]);
      transform_input<V>(down[x]);
    }
    for (int y = 0; y < V::size; ++y) {
      Vec<A> across[H::size];
#pragma GCC unroll 12
      for (int x = 0; x < H::size; ++x) across[x] = down[x][y];
      transform_input<H>(across);
#pragma GCC unroll 12
      for (int x = 0; x < H::size; ++x) store<A>(to + (y * H::size + x) * stride, across[x]);
    }
  }

  static GI_HOST_DEVICE void transform_back(const A* sums, i64 stride, Vec<A> (&y)[V::results][H::results]) {
    Vec<A> down[H::size][V::results];
    for (int x = 0; x < H::size; ++x) {
      Vec<A> v[V::size];
#pragma GCC unroll 12
      for (int i = 0; i < V::size; ++i) v[i] = load<A>(sums + (i * H::size + x) * stride);
      transform_output<V>(v, down[x]);
    }
    for (int i = 0; i < V::results; ++i) {
      Vec<A> v[H::size];
#pragma GCC unroll 12
      for (int x = 0; x < H::size; ++x) v[x] = down[x][i];
      transform_output<H>(v, y[i]);
    }
  }

  // Writes `valid` results of a pixel, the channels from o on.
  GI_HOST_DEVICE void finish(Vec<A> v, i64 n, i64 o, i64 y, i64 x, i64 valid) const {
    if (f.addend.data) {
      const T* p = pixel(f.addend, n, o, y, x);
      v += valid == L ? load<A>(p) : load_first<A>(p, valid);
    }
    v = activated(v, f.activation);
    T* p = pixel(f.output, n, o, y, x);
    if (valid == L) return store<A>(p, v);
    T lanes[L];
    store<A>(lanes, v);
    std::memcpy(p, lanes, valid * sizeof(T));
  }

  static GI_HOST_DEVICE T* pixel(const Array& map, i64 n, i64 c, i64 y, i64 x) {
    return static_cast<T*>(map.data) + n * map.stride[0] + c + y * map.stride[2] + x * map.stride[3];
  }

  static GI_HOST_DEVICE Vec<A> activated(const Vec<A>& v, Activation activation) {
    switch (activation) {
      case Activation::relu: return v < 0 ? splat<A>(0) : v;  // NaN stays NaN
      case Activation::sigmoid: return 1 / (1 + vexp<A>(-v));
      case Activation::tanh: return 1 - 2 / (1 + vexp<A>(2 * v));
      default: return v;
    }
  }
};

i64 depth_of(const FusedConvolution& f) {
  i64 depth = 0;
  for (int i = 0; i < f.count; ++i) depth += f.inputs[i].size[1];
  return depth;
}

template <class A, class T, class F>
void convolve_typed(const FusedConvolution& f, i64 begin, i64 end) {
  const Tiles<A, T, F> tiles(f);
  const i64 per_image = tiles.grid.rows * tiles.grid.columns, runs = pieces(per_image, f.item_tiles);
  const i64 depth = depth_of(f), O = f.output.size[1];
  i64 widest = 0;
  for (int i = 0; i < f.count; ++i) widest = maximum(widest, f.inputs[i].size[1]);
  const i64 value_stride = position_stride<A>(f.item_tiles * depth + kLanes<A>);
  const i64 sum_stride = position_stride<A>(f.item_tiles * kColumns);
  Scratch values(F::positions * value_stride * i64(sizeof(A))), sums(F::positions * sum_stride * i64(sizeof(A)));
  Scratch zeros(maximum<i64>(1, widest) * i64(sizeof(T)));
  std::memset(zeros.as<T>(), 0, maximum<i64>(1, widest) * sizeof(T));
  const A* panels = static_cast<const A*>(f.packed);
  const A* bias = panels + packed_panels(F::positions, depth, O);
  for (i64 item = begin; item < end; ++item) {
    const i64 n = item / runs, first = item % runs * f.item_tiles;
    const i64 count = minimum(f.item_tiles, per_image - first);
    tiles.read(n, first, count, zeros.as<T>(), values.as<A>(), depth, value_stride);
    for (i64 o = 0; o < O; o += kColumns) {
      const i64 columns = minimum(kColumns, O - o);
      const auto at = [&](i64 position, i64 column) {
        return panels + (position * packed_columns(O) + column) * depth;
      };
      const A* following = o + kColumns < O ? at(0, o + kColumns) : nullptr;
      for (int p = 0; p < F::positions; ++p)
        multiply<A>(count, columns, depth, Factor<A>{values.as<A>() + p * value_stride, depth, 1},
                    Panels<A>{at(p, o), depth * kPanel<A>}, sums.as<A>() + p * sum_stride, kColumns, Into::overwrite,
                    p + 1 < F::positions ? at(p + 1, o) : following);
      tiles.write(n, first, count, o, columns, sums.as<A>(), sum_stride, bias + o);
    }
  }
}

i64 tiles(const FusedConvolution& f) {
  i64 count = 0;
  with_case(f.output.dtype, f.taps, [&](auto, auto filter) {
    const TileGrid<decltype(filter)> grid(f.output);
    count = grid.rows * grid.columns;
  });
  return count;
}

i64 tile_bytes(const FusedConvolution& f) {
  i64 bytes = 0;
  with_case(f.output.dtype, f.taps, [&](auto t, auto filter) {
    bytes = filter.positions * (depth_of(f) + kColumns) * i64(sizeof(typename Accumulate<decltype(t)>::type));
  });
  return bytes;
}

i64 items(const FusedConvolution& f) { return f.output.size[0] * pieces(tiles(f), f.item_tiles); }

void convolve(const FusedConvolution& f, i64 begin, i64 end) {
  with_case(f.output.dtype, f.taps, [&](auto t, auto filter) {
    using T = decltype(t);
    convolve_typed<typename Accumulate<T>::type, T, decltype(filter)>(f, begin, end);
  });
}

}  // namespace

extern const FusedConvolutionKernels fused_convolution_kernels;
const FusedConvolutionKernels fused_convolution_kernels = {packed_size, pack_items, pack,    tiles,
                                                           tile_bytes,  items,      convolve};

GI_END_VARIANT
