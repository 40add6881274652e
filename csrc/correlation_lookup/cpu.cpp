#include "correlation_lookup/kernel.h"

#include <type_traits>

#include "common/gather.h"
#include "correlation_lookup/place.h"

GI_BEGIN_VARIANT

// First the patch of a window is read, or computed, with zeros outside the map; then it is blended
// separably.

// Pixels of a row that are one piece of work.
constexpr i64 kRunPixels = 16;

// Patch pixels whose products with a feature vector are summed at the same time.
template <class A> constexpr int kDots = kLanes<A> < 10 ? kLanes<A> : 10;

template <class A>
GI_HOST_DEVICE IntVec<A> lanes_from(i64 first) {
  IntVec<A> lane;
  for (int i = 0; i < kLanes<A>; ++i) lane[i] = first + i;
  return lane;
}

// Sizes of a window and of the buffers it is worked on in. A row of a patch has `stride` numbers:
// its n, zeros up to whole vectors, and a vector more, so that rows can be read one to the right.
template <class A> struct Shape {
  i64 radius, side, n, vectors, stride, window;

  explicit Shape(i64 r)
      : radius(r), side(2 * r + 1), n(2 * r + 2), vectors(padded<A>(n)), stride(vectors + kLanes<A>),
        window(side * side) {}
  i64 patch() const { return n * stride; }
};

// Patch -> window: out[(x offset)*side + (y offset)]. Writes up to a vector beyond the window.
// `turned` holds vectors^2 numbers.
template <class A>
void blend(const Shape<A>& s, const Place<A>& p, const A* patch, A* turned, A* out) {
  constexpr i64 L = kLanes<A>;
  for (i64 ib = 0; ib < s.side; ib += L) {
    const auto row = [&](i64 j) {
      const A* from = patch + minimum(j, s.n - 1) * s.stride + ib;
      return (1 - p.fx) * load<A>(from) + p.fx * load<A>(from + 1);
    };
    Vec<A> above = row(0);
    for (i64 jb = 0; jb < s.side; jb += L) {
      Vec<A> block[L];
      for (i64 k = 0; k < L; ++k) {
        const Vec<A> below = row(jb + k + 1);
        block[k] = (1 - p.fy) * above + p.fy * below;
        above = below;
      }
      transpose<A>(block);
      for (i64 k = 0; k < L; ++k) store<A>(turned + (ib + k) * s.vectors + jb, block[k]);
    }
  }
  // In this order each row overwrites what the one before wrote beyond its end.
  for (i64 i = 0; i < s.side; ++i)
    for (i64 jb = 0; jb < s.side; jb += L)
      store<A>(out + i * s.side + jb, load<A>(turned + i * s.vectors + jb));
}

// Gradient of a window -> gradient of its patch, rows of `stride`, zeros beyond n; and, where `patch`
// is given, the gradient of the position, added to `position`. `turned` holds n rows of `stride`.
template <class A>
void blend_backward(const Shape<A>& s, const Place<A>& p, const A* grad, const A* patch, A* turned,
                    A* grad_patch, A* position) {
  constexpr i64 L = kLanes<A>;
  // The window's gradient with x along the rows, a vector of zeros before and zeros behind.
  for (i64 j = 0; j < s.side; ++j) store<A>(turned + j * s.stride, splat<A>(0));
  for (i64 ib = 0; ib < s.vectors; ib += L)
    for (i64 jb = 0; jb < s.side; jb += L) {
      Vec<A> block[L];
      for (i64 k = 0; k < L; ++k)
        block[k] = ib + k < s.side ? load<A>(grad + (ib + k) * s.side + jb) : splat<A>(0);
      transpose<A>(block);
      for (i64 k = 0; k < L && jb + k < s.side; ++k) store<A>(turned + (jb + k) * s.stride + L + ib, block[k]);
    }
  if (grad_patch)
    for (i64 ib = 0; ib < s.vectors; ib += L) {
      Vec<A> above = {};
      for (i64 j = 0; j < s.n; ++j) {
        Vec<A> here = {};
        if (j < s.side) {
          const A* from = turned + j * s.stride + L + ib;
          here = (1 - p.fx) * load<A>(from) + p.fx * load<A>(from - 1);
        }
        store<A>(grad_patch + j * s.stride + ib, (1 - p.fy) * here + p.fy * above);
        above = here;
      }
    }
  if (!patch) return;
  // Sample by sample, so that infinities meet as they do in the definition.
  Vec<A> dx = {}, dy = {};
  for (i64 ib = 0; ib < s.side; ib += L) {
    const IntVec<A> lane = lanes_from<A>(ib);
    const IntVec<A> in_window = lane < static_cast<std::remove_reference_t<decltype(lane[0])>>(s.side);
    Vec<A> a0 = load<A>(patch + ib), a1 = load<A>(patch + ib + 1);
    for (i64 j = 0; j < s.side; ++j) {
      const A* from = patch + (j + 1) * s.stride + ib;
      const Vec<A> b0 = load<A>(from), b1 = load<A>(from + 1);
      const Vec<A> g = load<A>(turned + j * s.stride + L + ib);
      const Vec<A> gx = g * ((1 - p.fy) * (a1 - a0) + p.fy * (b1 - b0));
      const Vec<A> gy = g * ((1 - p.fx) * (b0 - a0) + p.fx * (b1 - a1));
      dx += in_window ? gx : splat<A>(0);
      dy += in_window ? gy : splat<A>(0);
      a0 = b0;
      a1 = b1;
    }
  }
  position[0] += sum_lanes<A>(dx);
  position[1] += sum_lanes<A>(dy);
}

// ---- runs of pixels ----

// A run of pixels of one row, and the position of each in level 0.
template <class A> struct Run {
  i64 b, y, x0, pixels;
  const A *x, *y_;  // coords of the first pixel

  Run(const LookupWindow& w, i64 item) {
    const i64 runs = (w.width + kRunPixels - 1) / kRunPixels;
    x0 = item % runs * kRunPixels;
    y = item / runs % w.height;
    b = item / runs / w.height;
    pixels = minimum(kRunPixels, w.width - x0);
    x = static_cast<const A*>(w.coords) + (b * 2 * w.height + y) * w.width + x0;
    y_ = x + w.height * w.width;
  }

  i64 first(const LookupWindow& w) const { return (b * w.height + y) * w.width + x0; }

  Place<A> place(i64 pixel, int level, const Shape<A>& shape, i64 height, i64 width) const {
    return place_in_level<A>(x[pixel], y_[pixel], level, shape.radius, height, width);
  }
};

i64 runs(const LookupWindow& w) { return w.batch * w.height * ((w.width + kRunPixels - 1) / kRunPixels); }

// Numbers in accumulation type -> contiguous storage.
template <class A, class T>
void write(const A* from, i64 count, T* to) {
  i64 c = 0;
  for (; c + kLanes<A> <= count; c += kLanes<A>) store<A>(to + c, load<A>(from + c));
  for (; c < count; ++c) to[c] = Rounded<T>::from(from[c]);
}

// Memory of one worker for windows.
template <class A> struct WindowMemory {
  Scratch memory;
  A *patch, *grad_patch, *turned, *window;  // the last for all levels of a pixel

  WindowMemory(const Shape<A>& s, int levels) {
    const i64 turned_size = s.vectors * s.stride, window_size = levels * s.window + kLanes<A>;
    const i64 total = 2 * s.patch() + turned_size + window_size;
    memory.reserve(total * i64(sizeof(A)));
    patch = memory.as<A>();
    std::memset(patch, 0, total * sizeof(A));
    grad_patch = patch + s.patch();
    turned = grad_patch + s.patch();
    window = turned + turned_size;
  }
};

// Gradients of the windows of a run of pixels, channels [c0, c0 + channels), staged pixel by pixel.
template <class A> struct WindowGradients {
  Scratch slab;
  i64 channels, stride;

  explicit WindowGradients(i64 channels_)
      : channels(channels_), stride(padded<A>(channels_) + kLanes<A>) {
    slab.reserve(kRunPixels * stride * i64(sizeof(A)));
  }

  template <class T> void stage(const Array& grad, const Run<A>& run, i64 c0) {
    const T* from = static_cast<const T*>(grad.data) + run.b * grad.stride[0] + c0 * grad.stride[1] +
                    run.y * grad.stride[2] + run.x0 * grad.stride[3];
    stage_row<A, T>(from, grad.stride[1], grad.stride[3], channels, run.pixels, slab.as<A>(), stride);
  }
  const A* at(i64 pixel) const { return slab.as<A>() + pixel * stride; }
};

// ---- lookup in stored volumes ----

// A vector of a patch row, number by number; column 0 would be at `offset`. Not inlined: its addresses
// would be worked out for every row.
template <class A, class T>
__attribute__((noinline)) void read_single(const Place<A>& p, const T* volume, i64 offset, i64 sx, i64 c, A* to) {
  for (i64 i = c; i < c + kLanes<A>; ++i)
    to[i] = i >= p.i0 && i < p.i1 ? to_accumulate(volume[offset + i * sx]) : A(0);
}

// The patch of a volume [H,W] at `volume`; memory that may be read is [first, last).
template <class A, class T>
void read_patch(const Shape<A>& s, const Place<A>& p, const T* volume, i64 sy, i64 sx, const T* first,
                const T* last, A* patch) {
  constexpr i64 L = kLanes<A>;
  for (i64 c = 0; c < s.vectors; c += L) {
    const IntVec<A> lane = lanes_from<A>(c);
    using Index = std::remove_reference_t<decltype(lane[0])>;
    const IntVec<A> inside = (lane >= Index(p.i0)) & (lane < Index(p.i1));
    for (i64 j = 0; j < s.n; ++j) {
      A* to = patch + j * s.stride;
      const i64 offset = (p.y + j) * sy + p.x * sx;
      if (j < p.j0 || j >= p.j1) {
        store<A>(to + c, splat<A>(0));
      } else if (sx == 1 && volume - first + offset + c >= 0 && last - volume >= offset + c + L) {
        // Neighbours that do not belong to the patch may be read, as long as they exist.
        store<A>(to + c, inside ? load<A>(volume + (offset + c)) : splat<A>(0));
      } else {
        read_single(p, volume, offset, sx, c, to);
      }
    }
  }
}

// The volume of one pixel, and the extent of all of them.
template <class T> struct VolumeView {
  const T *first, *last;
  i64 batch_stride, pixel_stride, sy, sx, height, width;

  explicit VolumeView(const Array& a)
      : first(static_cast<const T*>(a.data)), last(first), batch_stride(a.stride[0]), pixel_stride(a.stride[1]),
        sy(a.stride[2]), sx(a.stride[3]), height(a.size[2]), width(a.size[3]) {
    i64 extent = 1;
    for (int i = 0; i < 4; ++i) extent += (a.size[i] - 1) * a.stride[i];
    if (height * width > 0) last += extent;
  }
  const T* at(i64 b, i64 pixel) const { return first + b * batch_stride + pixel * pixel_stride; }
};

// Asks for the patches of a pixel before they are read: each pixel has maps of its own, far from those of
// the pixel before. Always inlined: GCC drops calls of a function that only prefetches.
template <class A, class T>
GI_HOST_DEVICE void prefetch_patches(const LookupForward& a, const Shape<A>& shape, const Run<A>& run,
                                     i64 pixel) {
  if (pixel >= run.pixels) return;
  for (int level = 0; level < a.window.levels; ++level) {
    const VolumeView<T> v(a.volumes[level]);
    const Place<A> p = run.place(pixel, level, shape, v.height, v.width);
    const T* map = v.at(run.b, run.y * a.window.width + run.x0 + pixel) + p.x * v.sx;
    for (i64 j = p.j0; j < p.j1; ++j) {
      __builtin_prefetch(map + (p.y + j) * v.sy + p.i0 * v.sx);
      __builtin_prefetch(map + (p.y + j) * v.sy + (p.i1 - 1) * v.sx);
    }
  }
}

template <class T>
void forward_typed(const LookupForward& a, i64 begin, i64 end) {
  using A = typename Accumulate<T>::type;
  const LookupWindow& w = a.window;
  const Shape<A> shape(w.radius);
  const WindowMemory<A> m(shape, w.levels);
  const i64 channels = w.levels * shape.window;
  for (i64 item = begin; item < end; ++item) {
    const Run<A> run(w, item);
    for (i64 pixel = 0; pixel < run.pixels; ++pixel) {
      prefetch_patches<A, T>(a, shape, run, pixel + 1);
      for (int level = 0; level < w.levels; ++level) {
        const VolumeView<T> v(a.volumes[level]);
        const Place<A> p = run.place(pixel, level, shape, v.height, v.width);
        A* out = m.window + level * shape.window;
        if (p.empty()) {
          std::memset(out, 0, shape.window * sizeof(A));
          continue;
        }
        read_patch<A, T>(shape, p, v.at(run.b, run.y * w.width + run.x0 + pixel), v.sy, v.sx, v.first, v.last,
                         m.patch);
        blend(shape, p, m.patch, m.turned, out);
      }
      write<A, T>(m.window, channels, static_cast<T*>(a.output) + (run.first(w) + pixel) * channels);
    }
  }
}

void forward(const LookupForward& a, i64 begin, i64 end) {
  with_dtype(a.volumes[0].dtype, [&](auto t) { forward_typed<decltype(t)>(a, begin, end); });
}

// Gradients of coords of a run, [2][pixels].
template <class A>
void write_position(const LookupWindow& w, const Run<A>& run, i64 pixel, const A* position, void* grad_coords) {
  A* to = static_cast<A*>(grad_coords) + (run.b * 2 * w.height + run.y) * w.width + run.x0 + pixel;
  to[0] = position[0];
  to[w.height * w.width] = position[1];
}

template <class T>
void backward_typed(const LookupBackward& a, i64 begin, i64 end) {
  using A = typename Accumulate<T>::type;
  const LookupWindow& w = a.window;
  const Shape<A> shape(w.radius);
  const WindowMemory<A> m(shape, w.levels);
  WindowGradients<A> grads(w.levels * shape.window);
  for (i64 item = begin; item < end; ++item) {
    const Run<A> run(w, item);
    grads.template stage<T>(a.grad, run, 0);
    for (i64 pixel = 0; pixel < run.pixels; ++pixel) {
      A total[2] = {};
      for (int level = 0; level < w.levels; ++level) {
        const VolumeView<T> v(a.volumes[level]);
        const i64 size = v.height * v.width;
        T* target = nullptr;
        if (a.grad_volumes) {
          target = static_cast<T*>(a.grad_volumes[level]) + (run.first(w) + pixel) * size;
          if (size > 0) std::memset(static_cast<void*>(target), 0, size * sizeof(T));
        }
        const Place<A> p = run.place(pixel, level, shape, v.height, v.width);
        if (p.empty()) continue;
        if (a.grad_coords)
          read_patch<A, T>(shape, p, v.at(run.b, run.y * w.width + run.x0 + pixel), v.sy, v.sx, v.first, v.last,
                           m.patch);
        A position[2] = {};
        blend_backward(shape, p, grads.at(pixel) + level * shape.window, a.grad_coords ? m.patch : nullptr,
                       m.turned, target ? m.grad_patch : nullptr, position);
        const A scale = A(1) / A(i64(1) << level);
        total[0] += scale * position[0];
        total[1] += scale * position[1];
        if (target)
          for (i64 j = p.j0; j < p.j1; ++j) {
            T* row = target + (p.y + j) * v.width + p.x;
            for (i64 i = p.i0; i < p.i1; ++i) row[i] = Rounded<T>::from(m.grad_patch[j * shape.stride + i]);
          }
      }
      if (a.grad_coords) write_position(w, run, pixel, total, a.grad_coords);
    }
  }
}

void backward(const LookupBackward& a, i64 begin, i64 end) {
  with_dtype(a.volumes[0].dtype, [&](auto t) { backward_typed<decltype(t)>(a, begin, end); });
}

// ---- lookup on demand ----

bool usable_rows(const Array& a) {
  if (a.stride[1] != 1) return false;
  if (a.dtype == Dtype::f64) return a.size[1] % kLanes<double> == 0;
  return a.dtype == Dtype::f32 && a.size[1] % kLanes<float> == 0;
}

i64 padded_channels(Dtype dtype, i64 channels) {
  return dtype == Dtype::f64 ? padded<double>(channels) : padded<float>(channels);
}

void stage(const FeatureStaging& a, i64 begin, i64 end) {
  with_dtype(a.from.dtype, [&](auto t) {
    using T = decltype(t);
    using A = typename Accumulate<T>::type;
    const i64 channels = a.from.size[1], H = a.from.size[2], W = a.from.size[3], stride = padded<A>(channels);
    for (i64 item = begin; item < end; ++item)
      gi::GI_VARIANT::stage<A, T>(plane_of<const T>(a.from, item / H, 0), channels, item % H, item % H + 1, W,
                                  static_cast<A*>(a.to) + item * W * stride, stride);
  });
}

// Products of one vector with `count` rows that lie `step` apart.
template <class A, int count>
GI_HOST_DEVICE void dots(const A* vector, const A* rows, i64 step, i64 channels, A* out) {
  constexpr i64 L = kLanes<A>;
  Vec<A> sums[L] = {};
  for (i64 c = 0; c < channels; c += L) {
    const Vec<A> v = load<A>(vector + c);
#pragma GCC unroll 16
    for (int k = 0; k < count; ++k) sums[k] += v * load<A>(rows + k * step + c);
  }
  const Vec<A> total = sum_each_row<A>(sums);
  if constexpr (count == L) store<A>(out, total);
  else
    for (int k = 0; k < count; ++k) out[k] = total[k];
}

template <class A, int most = kDots<A>>
void some_dots(i64 count, const A* vector, const A* rows, i64 step, i64 channels, A* out) {
  if (count == most) dots<A, most>(vector, rows, step, channels, out);
  else if constexpr (most > 1) some_dots<A, most - 1>(count, vector, rows, step, channels, out);
}

// The patch of the products of `vector` with a level's rows.
template <class A>
void correlate(const Shape<A>& s, const Place<A>& p, const A* vector, const FeatureRows& f, i64 b, i64 channels,
               A* patch) {
  const i64 width = p.i1 - p.i0;
  const i64 pieces = (width + kDots<A> - 1) / kDots<A>, most = (width + pieces - 1) / pieces;
  if (width < s.n || p.j1 - p.j0 < s.n) std::memset(patch, 0, s.patch() * sizeof(A));
  for (i64 j = p.j0; j < p.j1; ++j) {
    const A* row = static_cast<const A*>(f.data) + b * f.batch_stride + (p.y + j) * f.row_stride +
                   (p.x + p.i0) * f.pixel_stride;
    for (i64 i = 0; i < width; i += most)
      some_dots<A>(minimum(most, width - i), vector, row + i * f.pixel_stride, f.pixel_stride, channels,
                   patch + j * s.stride + p.i0 + i);
  }
}

// Feature vectors of a run of pixels, scaled so that products are correlations.
template <class A> struct FeatureRun {
  Scratch slab;
  i64 channels, stride;
  A scale;

  FeatureRun(i64 channels_, i64 all)
      : channels(channels_), stride(padded<A>(channels_)), scale(A(1 / __builtin_sqrt(double(all)))) {
    slab.reserve(kRunPixels * stride * i64(sizeof(A)));
  }

  template <class T> void stage(const Array& features, const Run<A>& run, i64 c0) {
    const T* from = static_cast<const T*>(features.data) + run.b * features.stride[0] +
                    c0 * features.stride[1] + run.y * features.stride[2] + run.x0 * features.stride[3];
    stage_row<A, T>(from, features.stride[1], features.stride[3], channels, run.pixels, slab.as<A>(), stride);
    for (i64 c = 0; c < run.pixels * stride; c += kLanes<A>)
      store<A>(slab.as<A>() + c, load<A>(slab.as<A>() + c) * scale);
  }
  const A* at(i64 pixel) const { return slab.as<A>() + pixel * stride; }
};

template <class T>
void on_demand_typed(const OnDemandForward& a, i64 begin, i64 end) {
  using A = typename Accumulate<T>::type;
  const LookupWindow& w = a.window;
  const Shape<A> shape(w.radius);
  const WindowMemory<A> m(shape, w.levels);
  const i64 channels = w.levels * shape.window, C = a.features1.size[1];
  FeatureRun<A> features(C, C);
  for (i64 item = begin; item < end; ++item) {
    const Run<A> run(w, item);
    features.template stage<T>(a.features1, run, 0);
    for (i64 pixel = 0; pixel < run.pixels; ++pixel) {
      for (int level = 0; level < w.levels; ++level) {
        const FeatureRows& f = a.features2[level];
        const Place<A> p = run.place(pixel, level, shape, f.height, f.width);
        A* out = m.window + level * shape.window;
        if (p.empty()) {
          std::memset(out, 0, shape.window * sizeof(A));
          continue;
        }
        correlate(shape, p, features.at(pixel), f, run.b, features.stride, m.patch);
        blend(shape, p, m.patch, m.turned, out);
      }
      write<A, T>(m.window, channels, static_cast<T*>(a.output) + (run.first(w) + pixel) * channels);
    }
  }
}

void on_demand(const OnDemandForward& a, i64 begin, i64 end) {
  with_dtype(a.features1.dtype, [&](auto t) { on_demand_typed<decltype(t)>(a, begin, end); });
}

// In the definition every gradient is a sum over all pixels, those outside the window with weight zero.
// Zero times a feature is zero, unless the feature is not finite: then it must not be lost.

// sum += 0 * vector
template <class A>
GI_HOST_DEVICE void add_undefined(const A* vector, i64 channels, A* sum) {
  for (i64 c = 0; c < channels; c += kLanes<A>)
    store<A>(sum + c, load<A>(sum + c) + load<A>(vector + c) * A(0));
}

// The same sum over all features of image b.
template <class A>
void undefined_features(const FeatureRows* levels, int count, i64 b, i64 channels, A* sum) {
  std::memset(sum, 0, channels * sizeof(A));
  for (int level = 0; level < count; ++level) {
    const FeatureRows& f = levels[level];
    for (i64 y = 0; y < f.height; ++y)
      for (i64 x = 0; x < f.width; ++x)
        add_undefined(static_cast<const A*>(f.data) + b * f.batch_stride + y * f.row_stride + x * f.pixel_stride,
                      channels, sum);
  }
}

// sum += rows of the patch's pixels, weighted; `count` vectors of channels.
template <class A, int count>
GI_HOST_DEVICE void gather_patch(const Shape<A>& s, const Place<A>& p, const A* weights, const A* rows,
                                 const FeatureRows& f, A* sum) {
  constexpr i64 L = kLanes<A>;
  Vec<A> sums[count];
  for (int k = 0; k < count; ++k) sums[k] = load<A>(sum + k * L);
  for (i64 j = p.j0; j < p.j1; ++j) {
    const A* row = rows + (p.y + j) * f.row_stride + p.x * f.pixel_stride;
    for (i64 i = p.i0; i < p.i1; ++i) {
      const A weight = weights[j * s.stride + i];
      for (int k = 0; k < count; ++k) sums[k] += weight * load<A>(row + i * f.pixel_stride + k * L);
    }
  }
  for (int k = 0; k < count; ++k) store<A>(sum + k * L, sums[k]);
}

template <class T>
void on_demand_backward_typed(const OnDemandBackward& a, i64 begin, i64 end) {
  using A = typename Accumulate<T>::type;
  constexpr i64 L = kLanes<A>;
  const LookupWindow& w = a.window;
  const Shape<A> shape(w.radius);
  const WindowMemory<A> m(shape, w.levels);
  const i64 C = a.features1.size[1];
  const Array& target = a.grad_features1;
  FeatureRun<A> features(C, C);
  WindowGradients<A> grads(w.levels * shape.window);
  Scratch sums(target.data ? (kRunPixels + 1) * features.stride * i64(sizeof(A)) : 0);
  A* undefined = target.data ? sums.as<A>() + kRunPixels * features.stride : nullptr;
  i64 undefined_in = -1;  // image
  for (i64 item = begin; item < end; ++item) {
    const Run<A> run(w, item);
    grads.template stage<T>(a.grad, run, 0);
    if (a.grad_coords) features.template stage<T>(a.features1, run, 0);
    if (target.data && undefined_in != run.b) {
      undefined_in = run.b;
      undefined_features(a.features2, w.levels, run.b, features.stride, undefined);
    }
    for (i64 pixel = 0; pixel < run.pixels; ++pixel) {
      A total[2] = {};
      A* sum = target.data ? sums.as<A>() + pixel * features.stride : nullptr;
      if (sum) std::memcpy(sum, undefined, features.stride * sizeof(A));
      for (int level = 0; level < w.levels; ++level) {
        const FeatureRows& f = a.features2[level];
        const Place<A> p = run.place(pixel, level, shape, f.height, f.width);
        if (p.empty()) continue;
        if (a.grad_coords) correlate(shape, p, features.at(pixel), f, run.b, features.stride, m.patch);
        A position[2] = {};
        blend_backward(shape, p, grads.at(pixel) + level * shape.window, a.grad_coords ? m.patch : nullptr,
                       m.turned, sum ? m.grad_patch : nullptr, position);
        const A scale = A(1) / A(i64(1) << level);
        total[0] += scale * position[0];
        total[1] += scale * position[1];
        if (!sum) continue;
        const A* rows = static_cast<const A*>(f.data) + run.b * f.batch_stride;
        i64 c = 0;
        for (; c + 8 * L <= features.stride; c += 8 * L) gather_patch<A, 8>(shape, p, m.grad_patch, rows + c, f, sum + c);
        for (; c < features.stride; c += L) gather_patch<A, 1>(shape, p, m.grad_patch, rows + c, f, sum + c);
      }
      if (sum)
        for (i64 c = 0; c < features.stride; c += L) store<A>(sum + c, load<A>(sum + c) * features.scale);
      if (a.grad_coords) write_position(w, run, pixel, total, a.grad_coords);
    }
    if (target.data) {
      T* to = static_cast<T*>(target.data) + run.b * target.stride[0] + run.y * target.stride[2] +
              run.x0 * target.stride[3];
      unstage_row<A, T>(sums.as<A>(), features.stride, C, run.pixels, to, target.stride[1], target.stride[3]);
    }
  }
}

void on_demand_backward(const OnDemandBackward& a, i64 begin, i64 end) {
  with_dtype(a.features1.dtype, [&](auto t) { on_demand_backward_typed<decltype(t)>(a, begin, end); });
}

// Gradient of the second features: an item is a channel block of one level of one image, summed over
// all pixels in their order, so that no two items share a number.

i64 scatter_blocks(const OnDemandBackward& a) {
  return (a.features1.size[1] + kGradientBlock - 1) / kGradientBlock;
}

i64 scatter_items(const OnDemandBackward& a) { return a.window.batch * a.window.levels * scatter_blocks(a); }

// rows of the patch's pixels += weighted `vector`, of `count` vectors of channels.
template <class A, int count>
GI_HOST_DEVICE void scatter_patch(const Shape<A>& s, const Place<A>& p, const A* weights, const A* vector,
                                  const Block<A>& rows) {
  constexpr i64 L = kLanes<A>;
  Vec<A> v[count];
  for (int k = 0; k < count; ++k) v[k] = load<A>(vector + k * L);
  for (i64 j = p.j0; j < p.j1; ++j)
    for (i64 i = p.i0; i < p.i1; ++i) {
      A* row = rows.at(p.y + j, p.x + i);
      const A weight = weights[j * s.stride + i];
      for (int k = 0; k < count; ++k) store<A>(row + k * L, load<A>(row + k * L) + weight * v[k]);
    }
}

template <class T>
void scatter_typed(const OnDemandBackward& a, i64 begin, i64 end) {
  using A = typename Accumulate<T>::type;
  constexpr i64 L = kLanes<A>;
  const LookupWindow& w = a.window;
  const Shape<A> shape(w.radius);
  const WindowMemory<A> m(shape, w.levels);
  const i64 C = a.features1.size[1], blocks = scatter_blocks(a), image_runs = runs(w) / w.batch;
  WindowGradients<A> grads(shape.window);
  Scratch slab;
  for (i64 item = begin; item < end; ++item) {
    const i64 block = item % blocks, level = item / blocks % w.levels, b = item / blocks / w.levels;
    const i64 c0 = block * kGradientBlock, channels = minimum(kGradientBlock, C - c0);
    const Array& target = a.grad_features2[level];
    const i64 H = target.size[2], W = target.size[3];
    if (H * W == 0) continue;
    FeatureRun<A> features(channels, C);
    slab.reserve(H * W * features.stride * i64(sizeof(A)));
    GradientBlock<A, T> sum;
    sum.start(plane_of<T>(target, b, c0), channels, H, W, slab.as<A>());
    alignas(64) A undefined[kGradientBlock] = {};
    for (i64 r = 0; r < image_runs; ++r) {
      const Run<A> run(w, b * image_runs + r);
      grads.template stage<T>(a.grad, run, level * shape.window);
      features.template stage<T>(a.features1, run, c0);
      for (i64 pixel = 0; pixel < run.pixels; ++pixel) {
        add_undefined(features.at(pixel), features.stride, undefined);
        const Place<A> p = run.place(pixel, int(level), shape, H, W);
        if (p.empty()) continue;
        blend_backward<A>(shape, p, grads.at(pixel), nullptr, m.turned, m.grad_patch, nullptr);
        i64 c = 0;
        const auto rows = [&] { return Block<A>{sum.block.data + c, sum.block.sy, sum.block.sx}; };
        for (; c + 4 * L <= features.stride; c += 4 * L)
          scatter_patch<A, 4>(shape, p, m.grad_patch, features.at(pixel) + c, rows());
        for (; c < features.stride; c += L)
          scatter_patch<A, 1>(shape, p, m.grad_patch, features.at(pixel) + c, rows());
      }
    }
    bool found = false;
    for (const A v : undefined) found |= v != v;
    if (found)
      for (i64 y = 0; y < H; ++y)
        for (i64 x = 0; x < W; ++x)
          for (i64 c = 0; c < features.stride; ++c) sum.block.at(y, x)[c] += undefined[c];
    sum.finish();
  }
}

void scatter(const OnDemandBackward& a, i64 begin, i64 end) {
  with_dtype(a.features1.dtype, [&](auto t) { scatter_typed<decltype(t)>(a, begin, end); });
}

extern const CorrelationLookupKernels correlation_lookup_kernels;
const CorrelationLookupKernels correlation_lookup_kernels = {
    runs,      forward,            backward,      usable_rows, padded_channels, stage,
    on_demand, on_demand_backward, scatter_items, scatter};

GI_END_VARIANT
