#include "window_pool/kernel.h"

#include "common/windows.h"

GI_BEGIN_VARIANT

template <class A, class T>
Block<A> weights_of(const Array& logits, const WindowGrid& grid, const WindowPiece& piece, Scratch& memory) {
  const Block<A> weights = stage_heads<A, T>(logits, piece, grid.height, memory);
  for (i64 w = 0; w < piece.count; ++w)
    softmax<A>(rows_from(weights, 0, w * grid.width), grid.height, grid.width, logits.size[1]);
  return weights;
}

// ---- forward ----

template <class A>
WindowGrid forward_grid(const WindowPoolForward& a) {
  return WindowGrid(a.features, a.rows, a.columns, needs_slab<A>(a.features));
}

template <class T>
void forward_typed(const WindowPoolForward& a, i64 begin, i64 end) {
  using A = typename Accumulate<T>::type;
  const i64 C = a.features.size[1], heads = a.logits.size[1];
  const WindowGrid grid = forward_grid<A>(a);
  const auto steps = WindowSteps::of<A>(C, grid, needs_slab<A>(a.features));
  Scratch weight_memory, pixel_memory, sum_memory;
  for (i64 item = begin; item < end; ++item) {
    const WindowPiece piece = grid.piece(item);
    const Block<A> weights = weights_of<A, T>(a.logits, grid, piece, weight_memory);
    for (i64 c0 = 0; c0 < C; c0 += steps.channels) {
      const i64 channels = minimum(steps.channels, C - c0);
      const HeadRows<A> sums = sum_rows<A, T>(a.output, piece, c0, channels, sum_memory);
      for (i64 y0 = 0; y0 < grid.height; y0 += steps.rows) {
        const i64 rows = minimum(steps.rows, grid.height - y0);
        with_pixels<A, T>(a.features, piece, c0, channels, y0, rows, pixel_memory, [&](auto in) {
          for (i64 w = 0; w < piece.count; ++w)
            pool_window<A>(rows_from(in, 0, w * grid.width), rows, grid.width,
                           constant(rows_from(weights, y0, w * grid.width)), heads, channels, sums.at(w),
                           sums.head, y0 > 0);
        });
      }
      store_rows<A, T>(sums, a.output, piece, c0, channels);
    }
  }
}

i64 forward_items(const WindowPoolForward& a) {
  return a.features.dtype == Dtype::f64 ? forward_grid<double>(a).items() : forward_grid<float>(a).items();
}

void forward(const WindowPoolForward& a, i64 begin, i64 end) {
  with_dtype(a.features.dtype, [&](auto t) { forward_typed<decltype(t)>(a, begin, end); });
}

// ---- backward ----

template <class A>
bool backward_staged(const WindowPoolBackward& a) {
  return (a.grad_logits.data && needs_slab<A>(a.features)) || needs_slab<A>(a.grad_features);
}

template <class A>
WindowGrid backward_grid(const WindowPoolBackward& a) {
  return WindowGrid(a.features, a.rows, a.columns, backward_staged<A>(a));
}

template <class T>
void backward_typed(const WindowPoolBackward& a, i64 begin, i64 end) {
  using A = typename Accumulate<T>::type;
  const i64 C = a.features.size[1], heads = a.logits.size[1];
  const WindowGrid grid = backward_grid<A>(a);
  const auto steps = WindowSteps::of<A>(C, grid, backward_staged<A>(a));
  Scratch weight_memory, dot_memory, pixel_memory, row_memory;
  for (i64 item = begin; item < end; ++item) {
    const WindowPiece piece = grid.piece(item);
    const Block<A> weights = weights_of<A, T>(a.logits, grid, piece, weight_memory);
    Block<A> dots;
    if (a.grad_logits.data) dots = zero_heads<A>(heads, piece, grid.height, dot_memory);
    for (i64 c0 = 0; c0 < C; c0 += steps.channels) {
      const i64 channels = minimum(steps.channels, C - c0);
      const HeadRows<const A> grad = load_rows<A, T>(a.grad, piece, c0, channels, row_memory);
      for (i64 y0 = 0; y0 < grid.height; y0 += steps.rows) {
        const i64 rows = minimum(steps.rows, grid.height - y0);
        if (a.grad_logits.data)
          with_pixels<A, T>(a.features, piece, c0, channels, y0, rows, pixel_memory, [&](auto in) {
            for (i64 w = 0; w < piece.count; ++w)
              dot_window<A>(rows_from(in, 0, w * grid.width), rows, grid.width, grad.at(w), grad.head, heads,
                            channels, rows_from(dots, y0, w * grid.width));
          });
        if (a.grad_features.data)
          write_pixels<A, T>(a.grad_features, piece, c0, channels, y0, rows, pixel_memory, [&](auto out) {
            for (i64 w = 0; w < piece.count; ++w) {
              const WeighedRows<A> of_window{grad.at(w), grad.head, heads,
                                             constant(rows_from(weights, y0, w * grid.width))};
              spread_window<A>(rows_from(out, 0, w * grid.width), rows, grid.width, channels, of_window);
            }
          });
      }
    }
    if (a.grad_logits.data) {
      for (i64 w = 0; w < piece.count; ++w)
        softmax_backward<A>(rows_from(weights, 0, w * grid.width), rows_from(dots, 0, w * grid.width),
                            grid.height, grid.width, heads);
      unstage_heads<A, T>(dots, a.grad_logits, piece, grid.height);
    }
  }
}

i64 backward_items(const WindowPoolBackward& a) {
  return a.features.dtype == Dtype::f64 ? backward_grid<double>(a).items() : backward_grid<float>(a).items();
}

void backward(const WindowPoolBackward& a, i64 begin, i64 end) {
  with_dtype(a.features.dtype, [&](auto t) { backward_typed<decltype(t)>(a, begin, end); });
}

extern const WindowPoolKernels window_pool_kernels;
const WindowPoolKernels window_pool_kernels = {forward_items, forward, backward_items, backward};

GI_END_VARIANT
