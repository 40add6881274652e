#include "fourier/kernel.h"

#include <cmath>
#include <utility>

#include "common/staging.h"

GI_BEGIN_VARIANT

namespace {

// The transform of a real map is half of a complex one. So two vectors of channels are transformed at a
// time, one as real and one as imaginary parts; by the symmetry of real maps' spectra they are told apart.
template <class A> struct Complex {
  Vec<A> re, im;
};

// The first `count` of kLanes<A> numbers, zeros behind them.
template <class A, class T> GI_HOST_DEVICE Vec<A> load_first(const T* p, i64 count) {
  if (count == kLanes<A>) return load<A>(p);
  alignas(64) T lanes[kLanes<A>] = {};
  std::memcpy(lanes, p, count * sizeof(T));
  return load<A>(lanes);
}

template <class A, class T> GI_HOST_DEVICE void store_first(T* p, const Vec<A>& v, i64 count) {
  if (count == kLanes<A>) return store<A>(p, v);
  T lanes[kLanes<A>];
  store<A>(lanes, v);
  std::memcpy(p, lanes, count * sizeof(T));
}

// [re0, im0, re1, im1, ...], its second half in v.im; and back.
template <class A> GI_HOST_DEVICE Complex<A> interleaved(const Complex<A>& v) {
  constexpr int L = kLanes<A>;
#if defined(__clang__)
  Complex<A> out;
  for (int i = 0; i < L; ++i) {
    out.re[i] = (i % 2 ? v.im : v.re)[i / 2];
    out.im[i] = (i % 2 ? v.im : v.re)[(L + i) / 2];
  }
  return out;
#else
  IntVec<A> lane;
  for (int i = 0; i < L; ++i) lane[i] = i / 2 + i % 2 * L;
  return {__builtin_shuffle(v.re, v.im, lane), __builtin_shuffle(v.re, v.im, lane + L / 2)};
#endif
}

template <class A> GI_HOST_DEVICE Complex<A> separated(const Complex<A>& v) {
  constexpr int L = kLanes<A>;
#if defined(__clang__)
  Complex<A> out;
  for (int i = 0; i < L; ++i) {
    out.re[i] = (2 * i < L ? v.re : v.im)[2 * i % L];
    out.im[i] = (2 * i < L ? v.re : v.im)[2 * i % L + 1];
  }
  return out;
#else
  IntVec<A> lane;
  for (int i = 0; i < L; ++i) lane[i] = 2 * i;
  return {__builtin_shuffle(v.re, v.im, lane), __builtin_shuffle(v.re, v.im, lane + 1)};
#endif
}

// ---- one line: rows or columns of complex vectors ----

// Transforms of one length, the sum of x[j] e^(-2 pi i j k / length), by Stockham's passes: each does the
// steps of one factor of the length and leaves the numbers in an order such that the last one's is right.
template <class A> class LineTransform {
 public:
  explicit LineTransform(i64 length) : length_(length), waves_(2 * length * i64(sizeof(A))) {
    for (i64 t = 0; t < length; ++t) {
      const double angle = 2 * 3.14159265358979323846 * double(t) / double(length);
      waves_.template as<A>()[2 * t] = A(std::cos(angle));
      waves_.template as<A>()[2 * t + 1] = A(-std::sin(angle));
    }
  }

  // Overwrites both lines; returns the one that the result is in.
  Complex<A>* operator()(Complex<A>* x, Complex<A>* y) const {
    for (i64 n = length_, step = 1; n > 1; std::swap(x, y)) {
      const i64 factor = n % 4 == 0 ? 4 : smallest_factor(n);
      n /= factor;
      if (factor == 4) pass_of_four(x, y, n, step);
      else if (factor == 2) pass_of_two(x, y, n, step);
      else pass_of(factor, x, y, n, step);
      step *= factor;
    }
    return x;
  }

 private:
  i64 length_;
  Scratch waves_;  // cosine and sine of the angles -2 pi t / length

  static i64 smallest_factor(i64 n) {
    for (i64 f = 2; f * f <= n; ++f)
      if (n % f == 0) return f;
    return n;
  }

  static GI_HOST_DEVICE Complex<A> add(const Complex<A>& a, const Complex<A>& b) { return {a.re + b.re, a.im + b.im}; }
  static GI_HOST_DEVICE Complex<A> subtract(const Complex<A>& a, const Complex<A>& b) {
    return {a.re - b.re, a.im - b.im};
  }
  static GI_HOST_DEVICE Complex<A> quarter_turn(const Complex<A>& a) { return {a.im, -a.re}; }  // times -i

  // Times e^(-2 pi i t / length), 0 <= t < length.
  GI_HOST_DEVICE Complex<A> turned(const Complex<A>& a, i64 t) const {
    const A c = waves_.template as<A>()[2 * t], s = waves_.template as<A>()[2 * t + 1];
    return {a.re * c - a.im * s, a.re * s + a.im * c};
  }

  void pass_of_two(const Complex<A>* x, Complex<A>* y, i64 rest, i64 step) const {
    for (i64 p = 0; p < rest; ++p)
      for (i64 q = 0; q < step; ++q) {
        const Complex<A> a = x[q + step * p], b = x[q + step * (p + rest)];
        y[q + step * 2 * p] = add(a, b);
        y[q + step * (2 * p + 1)] = turned(subtract(a, b), p * step);
      }
  }

  void pass_of_four(const Complex<A>* x, Complex<A>* y, i64 rest, i64 step) const {
    for (i64 p = 0; p < rest; ++p)
      for (i64 q = 0; q < step; ++q) {
        const Complex<A>*from = x + q + step * p;
        const Complex<A> a = from[0], b = from[step * rest], c = from[step * 2 * rest], d = from[step * 3 * rest];
        const Complex<A> even = add(a, c), odd = add(b, d), even2 = subtract(a, c), odd2 = quarter_turn(subtract(b, d));
        Complex<A>* to = y + q + step * 4 * p;
        to[0] = add(even, odd);
        to[step] = turned(add(even2, odd2), p * step);
        to[2 * step] = turned(subtract(even, odd), 2 * p * step);
        to[3 * step] = turned(subtract(even2, odd2), 3 * p * step);
      }
  }

  void pass_of(i64 factor, const Complex<A>* x, Complex<A>* y, i64 rest, i64 step) const {
    for (i64 p = 0; p < rest; ++p)
      for (i64 k = 0; k < factor; ++k)
        for (i64 q = 0; q < step; ++q) {
          Complex<A> sum = {};
          for (i64 j = 0; j < factor; ++j)
            sum = add(sum, turned(x[q + step * (p + rest * j)], j * k % factor * (length_ / factor)));
          y[q + step * (factor * p + k)] = turned(sum, p * k * step);
        }
  }
};

// ---- maps ----

template <class A> constexpr i64 kGroup = 2 * kLanes<A>;  // channels of a piece of work

template <class A, class T> struct Transforms {
  static constexpr i64 L = kLanes<A>;

  const FourierTransform& f;
  const i64 C, H, W, frequencies;
  const LineTransform<A> along_rows, along_columns;
  const i64 pitch;  // complex vectors; not a power of two, or all rows would compete for one set of the cache
  Scratch plane_memory, line_memory;
  Complex<A>*const plane, *const lines[4];

  explicit Transforms(const FourierTransform& transform)
      : f(transform), C(f.map.size[1]), H(f.map.size[2]), W(f.map.size[3]), frequencies(W / 2 + 1), along_rows(W),
        along_columns(H), pitch(W | 1), plane_memory(H * pitch * i64(sizeof(Complex<A>))),
        line_memory(4 * maximum(H, W) * i64(sizeof(Complex<A>))), plane(plane_memory.as<Complex<A>>()),
        lines{line(0), line(1), line(2), line(3)} {}

  Complex<A>* line(i64 i) const { return line_memory.as<Complex<A>>() + i * maximum(H, W); }

  // Vectors of channels from c on in the two halves of the group: how many numbers each has.
  i64 first(i64 c) const { return minimum(L, C - c); }
  i64 second(i64 c) const { return maximum<i64>(0, minimum(L, C - c - L)); }

  bool stands_for_two(i64 frequency) const { return frequency > 0 && 2 * frequency < W; }

  void forward(i64 n, i64 c) {
    const T* image = static_cast<const T*>(f.map.data) + n * f.map.stride[0] + c;
    for (i64 y = 0; y < H; ++y) {
      const T* p = image + y * f.map.stride[2];
      for (i64 x = 0; x < W; ++x, p += f.map.stride[3])
        lines[0][x] = {load_first<A>(p, first(c)), second(c) ? load_first<A>(p + L, second(c)) : splat<A>(0)};
      std::memcpy((void*)(plane + y * pitch), along_rows(lines[0], lines[1]), W * sizeof(Complex<A>));
    }
    const double scale = 0.5 / std::sqrt(double(H) * double(W));
    for (i64 k = 0; k < frequencies; ++k) {
      const Complex<A>* here = column(k, lines[0], lines[1]);
      const Complex<A>* opposite = column((W - k) % W, lines[2], lines[3]);
      const A factor = A(stands_for_two(k) ? scale * f.inner : scale);
      for (i64 y = 0; y < H; ++y) {
        const Complex<A> a = here[y], b = opposite[(H - y) % H];
        T* out = pixel<T>(f.spectrum, n, 2 * c, y, k);
        write({(a.re + b.re) * factor, (a.im - b.im) * factor}, out, first(c));
        write({(a.im + b.im) * factor, (b.re - a.re) * factor}, out + 2 * L, second(c));
      }
    }
  }

  // The inverse is the transform with real and imaginary parts exchanged, before and after.
  void inverse(i64 n, i64 c) {
    const double scale = 1 / std::sqrt(double(H) * double(W));
    for (i64 k = 0; k < frequencies; ++k) {
      const bool two = stands_for_two(k);
      const A factor = A(two ? scale * f.inner : scale);
      for (i64 y = 0; y < H; ++y) {
        const T* p = pixel<const T>(f.spectrum, n, 2 * c, y, k);
        const Complex<A> a = read(p, first(c)), b = read(p + 2 * L, second(c));
        lines[0][y] = {a.im * factor, a.re * factor};
        lines[2][y] = {b.im * factor, b.re * factor};
      }
      const Complex<A>*a = along_columns(lines[0], lines[1]), *b = along_columns(lines[2], lines[3]);
      for (i64 y = 0; y < H; ++y) {
        Complex<A>* row = plane + y * pitch;
        // Of frequencies that stand for themselves alone the real part counts.
        row[k] = two ? Complex<A>{a[y].re + b[y].im, a[y].im - b[y].re} : Complex<A>{b[y].im, a[y].im};
        if (two) row[W - k] = {b[y].im - a[y].re, a[y].im + b[y].re};
      }
    }
    for (i64 y = 0; y < H; ++y) {
      const Complex<A>* row = along_rows(plane + y * pitch, lines[0]);
      for (i64 x = 0; x < W; ++x) {
        finish(row[x].im, n, c, y, x, first(c));
        finish(row[x].re, n, c + L, y, x, second(c));
      }
    }
  }

 private:
  template <class P> static GI_HOST_DEVICE P* pixel(const Array& map, i64 n, i64 c, i64 y, i64 x) {
    return static_cast<P*>(map.data) + n * map.stride[0] + c + y * map.stride[2] + x * map.stride[3];
  }

  const Complex<A>* column(i64 x, Complex<A>* line, Complex<A>* other) const {
    for (i64 y = 0; y < H; ++y) line[y] = plane[y * pitch + x];
    return along_columns(line, other);
  }

  // Real and imaginary parts of `count` channels side by side.
  static GI_HOST_DEVICE void write(const Complex<A>& v, T* p, i64 count) {
    const Complex<A> sides = interleaved(v);
    if (count == 0) return;
    store_first<A>(p, sides.re, minimum(L, 2 * count));
    if (2 * count > L) store_first<A>(p + L, sides.im, 2 * count - L);
  }

  static GI_HOST_DEVICE Complex<A> read(const T* p, i64 count) {
    if (count == 0) return Complex<A>{};
    const Vec<A> high = 2 * count > L ? load_first<A>(p + L, 2 * count - L) : splat<A>(0);
    return separated(Complex<A>{load_first<A>(p, minimum(L, 2 * count)), high});
  }

  GI_HOST_DEVICE void finish(Vec<A> v, i64 n, i64 c, i64 y, i64 x, i64 count) const {
    if (count == 0) return;
    if (f.addend.data) v += load_first<A>(pixel<const T>(f.addend, n, c, y, x), count);
    store_first<A>(pixel<T>(f.map, n, c, y, x), v, count);
  }
};

template <class A> i64 groups(const FourierTransform& f) { return (f.map.size[1] + kGroup<A> - 1) / kGroup<A>; }

// Calls f with the transforms and with image and first channel of every piece of work.
template <class F> void for_each(const FourierTransform& f, i64 begin, i64 end, F&& call) {
  with_dtype(f.map.dtype, [&](auto t) {
    using A = typename Accumulate<decltype(t)>::type;
    Transforms<A, decltype(t)> transforms(f);
    for (i64 item = begin; item < end; ++item)
      call(transforms, item / groups<A>(f), item % groups<A>(f) * kGroup<A>);
  });
}

i64 items(const FourierTransform& f) {
  i64 count = 0;
  with_dtype(f.map.dtype,
             [&](auto t) { count = f.map.size[0] * groups<typename Accumulate<decltype(t)>::type>(f); });
  return count;
}

void forward(const FourierTransform& f, i64 begin, i64 end) {
  for_each(f, begin, end, [](auto& transforms, i64 n, i64 c) { transforms.forward(n, c); });
}

void inverse(const FourierTransform& f, i64 begin, i64 end) {
  for_each(f, begin, end, [](auto& transforms, i64 n, i64 c) { transforms.inverse(n, c); });
}

}  // namespace

extern const FourierKernels fourier_kernels;
const FourierKernels fourier_kernels = {items, forward, inverse};

GI_END_VARIANT
