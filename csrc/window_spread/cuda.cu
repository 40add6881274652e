#include "window_spread/cuda.h"

#include "common/device_windows.h"

namespace gi {

void window_spread_forward(const WindowSpreadForward& a, void* memory, Stream stream) {
  using namespace GI_VARIANT;
  with_dtype(a.output.dtype, [&](auto t) {
    using T = decltype(t);
    auto* gates = static_cast<typename Accumulate<T>::type*>(memory);
    const Windows windows(a.logits, a.rows, a.columns);
    launch_items(Gates<T>{windows, Map<const T>(a.logits), gates}, windows.batch, windows.pixels() * windows.heads,
                 stream);
    launch_spread<T>(windows, a.latents, gates, a.output, stream);
  });
}

void window_spread_backward(const WindowSpreadBackward& a, void* gate_memory, void* dot_memory, Stream stream) {
  using namespace GI_VARIANT;
  with_dtype(a.grad.dtype, [&](auto t) {
    using T = decltype(t);
    using A = typename Accumulate<T>::type;
    A *gates = static_cast<A*>(gate_memory), *dots = static_cast<A*>(dot_memory);
    const Windows windows(a.logits, a.rows, a.columns);
    const i64 items = windows.pixels() * windows.heads;
    launch_items(Gates<T>{windows, Map<const T>(a.logits), gates}, windows.batch, items, stream);
    if (a.grad_latents.data) launch_pool<T>(windows, a.grad, gates, a.grad_latents, stream);
    if (!a.grad_logits.data) return;
    launch_dots<T>(windows, a.grad, a.latents, dots, stream);
    launch_items(GateGradient<T>{windows, gates, dots, Map<T>(a.grad_logits)}, windows.batch, items, stream);
  });
}

}  // namespace gi
