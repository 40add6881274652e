#include "window_query/kernel.h"

#include "common/windows.h"

GI_BEGIN_VARIANT

namespace {

// A piece is read twice, for its logits and for its sums. It is cut so that all its channels stay in the
// second-level cache in between, beside the sums of as many windows.
constexpr i64 kStagedWidth = 32;
constexpr i64 kSlabBytes = i64(512) << 10;
constexpr i64 kSlabChannels = 1024;

// Most parts that the queries' gradient is summed in.
constexpr i64 kQuerySums = 64;

// ---- pixels and queries ----

// Parts of a map's pieces, in place or copied; a copy stays until another part is read.
template <class A, class T>
class Pixels {
 public:
  explicit Pixels(const Array& map) : map_(map) {}

  // Calls f with rows [y0, y0 + rows) of a piece, channels from c0 on.
  template <class F>
  void read(const WindowPiece& piece, i64 c0, i64 channels, i64 y0, i64 rows, F&& f) {
    const auto plane = plane_of<const T>(map_, piece, c0);
    const T* first = plane.data + y0 * plane.sy;
    if (!needs_slab<A>(map_)) return f(Block<const T>{first, plane.sy, plane.sx});
    const Block<A> slab = slab_block<A>(piece, rows, channels, memory_);
    const Part wanted{first, channels, rows, piece.width};
    if (wanted != copied_) stage<A, T>(plane, channels, y0, y0 + rows, piece.width, slab.data, slab.sx);
    copied_ = wanted;
    f(constant(slab));
  }

 private:
  // What tells parts of a map with different numbers apart, whatever its strides.
  struct Part {
    const T* first;
    i64 channels, rows, width;
    bool operator==(const Part&) const = default;
  };

  const Array& map_;
  Scratch memory_;
  Part copied_{};
};

// The queries in accumulation type, filled up to whole vectors with zeros.
template <class A, class T>
HeadRows<const A> load_queries(const Array& queries, Scratch& memory) {
  const i64 heads = queries.size[0], C = queries.size[1], stride = padded<A>(C);
  memory.reserve(heads * stride * i64(sizeof(A)));
  stage_row<A, T>(static_cast<const T*>(queries.data), queries.stride[1], queries.stride[0], C, heads,
                  memory.as<A>(), stride);
  return {memory.as<A>(), 0, stride};
}

template <class A> bool is_staged(const WindowQueryForward& a) { return needs_slab<A>(a.features); }

template <class A> bool is_staged(const WindowQueryBackward& a) {
  return needs_slab<A>(a.features) || needs_slab<A>(a.grad_features);
}

template <class A, class Arguments>
WindowGrid grid_of(const Arguments& a) {
  return WindowGrid(a.features, a.rows, a.columns, is_staged<A>(a), kStagedWidth);
}

template <class A, class Arguments>
WindowSteps steps_of(const Arguments& a, const WindowGrid& grid) {
  return WindowSteps::of<A>(a.features.size[1], grid, is_staged<A>(a), kSlabBytes, kSlabChannels);
}

// Calls f(c0, channels, y0, rows) for the parts of a piece, all rows of some channels after each other.
template <class F>
void each_part(const WindowSteps& steps, i64 C, i64 height, F&& f) {
  for (i64 c0 = 0; c0 < C; c0 += steps.channels)
    for (i64 y0 = 0; y0 < height; y0 += steps.rows)
      f(c0, minimum(steps.channels, C - c0), y0, minimum(steps.rows, height - y0));
}

template <class A>
void softmax_of_windows(const Block<A>& logits, const WindowGrid& grid, const WindowPiece& piece, i64 heads) {
  for (i64 w = 0; w < piece.count; ++w)
    softmax<A>(rows_from(logits, 0, w * grid.width), grid.height, grid.width, heads);
}

// ---- forward ----

template <class T>
void forward_typed(const WindowQueryForward& a, i64 begin, i64 end) {
  using A = typename Accumulate<T>::type;
  const i64 C = a.features.size[1], heads = a.queries.size[0];
  const WindowGrid grid = grid_of<A>(a);
  const WindowSteps steps = steps_of<A>(a, grid);
  Scratch query_memory, weight_memory, sum_memory;
  Pixels<A, T> pixels(a.features);
  const auto queries = load_queries<A, T>(a.queries, query_memory);
  for (i64 item = begin; item < end; ++item) {
    const WindowPiece piece = grid.piece(item);
    const Block<A> weights = zero_heads<A>(heads, piece, grid.height, weight_memory);
    each_part(steps, C, grid.height, [&](i64 c0, i64 channels, i64 y0, i64 rows) {
      pixels.read(piece, c0, channels, y0, rows, [&](auto in) {
        dot_window<A>(in, rows, piece.width, queries.data + c0, queries.head, heads, channels,
                      rows_from(weights, y0, 0));
      });
    });
    softmax_of_windows<A>(weights, grid, piece, heads);
    HeadRows<A> sums;
    each_part(steps, C, grid.height, [&](i64 c0, i64 channels, i64 y0, i64 rows) {
      if (y0 == 0) sums = sum_rows<A, T>(a.output, piece, c0, channels, sum_memory);
      pixels.read(piece, c0, channels, y0, rows, [&](auto in) {
        for (i64 w = 0; w < piece.count; ++w)
          pool_window<A>(rows_from(in, 0, w * grid.width), rows, grid.width,
                         constant(rows_from(weights, y0, w * grid.width)), heads, channels, sums.at(w), sums.head,
                         y0 > 0);
      });
      if (y0 + rows == grid.height) store_rows<A, T>(sums, a.output, piece, c0, channels);
    });
  }
}

i64 forward_items(const WindowQueryForward& a) {
  return a.features.dtype == Dtype::f64 ? grid_of<double>(a).items() : grid_of<float>(a).items();
}

void forward(const WindowQueryForward& a, i64 begin, i64 end) {
  with_dtype(a.features.dtype, [&](auto t) { forward_typed<decltype(t)>(a, begin, end); });
}

// ---- backward ----

i64 backward_items(const WindowQueryBackward& a) {
  const i64 pieces = a.features.dtype == Dtype::f64 ? grid_of<double>(a).items() : grid_of<float>(a).items();
  return minimum(kQuerySums, pieces);
}

// An item is a run of pieces, whose part of the queries' gradient is summed.
template <class T>
void backward_typed(const WindowQueryBackward& a, i64 begin, i64 end) {
  using A = typename Accumulate<T>::type;
  const i64 C = a.features.size[1], heads = a.queries.size[0], stride = padded<A>(C);
  const WindowGrid grid = grid_of<A>(a);
  const WindowSteps steps = steps_of<A>(a, grid);
  Scratch query_memory, weight_memory, dot_memory, row_memory, gradient_memory;
  Scratch sum_memory(heads * stride * i64(sizeof(A)));
  Pixels<A, T> pixels(a.features);
  const auto queries = load_queries<A, T>(a.queries, query_memory);
  A* sums = sum_memory.as<A>();

  const auto add_piece = [&](const WindowPiece& piece) {
    const Block<A> weights = zero_heads<A>(heads, piece, grid.height, weight_memory);
    const Block<A> dots = zero_heads<A>(heads, piece, grid.height, dot_memory);
    each_part(steps, C, grid.height, [&](i64 c0, i64 channels, i64 y0, i64 rows) {
      const auto grad = load_rows<A, T>(a.grad, piece, c0, channels, row_memory);
      pixels.read(piece, c0, channels, y0, rows, [&](auto in) {
        dot_window<A>(in, rows, piece.width, queries.data + c0, queries.head, heads, channels,
                      rows_from(weights, y0, 0));
        for (i64 w = 0; w < piece.count; ++w)
          dot_window<A>(rows_from(in, 0, w * grid.width), rows, grid.width, grad.at(w), grad.head, heads, channels,
                        rows_from(dots, y0, w * grid.width));
      });
    });
    softmax_of_windows<A>(weights, grid, piece, heads);
    for (i64 w = 0; w < piece.count; ++w)
      softmax_backward<A>(rows_from(weights, 0, w * grid.width), rows_from(dots, 0, w * grid.width), grid.height,
                          grid.width, heads);
    // The dots are now the gradient of the logits.
    each_part(steps, C, grid.height, [&](i64 c0, i64 channels, i64 y0, i64 rows) {
      if (a.query_sums.data)
        pixels.read(piece, c0, channels, y0, rows, [&](auto in) {
          pool_window<A>(in, rows, piece.width, constant(rows_from(dots, y0, 0)), heads, channels, sums + c0, stride,
                         true);
        });
      if (!a.grad_features.data) return;
      const auto grad = load_rows<A, T>(a.grad, piece, c0, channels, row_memory);
      write_pixels<A, T>(a.grad_features, piece, c0, channels, y0, rows, gradient_memory, [&](auto out) {
        for (i64 w = 0; w < piece.count; ++w) {
          const i64 x = w * grid.width;
          const WeighedRows<A> as_values{grad.at(w), grad.head, heads, constant(rows_from(weights, y0, x))};
          const WeighedRows<A> as_keys{queries.data + c0, queries.head, heads, constant(rows_from(dots, y0, x))};
          spread_window<A>(rows_from(out, 0, x), rows, grid.width, channels, as_values, as_keys);
        }
      });
    });
  };

  const i64 pieces = grid.items(), items = backward_items(a);
  for (i64 item = begin; item < end; ++item) {
    std::memset(sums, 0, size_t(heads * stride) * sizeof(A));
    for (i64 i = item * pieces / items; i < (item + 1) * pieces / items; ++i) add_piece(grid.piece(i));
    if (a.query_sums.data)
      unstage_row<A, A>(sums, stride, C, heads, static_cast<A*>(a.query_sums.data) + item * a.query_sums.stride[0],
                        a.query_sums.stride[2], a.query_sums.stride[1]);
  }
}

void backward(const WindowQueryBackward& a, i64 begin, i64 end) {
  with_dtype(a.features.dtype, [&](auto t) { backward_typed<decltype(t)>(a, begin, end); });
}

}  // namespace

extern const WindowQueryKernels window_query_kernels;
const WindowQueryKernels window_query_kernels = {forward_items, forward, backward_items, backward};

GI_END_VARIANT
