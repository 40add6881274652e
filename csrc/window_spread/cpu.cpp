#include "window_spread/kernel.h"

#include "common/windows.h"

GI_BEGIN_VARIANT

// The gates of a piece, every one the sigmoid of its logit.
template <class A, class T>
Block<A> gates_of(const Array& logits, const WindowGrid& grid, const WindowPiece& piece, Scratch& memory) {
  const Block<A> gates = stage_heads<A, T>(logits, piece, grid.height, memory);
  const i64 count = grid.height * gates.sy;
  for (i64 i = 0; i < count; i += kLanes<A>)
    store<A>(gates.data + i, A(1) / (A(1) + vexp<A>(-load<A>(gates.data + i))));
  return gates;
}

// Turns the gradient of the gates into that of the logits.
template <class A>
void sigmoid_backward(const Block<A>& gates, const Block<A>& grad, i64 height) {
  const i64 count = height * gates.sy;
  for (i64 i = 0; i < count; i += kLanes<A>) {
    const Vec<A> gate = load<A>(gates.data + i);
    store<A>(grad.data + i, load<A>(grad.data + i) * (gate * (A(1) - gate)));
  }
}

// ---- forward ----

template <class A>
WindowGrid forward_grid(const WindowSpreadForward& a) {
  return WindowGrid(a.output, a.rows, a.columns, needs_slab<A>(a.output));
}

template <class T>
void forward_typed(const WindowSpreadForward& a, i64 begin, i64 end) {
  using A = typename Accumulate<T>::type;
  const i64 C = a.latents.size[3], heads = a.logits.size[1];
  const WindowGrid grid = forward_grid<A>(a);
  const auto steps = WindowSteps::of<A>(C, grid, needs_slab<A>(a.output));
  Scratch gate_memory, pixel_memory, row_memory;
  for (i64 item = begin; item < end; ++item) {
    const WindowPiece piece = grid.piece(item);
    const Block<A> gates = gates_of<A, T>(a.logits, grid, piece, gate_memory);
    for (i64 c0 = 0; c0 < C; c0 += steps.channels) {
      const i64 channels = minimum(steps.channels, C - c0);
      const HeadRows<const A> latents = load_rows<A, T>(a.latents, piece, c0, channels, row_memory);
      for (i64 y0 = 0; y0 < grid.height; y0 += steps.rows) {
        const i64 rows = minimum(steps.rows, grid.height - y0);
        write_pixels<A, T>(a.output, piece, c0, channels, y0, rows, pixel_memory, [&](auto out) {
          for (i64 w = 0; w < piece.count; ++w) {
            const WeighedRows<A> of_window{latents.at(w), latents.head, heads,
                                           constant(rows_from(gates, y0, w * grid.width))};
            spread_window<A>(rows_from(out, 0, w * grid.width), rows, grid.width, channels, of_window);
          }
        });
      }
    }
  }
}

i64 forward_items(const WindowSpreadForward& a) {
  return a.output.dtype == Dtype::f64 ? forward_grid<double>(a).items() : forward_grid<float>(a).items();
}

void forward(const WindowSpreadForward& a, i64 begin, i64 end) {
  with_dtype(a.output.dtype, [&](auto t) { forward_typed<decltype(t)>(a, begin, end); });
}

// ---- backward ----

template <class A>
WindowGrid backward_grid(const WindowSpreadBackward& a) {
  return WindowGrid(a.grad, a.rows, a.columns, needs_slab<A>(a.grad));
}

template <class T>
void backward_typed(const WindowSpreadBackward& a, i64 begin, i64 end) {
  using A = typename Accumulate<T>::type;
  const i64 C = a.latents.size[3], heads = a.logits.size[1];
  const WindowGrid grid = backward_grid<A>(a);
  const auto steps = WindowSteps::of<A>(C, grid, needs_slab<A>(a.grad));
  Scratch gate_memory, dot_memory, pixel_memory, row_memory, sum_memory;
  for (i64 item = begin; item < end; ++item) {
    const WindowPiece piece = grid.piece(item);
    const Block<A> gates = gates_of<A, T>(a.logits, grid, piece, gate_memory);
    Block<A> dots;
    if (a.grad_logits.data) dots = zero_heads<A>(heads, piece, grid.height, dot_memory);
    for (i64 c0 = 0; c0 < C; c0 += steps.channels) {
      const i64 channels = minimum(steps.channels, C - c0);
      HeadRows<const A> latents;
      HeadRows<A> sums;
      if (a.grad_logits.data) latents = load_rows<A, T>(a.latents, piece, c0, channels, row_memory);
      if (a.grad_latents.data) sums = sum_rows<A, T>(a.grad_latents, piece, c0, channels, sum_memory);
      for (i64 y0 = 0; y0 < grid.height; y0 += steps.rows) {
        const i64 rows = minimum(steps.rows, grid.height - y0);
        with_pixels<A, T>(a.grad, piece, c0, channels, y0, rows, pixel_memory, [&](auto grad) {
          for (i64 w = 0; w < piece.count; ++w) {
            const auto pixels = rows_from(grad, 0, w * grid.width);
            if (a.grad_logits.data)
              dot_window<A>(pixels, rows, grid.width, latents.at(w), latents.head, heads, channels,
                            rows_from(dots, y0, w * grid.width));
            if (a.grad_latents.data)
              pool_window<A>(pixels, rows, grid.width, constant(rows_from(gates, y0, w * grid.width)), heads,
                             channels, sums.at(w), sums.head, y0 > 0);
          }
        });
      }
      if (a.grad_latents.data) store_rows<A, T>(sums, a.grad_latents, piece, c0, channels);
    }
    if (a.grad_logits.data) {
      sigmoid_backward<A>(gates, dots, grid.height);
      unstage_heads<A, T>(dots, a.grad_logits, piece, grid.height);
    }
  }
}

i64 backward_items(const WindowSpreadBackward& a) {
  return a.grad.dtype == Dtype::f64 ? backward_grid<double>(a).items() : backward_grid<float>(a).items();
}

void backward(const WindowSpreadBackward& a, i64 begin, i64 end) {
  with_dtype(a.grad.dtype, [&](auto t) { backward_typed<decltype(t)>(a, begin, end); });
}

extern const WindowSpreadKernels window_spread_kernels;
const WindowSpreadKernels window_spread_kernels = {forward_items, forward, backward_items, backward};

GI_END_VARIANT
