#include "correlation_lookup/cuda.h"

#include "common/contributors.h"
#include "correlation_lookup/place.h"

GI_BEGIN_VARIANT

namespace {

// Sizes of a lookup, and where its windows lie.
template <class A> struct Lookup {
  const A* coords;  // [B,2,H1,W1]
  i64 batch, height, width, radius, side, n;
  int levels;

  explicit Lookup(const LookupWindow& w)
      : coords(static_cast<const A*>(w.coords)), batch(w.batch), height(w.height), width(w.width), radius(w.radius),
        side(2 * w.radius + 1), n(2 * w.radius + 2), levels(w.levels) {}

  GI_HOST_DEVICE i64 pixels() const { return height * width; }
  GI_HOST_DEVICE i64 window() const { return side * side; }
  GI_HOST_DEVICE i64 channels() const { return levels * window(); }
  GI_HOST_DEVICE Place<A> place(i64 b, i64 pixel, int level, i64 level_height, i64 level_width) const {
    const A* at = coords + b * 2 * pixels() + pixel;
    return place_in_level<A>(at[0], at[pixels()], level, radius, level_height, level_width);
  }
  // Patch of a pixel in memory [levels,B,H1*W1,n,n].
  GI_HOST_DEVICE i64 patch(i64 b, i64 pixel, int level) const {
    return ((level * batch + b) * pixels() + pixel) * n * n;
  }
};

struct LevelSize {
  i64 height, width;
};

// Patches of stored volumes: read where they are.
template <class T> struct Volumes {
  using A = typename Accumulate<T>::type;
  Map<const T> volume[kMostLevels];  // [B,H1*W1,H,W]: "channels" are the pixels of the first map
  LevelSize size[kMostLevels];

  Volumes(const Array* arrays, int levels) {
    for (int l = 0; l < levels; ++l) {
      volume[l] = Map<const T>(arrays[l]);
      size[l] = {arrays[l].size[2], arrays[l].size[3]};
    }
  }
  GI_HOST_DEVICE A at(const Lookup<A>&, const Place<A>& p, i64 b, i64 pixel, int level, i64 j, i64 i) const {
    if (j < p.j0 || j >= p.j1 || i < p.i0 || i >= p.i1) return 0;
    const auto& v = volume[level];
    return to_accumulate(v.at(b, p.y + j, p.x + i)[pixel * v.sc]);
  }
};

// Patches that PatchDots has computed.
template <class A> struct Patches {
  const A* data;
  LevelSize size[kMostLevels];

  GI_HOST_DEVICE A at(const Lookup<A>& lookup, const Place<A>&, i64 b, i64 pixel, int level, i64 j, i64 i) const {
    return data[lookup.patch(b, pixel, level) + j * lookup.n + i];
  }
};

// ---- windows ----

// Windows <- patches; the lanes of a pixel share the samples of one level.
template <class T, class Source> struct Windows {
  static constexpr const char* kName = "correlation_lookup";
  using A = typename Accumulate<T>::type;
  Lookup<A> lookup;
  Source source;
  T* output;  // [B,H1,W1,channels]

  GI_HOST_DEVICE void operator()(i64 outer, i64 pixel, const Team& team) const {
    i64 level_, b;
    split(outer, lookup.batch, level_, b);
    const int level = int(level_);
    const Place<A> p = lookup.place(b, pixel, level, source.size[level].height, source.size[level].width);
    T* out = output + (b * lookup.pixels() + pixel) * lookup.channels() + level * lookup.window();
    const bool empty = p.empty();
    for (i64 s = team.lane; s < lookup.window(); s += team.lanes) {
      i64 i, j;
      split(s, lookup.side, i, j);
      A value = 0;
      if (!empty) {
        const auto at = [&](i64 dj, i64 di) { return source.at(lookup, p, b, pixel, level, j + dj, i + di); };
        const A above = (1 - p.fx) * at(0, 0) + p.fx * at(0, 1), below = (1 - p.fx) * at(1, 0) + p.fx * at(1, 1);
        value = (1 - p.fy) * above + p.fy * below;
      }
      out[s] = Rounded<T>::from(value);
    }
  }
};

// Gradient of the positions.
template <class T, class Source> struct PositionGradient {
  static constexpr const char* kName = "correlation_lookup_backward_coords";
  using A = typename Accumulate<T>::type;
  Lookup<A> lookup;
  Source source;
  Map<const T> grad;
  A* grad_coords;  // [B,2,H1,W1]

  GI_HOST_DEVICE void operator()(i64 b, i64 pixel, const Team& team) const {
    i64 y, x;
    split(pixel, lookup.width, y, x);
    A sum[2] = {};
    for (int level = 0; level < lookup.levels; ++level) {
      const Place<A> p = lookup.place(b, pixel, level, source.size[level].height, source.size[level].width);
      if (p.empty()) continue;
      const T* window = grad.at(b, y, x) + level * lookup.window() * grad.sc;
      const A scale = A(1) / A(i64(1) << level);
      for (i64 s = team.lane; s < lookup.window(); s += team.lanes) {
        i64 i, j;
        split(s, lookup.side, i, j);
        const auto at = [&](i64 dj, i64 di) { return source.at(lookup, p, b, pixel, level, j + dj, i + di); };
        const A g = to_accumulate(window[s * grad.sc]), a0 = at(0, 0), a1 = at(0, 1), b0 = at(1, 0), b1 = at(1, 1);
        sum[0] += scale * (g * ((1 - p.fy) * (a1 - a0) + p.fy * (b1 - b0)));
        sum[1] += scale * (g * ((1 - p.fx) * (b0 - a0) + p.fx * (b1 - a1)));
      }
    }
    team.sum(sum);
    if (!team.leader()) return;
    A* out = grad_coords + b * 2 * lookup.pixels() + pixel;
    out[0] = sum[0];
    out[lookup.pixels()] = sum[1];
  }
};

// Gradient of patch pixel (j, i): of the up to four samples that it is blended into. `window` is the
// gradient of the window's first sample.
template <class A, class T>
GI_HOST_DEVICE A patch_gradient(const Lookup<A>& lookup, const Place<A>& p, const T* window, i64 step, i64 j, i64 i) {
  const auto at = [&](i64 row, i64 column) {
    const bool inside = row >= 0 && row < lookup.side && column >= 0 && column < lookup.side;
    return inside ? A(to_accumulate(window[(column * lookup.side + row) * step])) : A(0);
  };
  const A here = (1 - p.fx) * at(j, i) + p.fx * at(j, i - 1);
  const A above = (1 - p.fx) * at(j - 1, i) + p.fx * at(j - 1, i - 1);
  return (1 - p.fy) * here + p.fy * above;
}

// Gradient of one level's volumes, written once, zeros included; V neighbouring numbers at a time.
template <class T, int V> struct VolumeGradient {
  static constexpr const char* kName = "correlation_lookup_backward_volume";
  using A = typename Accumulate<T>::type;
  Lookup<A> lookup;
  Map<const T> grad;
  T* grad_volume;  // [B,H1*W1,H,W]
  LevelSize size;
  int level;

  GI_HOST_DEVICE void operator()(i64 b, i64 item, const Team&) const {
    const i64 count = size.height * size.width;
    i64 pixel, vector, y, x, py, px;
    split(item, count / V, pixel, vector);
    split(vector * V, size.width, y, x);
    split(pixel, lookup.width, py, px);
    const Place<A> p = lookup.place(b, pixel, level, size.height, size.width);
    A value[V] = {};
    // The pack's rows are y to last.
    const i64 last = x + V <= size.width ? y : size.height;
    if (!p.empty() && last >= p.y && y < p.y + lookup.n) {
      const T* window = grad.at(b, py, px) + level * lookup.window() * grad.sc;
      GI_UNROLL
      for (int v = 0; v < V; ++v) {
        const i64 j = y - p.y, i = x - p.x;
        if (j >= 0 && j < lookup.n && i >= 0 && i < lookup.n)
          value[v] = patch_gradient(lookup, p, window, grad.sc, j, i);
        if (++x == size.width) x = 0, ++y;
      }
    }
    write(grad_volume + (b * lookup.pixels() + pixel) * count + vector * V, value);
  }
};

// ---- lookup on demand ----

// Patch pixels whose products with a feature vector are summed at the same time, and the threads that
// share the channels of one.
constexpr int kDots = 5;
constexpr int kDotLanes = 8;

template <class T> struct Features {
  Map<const T> level[kMostLevels];
  LevelSize size[kMostLevels];

  Features(const Array* arrays, int levels) {
    for (int l = 0; l < levels; ++l) {
      level[l] = Map<const T>(arrays[l]);
      size[l] = {arrays[l].size[2], arrays[l].size[3]};
    }
  }
};

template <class A> A feature_scale(i64 channels) { return A(1 / __builtin_sqrt(double(channels))); }

// An item is one row of the patch of one pixel. Patches that are empty are not written.
template <class T, int V> struct PatchDots {
  static constexpr const char* kName = "correlation_lookup_patches";
  using A = typename Accumulate<T>::type;
  Lookup<A> lookup;
  Map<const T> features1;
  Features<T> features2;
  A* patches;
  i64 channels;
  A scale;

  GI_HOST_DEVICE void operator()(i64 outer, i64 item, const Team& team) const {
    i64 level_, b, pixel, j, y, x;
    split(outer, lookup.batch, level_, b);
    split(item, lookup.n, pixel, j);
    split(pixel, lookup.width, y, x);
    const int level = int(level_);
    const Place<A> p = lookup.place(b, pixel, level, features2.size[level].height, features2.size[level].width);
    if (p.empty()) return;
    const Map<const T>& map = features2.level[level];
    const T* vector = features1.at(b, y, x);
    A* patch = patches + lookup.patch(b, pixel, level) + j * lookup.n;
    const bool row = j >= p.j0 && j < p.j1;
    for (i64 first = 0; first < lookup.n; first += kDots) {
      A sum[kDots] = {};
      if (row)
        for (i64 c = team.lane * V; c < channels; c += i64(team.lanes) * V) {
          Pack<T, V> other[kDots];
          GI_UNROLL
          for (int d = 0; d < kDots; ++d)
            other[d] = read_if<T, V>(first + d >= p.i0 && first + d < p.i1,
                                     map.at(b, p.y + j, p.x + first + d) + map.template channel<V>(c));
          A own[V];
          widen(read<T, V>(vector + features1.template channel<V>(c)), own);
          GI_UNROLL
          for (int d = 0; d < kDots; ++d) sum[d] += dot(own, other[d]);
        }
      team.sum(sum);
      if (!team.leader()) continue;
      GI_UNROLL
      for (int d = 0; d < kDots; ++d) {
        const bool inside = row && first + d >= p.i0 && first + d < p.i1;  // else not even a NaN
        if (first + d < lookup.n) patch[first + d] = inside ? sum[d] * scale : A(0);
      }
    }
  }
};

template <class T> struct PatchGradients {
  static constexpr const char* kName = "correlation_lookup_backward_patches";
  using A = typename Accumulate<T>::type;
  Lookup<A> lookup;
  Map<const T> grad;
  LevelSize size[kMostLevels];
  A* grad_patches;

  GI_HOST_DEVICE void operator()(i64 outer, i64 item, const Team&) const {
    i64 level_, b, pixel, at, j, i, y, x;
    split(outer, lookup.batch, level_, b);
    split(item, lookup.n * lookup.n, pixel, at);
    split(at, lookup.n, j, i);
    split(pixel, lookup.width, y, x);
    const int level = int(level_);
    const Place<A> p = lookup.place(b, pixel, level, size[level].height, size[level].width);
    if (p.empty()) return;
    const T* window = grad.at(b, y, x) + level * lookup.window() * grad.sc;
    grad_patches[lookup.patch(b, pixel, level) + at] = patch_gradient(lookup, p, window, grad.sc, j, i);
  }
};

template <class T, int V> struct FirstGradient {
  static constexpr const char* kName = "correlation_lookup_backward_features1";
  using A = typename Accumulate<T>::type;
  Lookup<A> lookup;
  Features<T> features2;
  const A *grad_patches, *undefined;
  Map<T> grad_features1;
  i64 channels;
  A scale;

  GI_HOST_DEVICE void operator()(i64 b, i64 pixel, const Team& team) const {
    i64 y, x;
    split(pixel, lookup.width, y, x);
    for (i64 c = team.lane * V; c < channels; c += i64(team.lanes) * V) {
      A sum[V];
      GI_UNROLL
      for (int v = 0; v < V; ++v) sum[v] = undefined[b * channels + c + v];
      for (int level = 0; level < lookup.levels; ++level) {
        const Map<const T>& map = features2.level[level];
        const Place<A> p = lookup.place(b, pixel, level, features2.size[level].height, features2.size[level].width);
        const A* patch = grad_patches + lookup.patch(b, pixel, level);
        for (i64 j = p.j0; j < p.j1; ++j)
          for (i64 i = p.i0; i < p.i1; ++i)
            add(sum, patch[j * lookup.n + i], read<T, V>(map.at(b, p.y + j, p.x + i) + map.template channel<V>(c)));
      }
      GI_UNROLL
      for (int v = 0; v < V; ++v) sum[v] *= scale;
      write(grad_features1.at(b, y, x) + grad_features1.template channel<V>(c), sum);
    }
  }
};

// For each place of a patch's corner in one level the list of the pixels whose patch lies there: the
// scatter into the second features as a gather, as in common/contributors.h.
struct PatchMember {
  i64 next;
};

struct PatchLists {
  i64* first;  // [B,H+n-1,W+n-1]: corners from -(n-1) on
  PatchMember* members;  // [B,H1*W1]
  i64 rows, columns;

  GI_HOST_DEVICE i64 cells() const { return rows * columns; }
};

struct EmptyPatchLists {
  static constexpr const char* kName = "correlation_lookup_empty_lists";
  PatchLists lists;

  GI_HOST_DEVICE void operator()(i64 b, i64 cell, const Team&) const { lists.first[b * lists.cells() + cell] = kEnd; }
};

template <class A> struct EnterPatches {
  static constexpr const char* kName = "correlation_lookup_enter_patches";
  PatchLists lists;
  Lookup<A> lookup;
  LevelSize size;
  int level;

  GI_HOST_DEVICE void operator()(i64 b, i64 pixel, const Team&) const {
    const Place<A> p = lookup.place(b, pixel, level, size.height, size.width);
    if (p.empty()) return;
    i64* cell = lists.first + b * lists.cells() + (p.y + lookup.n - 1) * lists.columns + p.x + lookup.n - 1;
    const i64 next = exchange(cell, pixel);
    lists.members[b * lookup.pixels() + pixel] = {next};
  }
};

struct OrderPatchLists {
  static constexpr const char* kName = "correlation_lookup_order_lists";
  PatchLists lists;
  i64 pixels;

  GI_HOST_DEVICE void operator()(i64 b, i64 cell, const Team&) const {
    order_list(lists.first[b * lists.cells() + cell], lists.members + b * pixels);
  }
};

template <class T, int V> struct SecondGradient {
  static constexpr const char* kName = "correlation_lookup_backward_features2";
  using A = typename Accumulate<T>::type;
  Lookup<A> lookup;
  PatchLists lists;
  Map<const T> features1;
  const A *grad_patches, *undefined;
  Map<T> grad_features2;  // of the level
  i64 channels, width;    // of the level
  A scale;
  int level;

  GI_HOST_DEVICE void operator()(i64 b, i64 target, const Team& team) const {
    i64 y, x;
    split(target, width, y, x);
    const i64* first = lists.first + b * lists.cells();
    const PatchMember* member = lists.members + b * lookup.pixels();
    for (i64 c = team.lane * V; c < channels; c += i64(team.lanes) * V) {
      A sum[V];
      GI_UNROLL
      for (int v = 0; v < V; ++v) sum[v] = undefined[b * channels + c + v];
      GI_NO_UNROLL
      for (i64 j = 0; j < lookup.n; ++j)
        GI_NO_UNROLL
        for (i64 i = 0; i < lookup.n; ++i)
          for (i64 p = first[(y - j + lookup.n - 1) * lists.columns + x - i + lookup.n - 1]; p != kEnd;
               p = member[p].next)
            add(sum, grad_patches[lookup.patch(b, p, level) + j * lookup.n + i],
                read<T, V>(features1.at(b, 0, p) + features1.template channel<V>(c)));  // rows without gaps are one row
      GI_UNROLL
      for (int v = 0; v < V; ++v) sum[v] *= scale;
      write(grad_features2.at(b, y, x) + grad_features2.template channel<V>(c), sum);
    }
  }
};

// ---- launches ----

template <class T> void forward(const LookupForward& a, Stream stream) {
  using A = typename Accumulate<T>::type;
  const Lookup<A> lookup(a.window);
  const Windows<T, Volumes<T>> body{lookup, Volumes<T>(a.volumes, lookup.levels), static_cast<T*>(a.output)};
  launch_teams(body, lookup.batch * lookup.levels, lookup.pixels(), kWarp, stream);
}

template <class T> void backward(const LookupBackward& a, Stream stream) {
  using A = typename Accumulate<T>::type;
  const Lookup<A> lookup(a.window);
  const Map<const T> grad(a.grad);
  if (a.grad_volumes)
    for (int level = 0; level < lookup.levels; ++level) {
      const LevelSize size{a.volumes[level].size[2], a.volumes[level].size[3]};
      with_width<T>(size.height * size.width % kPack<T> == 0, [&](auto width) {
        constexpr int V = decltype(width)::value;
        const VolumeGradient<T, V> body{lookup, grad, static_cast<T*>(a.grad_volumes[level]), size, level};
        launch_items(body, lookup.batch, lookup.pixels() * (size.height * size.width / V), stream);
      });
    }
  if (!a.grad_coords) return;
  const PositionGradient<T, Volumes<T>> body{lookup, Volumes<T>(a.volumes, lookup.levels), grad,
                                             static_cast<A*>(a.grad_coords)};
  launch_teams(body, lookup.batch, lookup.pixels(), kWarp, stream);
}

template <class T> bool packs(const DeviceOnDemand& a) {
  bool all = packed<T>(a.features1, 4, 1);
  for (int level = 0; level < a.window.levels; ++level) all = all && packed<T>(a.features2[level], 4, 1);
  return all;
}

template <class T> using AccumulateOf = typename Accumulate<T>::type;

template <class T> Patches<AccumulateOf<T>> patches_of(const DeviceOnDemand& a, const void* memory) {
  Patches<AccumulateOf<T>> patches = {static_cast<const AccumulateOf<T>*>(memory), {}};
  for (int level = 0; level < a.window.levels; ++level)
    patches.size[level] = {a.features2[level].size[2], a.features2[level].size[3]};
  return patches;
}

template <class T> void compute_patches(const DeviceOnDemand& a, void* memory, Stream stream) {
  using A = typename Accumulate<T>::type;
  const Lookup<A> lookup(a.window);
  with_width<T>(packs<T>(a), [&](auto width) {
    constexpr int V = decltype(width)::value;
    const i64 C = a.features1.size[1];
    const PatchDots<T, V> body{lookup, Map<const T>(a.features1), Features<T>(a.features2, lookup.levels),
                               static_cast<A*>(memory), C, feature_scale<A>(C)};
    const int lanes = int(minimum<i64>(kDotLanes, lanes_for((C + V - 1) / V)));
    launch_teams(body, lookup.batch * lookup.levels, lookup.pixels() * lookup.n, lanes, stream);
  });
}

template <class T> void on_demand(const DeviceOnDemand& a, void* output, void* memory, Stream stream) {
  using A = typename Accumulate<T>::type;
  const Lookup<A> lookup(a.window);
  compute_patches<T>(a, memory, stream);
  const Windows<T, Patches<A>> body{lookup, patches_of<T>(a, memory), static_cast<T*>(output)};
  launch_teams(body, lookup.batch * lookup.levels, lookup.pixels(), kWarp, stream);
}

template <class T> void second_gradient(const DeviceOnDemandBackward& a, int level, Stream stream) {
  using A = typename Accumulate<T>::type;
  const Lookup<A> lookup(a.forward.window);
  const Array& target = a.grad_features2[level];
  const i64 C = target.size[1], H = target.size[2], W = target.size[3];
  auto* members = static_cast<PatchMember*>(a.lists);
  const PatchLists lists{reinterpret_cast<i64*>(members + lookup.batch * lookup.pixels()), members,
                         H + lookup.n - 1, W + lookup.n - 1};
  launch_items(EmptyPatchLists{lists}, lookup.batch, lists.cells(), stream);
  launch_items(EnterPatches<A>{lists, lookup, {H, W}, level}, lookup.batch, lookup.pixels(), stream);
  launch_items(OrderPatchLists{lists, lookup.pixels()}, lookup.batch, lists.cells(), stream);
  with_width<T>(packed<T>(a.forward.features1, 4, 1) && packed<T>(target, 4, 1), [&](auto width) {
    constexpr int V = decltype(width)::value;
    const SecondGradient<T, V> body{lookup,
                                    lists,
                                    Map<const T>(a.forward.features1),
                                    static_cast<const A*>(a.grad_patches),
                                    static_cast<const A*>(a.undefined2),
                                    Map<T>(target),
                                    C,
                                    W,
                                    feature_scale<A>(C),
                                    level};
    launch_teams(body, lookup.batch, H * W, lanes_for((C + V - 1) / V), stream);
  });
}

template <class T> void on_demand_backward(const DeviceOnDemandBackward& a, Stream stream) {
  using A = typename Accumulate<T>::type;
  const DeviceOnDemand& f = a.forward;
  const Lookup<A> lookup(f.window);
  const Map<const T> grad(a.grad);
  if (a.grad_coords) {
    compute_patches<T>(f, a.patches, stream);
    const PositionGradient<T, Patches<A>> body{lookup, patches_of<T>(f, a.patches), grad,
                                               static_cast<A*>(a.grad_coords)};
    launch_teams(body, lookup.batch, lookup.pixels(), kWarp, stream);
  }
  if (!a.grad_patches) return;
  PatchGradients<T> gradients{lookup, grad, {}, static_cast<A*>(a.grad_patches)};
  for (int level = 0; level < lookup.levels; ++level)
    gradients.size[level] = {f.features2[level].size[2], f.features2[level].size[3]};
  launch_items(gradients, lookup.batch * lookup.levels, lookup.pixels() * lookup.n * lookup.n, stream);
  if (a.grad_features1.data)
    with_width<T>(packs<T>(f) && packed<T>(a.grad_features1, 4, 1), [&](auto width) {
      constexpr int V = decltype(width)::value;
      const i64 C = f.features1.size[1];
      const FirstGradient<T, V> body{lookup,
                                     Features<T>(f.features2, lookup.levels),
                                     static_cast<const A*>(a.grad_patches),
                                     static_cast<const A*>(a.undefined1),
                                     Map<T>(a.grad_features1),
                                     C,
                                     feature_scale<A>(C)};
      launch_teams(body, lookup.batch, lookup.pixels(), lanes_for((C + V - 1) / V), stream);
    });
  if (a.grad_features2)
    for (int level = 0; level < lookup.levels; ++level) second_gradient<T>(a, level, stream);
}

}  // namespace

GI_END_VARIANT

namespace gi {

void correlation_lookup_forward(const LookupForward& a, Stream stream) {
  GI_VARIANT::with_dtype(a.volumes[0].dtype, [&](auto t) { GI_VARIANT::forward<decltype(t)>(a, stream); });
}

void correlation_lookup_backward(const LookupBackward& a, Stream stream) {
  GI_VARIANT::with_dtype(a.volumes[0].dtype, [&](auto t) { GI_VARIANT::backward<decltype(t)>(a, stream); });
}

i64 correlation_patch_numbers(const LookupWindow& w) {
  const i64 n = 2 * w.radius + 2;
  return w.levels * w.batch * w.height * w.width * n * n;
}

void correlation_on_demand_forward(const DeviceOnDemand& a, void* output, void* patches, Stream stream) {
  GI_VARIANT::with_dtype(a.features1.dtype,
                         [&](auto t) { GI_VARIANT::on_demand<decltype(t)>(a, output, patches, stream); });
}

i64 correlation_list_bytes(const DeviceOnDemand& a) {
  i64 cells = 0;
  const i64 edge = 2 * a.window.radius + 1;
  for (int level = 0; level < a.window.levels; ++level) {
    const i64 here = (a.features2[level].size[2] + edge) * (a.features2[level].size[3] + edge);
    cells = here > cells ? here : cells;
  }
  return a.window.batch * (a.window.height * a.window.width + cells) * i64(sizeof(i64));
}

void correlation_on_demand_backward(const DeviceOnDemandBackward& a, Stream stream) {
  GI_VARIANT::with_dtype(a.forward.features1.dtype,
                         [&](auto t) { GI_VARIANT::on_demand_backward<decltype(t)>(a, stream); });
}

}  // namespace gi
