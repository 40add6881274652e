#include "relayout/kernel.h"

#include <type_traits>

#include "common/gather.h"

GI_BEGIN_VARIANT

// Pixels of a piece: of planes, whole cache lines.
constexpr i64 kRelayoutPixels = 64;

// Channels that are copied by way of a slab at a time.
constexpr i64 kRelayoutChannels = 256;

i64 pieces_of_row(const Relayout& a) { return (a.source.size[3] + kRelayoutPixels - 1) / kRelayoutPixels; }

i64 items(const Relayout& a) { return a.source.size[0] * a.source.size[2] * pieces_of_row(a); }

// Whether a map's pixels are whole vectors in accumulation type, so that it is a slab itself.
template <class A, class T>
bool is_slab(const Array& map) {
  return std::is_same_v<A, T> && map.stride[1] == 1 && map.stride[3] >= map.size[1] &&
         map.size[1] % kLanes<A> == 0;
}

// A row of pixels, all channels, from one map to another.
template <class A, class T>
void copy_row(const Plane<const T>& source, const Plane<T>& target, i64 channels, i64 pixels, A* slab) {
  for (i64 c = 0; c < channels; c += kRelayoutChannels) {
    const i64 count = minimum(kRelayoutChannels, channels - c), stride = padded<A>(count);
    stage_row<A, T>(source.data + c * source.sc, source.sc, source.sx, count, pixels, slab, stride);
    unstage_row<A, T>(slab, stride, count, pixels, target.data + c * target.sc, target.sc, target.sx);
  }
}

template <class T>
void copy_typed(const Relayout& a, i64 begin, i64 end) {
  using A = typename Accumulate<T>::type;
  const i64 C = a.source.size[1], H = a.source.size[2], W = a.source.size[3], pieces = pieces_of_row(a);
  const bool from_slab = is_slab<A, T>(a.source), to_slab = is_slab<A, T>(a.target);
  Scratch memory(kRelayoutPixels * kRelayoutChannels * i64(sizeof(A)));
  for (i64 item = begin; item < end; ++item) {
    const i64 x = item % pieces * kRelayoutPixels, y = item / pieces % H, b = item / pieces / H;
    const i64 pixels = minimum(kRelayoutPixels, W - x);
    auto source = plane_of<const T>(a.source, b, 0);
    auto target = plane_of<T>(a.target, b, 0);
    source.data += y * source.sy + x * source.sx;
    target.data += y * target.sy + x * target.sx;
    if constexpr (std::is_same_v<A, T>) {
      if (from_slab) {
        unstage_row<A, T>(source.data, source.sx, C, pixels, target.data, target.sc, target.sx);
        continue;
      }
      if (to_slab) {
        stage_row<A, T>(source.data, source.sc, source.sx, C, pixels, target.data, target.sx);
        continue;
      }
    }
    copy_row<A, T>(source, target, C, pixels, memory.as<A>());
  }
}

void copy(const Relayout& a, i64 begin, i64 end) {
  with_dtype(a.source.dtype, [&](auto t) { copy_typed<decltype(t)>(a, begin, end); });
}

extern const RelayoutKernels relayout_kernels;
const RelayoutKernels relayout_kernels = {items, copy};

GI_END_VARIANT
