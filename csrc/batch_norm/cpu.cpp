#include "batch_norm/kernel.h"

#include <type_traits>

#include "common/gather.h"

GI_BEGIN_VARIANT

namespace {

// Pixels of a piece. Sums over so few lose no digits in float32; sums of pieces are in float64.
constexpr i64 kNormPixels = 256;

// Channels of a piece that are worked on at a time where they are copied.
constexpr i64 kNormChannels = 256;

struct Piece {
  i64 b, y, x, pixels;
};

i64 pieces_of_row(const BatchNorm& a) { return (a.input.size[3] + kNormPixels - 1) / kNormPixels; }

i64 items(const BatchNorm& a) { return a.input.size[0] * a.input.size[2] * pieces_of_row(a); }

Piece piece_of(const BatchNorm& a, i64 item) {
  const i64 across = pieces_of_row(a), rows = item / across, x = item % across * kNormPixels;
  return {rows / a.input.size[2], rows % a.input.size[2], x, minimum(kNormPixels, a.input.size[3] - x)};
}

// Pixels one after the other, each with its channels, whole vectors of them.
template <class A> struct Pixels {
  A* data;
  i64 stride;

  A* at(i64 p) const { return data + p * stride; }
};

template <class T>
Plane<T> piece_plane(const Array& map, const Piece& piece, i64 c0) {
  Plane<T> plane = plane_of<T>(map, piece.b, c0);
  plane.data += piece.y * plane.sy + piece.x * plane.sx;
  return plane;
}

// Whether a piece of a map can be used where it is.
template <class A, class T>
bool used_in_place(const Array& map) {
  return std::is_same_v<A, T> && map.stride[1] == 1 && map.size[1] % kLanes<A> == 0;
}

template <class A>
Pixels<A> slab_of(i64 channels, Scratch& memory) {
  const i64 stride = padded<A>(channels);
  memory.reserve(kNormPixels * stride * i64(sizeof(A)));
  return {memory.as<A>(), stride};
}

template <class A, class T>
Pixels<const A> read_pixels(const Array& map, const Piece& piece, i64 c0, i64 channels, Scratch& memory) {
  const auto plane = piece_plane<const T>(map, piece, c0);
  if constexpr (std::is_same_v<A, T>)
    if (used_in_place<A, T>(map)) return {plane.data, plane.sx};
  const Pixels<A> slab = slab_of<A>(channels, memory);
  stage_row<A, T>(plane.data, plane.sc, plane.sx, channels, piece.pixels, slab.data, slab.stride);
  return {slab.data, slab.stride};
}

// Calls f to write a piece of a map, in place or to a slab that is then copied.
template <class A, class T, class F>
void write_pixels(const Array& map, const Piece& piece, i64 c0, i64 channels, Scratch& memory, F&& f) {
  const auto plane = piece_plane<T>(map, piece, c0);
  if constexpr (std::is_same_v<A, T>)
    if (used_in_place<A, T>(map)) return f(Pixels<A>{plane.data, plane.sx});
  const Pixels<A> slab = slab_of<A>(channels, memory);
  f(slab);
  unstage_row<A, T>(slab.data, slab.stride, channels, piece.pixels, plane.data, plane.sc, plane.sx);
}

// Numbers per channel of one worker, padded with zeros to whole vectors.
template <class A> struct PerChannel {
  explicit PerChannel(i64 channels) : size(padded<A>(channels)), memory(size * i64(sizeof(A))) { clear(); }

  PerChannel(const void* vector, i64 channels) : PerChannel(channels) {
    std::memcpy(data(), vector, channels * sizeof(A));
  }

  void clear() { std::memset(data(), 0, size * sizeof(A)); }
  A* data() const { return memory.template as<A>(); }
  Vec<A> at(i64 c) const { return load<A>(data() + c); }
  void add(i64 c, const Vec<A>& value) { store<A>(data() + c, at(c) + value); }

  i64 size;
  Scratch memory;
};

// What the norm does to a number, in forward and, for the ReLU's sake, in backward.
template <class A> struct Normalisation {
  PerChannel<A> mean, scale, bias;
  bool relu;

  explicit Normalisation(const BatchNorm& a)
      : mean(a.mean, a.input.size[1]), scale(a.weight, a.input.size[1]), bias(a.bias, a.input.size[1]),
        relu(a.relu) {
    for (i64 c = 0; c < a.input.size[1]; ++c) scale.data()[c] *= static_cast<const A*>(a.inverse)[c];
  }

  Vec<A> affine(const Vec<A>& deviation, i64 c) const { return deviation * scale.at(c) + bias.at(c); }

  // NaN stays NaN.
  Vec<A> output(const Vec<A>& deviation, i64 c) const {
    const Vec<A> y = affine(deviation, c);
    return relu ? (y < 0 ? splat<A>(0) : y) : y;
  }

  Vec<A> gradient(const Vec<A>& grad, const Vec<A>& deviation, i64 c) const {
    return relu ? (affine(deviation, c) <= 0 ? splat<A>(0) : grad) : grad;
  }
};

// Calls f(piece, first channel, channels, item) for blocks of channels that fit the cache where they are
// copied, all channels where they are not.
template <class F>
void for_blocks(const BatchNorm& a, bool in_place, i64 begin, i64 end, F&& f) {
  const i64 C = a.input.size[1], step = in_place ? maximum<i64>(C, 1) : kNormChannels;
  for (i64 item = begin; item < end; ++item) {
    const Piece piece = piece_of(a, item);
    for (i64 c0 = 0; c0 < C; c0 += step) f(piece, c0, minimum(step, C - c0), item);
  }
}

template <class A>
A* part_of(const BatchNorm& a, i64 item, i64 which) {
  return static_cast<A*>(a.parts) + (2 * item + which) * a.input.size[1];
}

// ---- forward ----

template <class T>
void statistics_typed(const BatchNorm& a, i64 begin, i64 end) {
  using A = typename Accumulate<T>::type;
  constexpr i64 L = kLanes<A>;
  Scratch memory;
  PerChannel<A> mean(a.input.size[1]), square(a.input.size[1]);
  for_blocks(a, used_in_place<A, T>(a.input), begin, end, [&](const Piece& piece, i64 c0, i64 channels, i64 item) {
    const auto x = read_pixels<A, T>(a.input, piece, c0, channels, memory);
    mean.clear();
    square.clear();
    for (i64 p = 0; p < piece.pixels; ++p)
      for (i64 c = 0; c < channels; c += L) mean.add(c, load<A>(x.at(p) + c));
    for (i64 c = 0; c < channels; c += L) store<A>(mean.data() + c, mean.at(c) / A(piece.pixels));
    for (i64 p = 0; p < piece.pixels; ++p)
      for (i64 c = 0; c < channels; c += L) {
        const Vec<A> deviation = load<A>(x.at(p) + c) - mean.at(c);
        square.add(c, deviation * deviation);
      }
    std::memcpy(part_of<A>(a, item, 0) + c0, mean.data(), channels * sizeof(A));
    std::memcpy(part_of<A>(a, item, 1) + c0, square.data(), channels * sizeof(A));
  });
}

template <class A>
void merge_statistics_typed(const BatchNorm& a, i64 begin, i64 end) {
  const i64 count = items(a), C = a.input.size[1];
  A* totals = static_cast<A*>(a.totals);
  for (i64 c = begin; c < end; ++c) {
    double pixels = 0, sum = 0, square = 0;
    for (i64 item = 0; item < count; ++item) {
      const double n = double(piece_of(a, item).pixels);
      pixels += n;
      sum += n * double(part_of<A>(a, item, 0)[c]);
    }
    const double mean = sum / pixels;
    for (i64 item = 0; item < count; ++item) {
      const double deviation = double(part_of<A>(a, item, 0)[c]) - mean;
      square += double(part_of<A>(a, item, 1)[c]) + double(piece_of(a, item).pixels) * deviation * deviation;
    }
    totals[c] = A(mean);
    totals[C + c] = A(square / pixels);
  }
}

template <class T>
void forward_typed(const BatchNorm& a, i64 begin, i64 end) {
  using A = typename Accumulate<T>::type;
  const Normalisation<A> norm(a);
  const bool in_place = used_in_place<A, T>(a.input) && used_in_place<A, T>(a.result);
  Scratch memory, result_memory;
  for_blocks(a, in_place, begin, end, [&](const Piece& piece, i64 c0, i64 channels, i64) {
    const auto x = read_pixels<A, T>(a.input, piece, c0, channels, memory);
    write_pixels<A, T>(a.result, piece, c0, channels, result_memory, [&](const Pixels<A>& y) {
      for (i64 p = 0; p < piece.pixels; ++p)
        for (i64 c = 0; c < channels; c += kLanes<A>)
          store<A>(y.at(p) + c, norm.output(load<A>(x.at(p) + c) - norm.mean.at(c0 + c), c0 + c));
    });
  });
}

// ---- backward ----

template <class T>
void gradient_sums_typed(const BatchNorm& a, i64 begin, i64 end) {
  using A = typename Accumulate<T>::type;
  const Normalisation<A> norm(a);
  const bool in_place = used_in_place<A, T>(a.input) && used_in_place<A, T>(a.grad);
  Scratch memory, grad_memory;
  PerChannel<A> sum(a.input.size[1]), product(a.input.size[1]);
  for_blocks(a, in_place, begin, end, [&](const Piece& piece, i64 c0, i64 channels, i64 item) {
    const auto x = read_pixels<A, T>(a.input, piece, c0, channels, memory);
    const auto grad = read_pixels<A, T>(a.grad, piece, c0, channels, grad_memory);
    sum.clear();
    product.clear();
    for (i64 p = 0; p < piece.pixels; ++p)
      for (i64 c = 0; c < channels; c += kLanes<A>) {
        const Vec<A> deviation = load<A>(x.at(p) + c) - norm.mean.at(c0 + c);
        const Vec<A> g = norm.gradient(load<A>(grad.at(p) + c), deviation, c0 + c);
        sum.add(c, g);
        product.add(c, g * deviation);
      }
    std::memcpy(part_of<A>(a, item, 0) + c0, sum.data(), channels * sizeof(A));
    std::memcpy(part_of<A>(a, item, 1) + c0, product.data(), channels * sizeof(A));
  });
}

template <class A>
void merge_sums_typed(const BatchNorm& a, i64 begin, i64 end) {
  const i64 count = items(a), C = a.input.size[1];
  for (i64 c = begin; c < end; ++c)
    for (i64 which = 0; which < 2; ++which) {
      double total = 0;
      for (i64 item = 0; item < count; ++item) total += double(part_of<A>(a, item, which)[c]);
      static_cast<A*>(a.totals)[which * C + c] = A(total);
    }
}

template <class T>
void backward_typed(const BatchNorm& a, i64 begin, i64 end) {
  using A = typename Accumulate<T>::type;
  const i64 C = a.input.size[1];
  const Normalisation<A> norm(a);
  // The gradient's mean, and its regression on the deviation from the mean.
  const A* totals = static_cast<const A*>(a.totals);
  const A pixels = A(a.input.size[0] * a.input.size[2] * a.input.size[3]);
  PerChannel<A> mean(C), slope(C);
  for (i64 c = 0; c < C; ++c) {
    const A inverse = static_cast<const A*>(a.inverse)[c];
    mean.data()[c] = totals[c] / pixels;
    slope.data()[c] = totals[C + c] / pixels * inverse * inverse;
  }
  const bool in_place =
      used_in_place<A, T>(a.input) && used_in_place<A, T>(a.grad) && used_in_place<A, T>(a.result);
  Scratch memory, grad_memory, result_memory;
  for_blocks(a, in_place, begin, end, [&](const Piece& piece, i64 c0, i64 channels, i64) {
    const auto x = read_pixels<A, T>(a.input, piece, c0, channels, memory);
    const auto grad = read_pixels<A, T>(a.grad, piece, c0, channels, grad_memory);
    write_pixels<A, T>(a.result, piece, c0, channels, result_memory, [&](const Pixels<A>& result) {
      for (i64 p = 0; p < piece.pixels; ++p)
        for (i64 c = 0; c < channels; c += kLanes<A>) {
          const i64 k = c0 + c;
          const Vec<A> deviation = load<A>(x.at(p) + c) - norm.mean.at(k);
          const Vec<A> g = norm.gradient(load<A>(grad.at(p) + c), deviation, k);
          store<A>(result.at(p) + c, (g - mean.at(k) - deviation * slope.at(k)) * norm.scale.at(k));
        }
    });
  });
}

// ---- by dtype ----

void statistics(const BatchNorm& a, i64 begin, i64 end) {
  with_dtype(a.input.dtype, [&](auto t) { statistics_typed<decltype(t)>(a, begin, end); });
}

void merge_statistics(const BatchNorm& a, i64 begin, i64 end) {
  if (a.input.dtype == Dtype::f64) merge_statistics_typed<double>(a, begin, end);
  else merge_statistics_typed<float>(a, begin, end);
}

void forward(const BatchNorm& a, i64 begin, i64 end) {
  with_dtype(a.input.dtype, [&](auto t) { forward_typed<decltype(t)>(a, begin, end); });
}

void gradient_sums(const BatchNorm& a, i64 begin, i64 end) {
  with_dtype(a.input.dtype, [&](auto t) { gradient_sums_typed<decltype(t)>(a, begin, end); });
}

void merge_sums(const BatchNorm& a, i64 begin, i64 end) {
  if (a.input.dtype == Dtype::f64) merge_sums_typed<double>(a, begin, end);
  else merge_sums_typed<float>(a, begin, end);
}

void backward(const BatchNorm& a, i64 begin, i64 end) {
  with_dtype(a.input.dtype, [&](auto t) { backward_typed<decltype(t)>(a, begin, end); });
}

}  // namespace

extern const BatchNormKernels batch_norm_kernels;
const BatchNormKernels batch_norm_kernels = {items,         statistics, merge_statistics, forward,
                                             gradient_sums, merge_sums, backward};

GI_END_VARIANT
