#include "window_pool/cuda.h"

#include "common/device_windows.h"

namespace gi {

void window_pool_forward(const WindowPoolForward& a, void* memory, Stream stream) {
  using namespace GI_VARIANT;
  with_dtype(a.features.dtype, [&](auto t) {
    using T = decltype(t);
    auto* weights = static_cast<typename Accumulate<T>::type*>(memory);
    const Windows windows(a.logits, a.rows, a.columns);
    launch_teams(SoftmaxWeights<T>{windows, Map<const T>(a.logits), weights}, windows.batch,
                 windows.count() * windows.heads, kWarp, stream);
    launch_pool<T>(windows, a.features, weights, a.output, stream);
  });
}

void window_pool_backward(const WindowPoolBackward& a, void* weight_memory, void* dot_memory, Stream stream) {
  using namespace GI_VARIANT;
  with_dtype(a.features.dtype, [&](auto t) {
    using T = decltype(t);
    using A = typename Accumulate<T>::type;
    A *weights = static_cast<A*>(weight_memory), *dots = static_cast<A*>(dot_memory);
    const Windows windows(a.logits, a.rows, a.columns);
    const i64 items = windows.count() * windows.heads;
    launch_teams(SoftmaxWeights<T>{windows, Map<const T>(a.logits), weights}, windows.batch, items, kWarp, stream);
    if (a.grad_features.data) launch_spread<T>(windows, a.grad, weights, a.grad_features, stream);
    if (!a.grad_logits.data) return;
    launch_dots<T>(windows, a.features, a.grad, dots, stream);
    launch_teams(SoftmaxGradient<T>{windows, weights, dots, Map<T>(a.grad_logits)}, windows.batch, items, kWarp,
                 stream);
  });
}

}  // namespace gi
