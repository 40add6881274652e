#include "complete_flow/cuda.h"

GI_BEGIN_VARIANT

namespace {

// Whether (y, x) is on the rim: above one half, with a neighbour of the 3x3 cross at or below it, and
// not on the frame's edge.
template <class T> struct Rim {
  Map<const T> mask;
  i64 height, width;

  GI_HOST_DEVICE bool at(i64 b, i64 y, i64 x) const {
    if (y < 1 || y >= height - 1 || x < 1 || x >= width - 1) return false;
    const T* m = mask.at(b, y, x);
    return to_accumulate(*m) > 0.5f && (outside(m - mask.sy) || outside(m + mask.sy) || outside(m - mask.sx) ||
                                        outside(m + mask.sx));
  }

 private:
  // A NaN counts as neither inside nor outside.
  static GI_HOST_DEVICE bool outside(const T* m) { return to_accumulate(*m) <= 0.5f; }
};

// Rim pixels of a row.
template <class T> struct CountRim {
  static constexpr const char* kName = "complete_flow_count";
  Rim<T> rim;
  i64* count;  // [B,H]

  GI_HOST_DEVICE void operator()(i64 b, i64 y, const Team& team) const {
    i64 sum[1] = {0};
    for (i64 x = team.lane; x < rim.width; x += team.lanes) sum[0] += rim.at(b, y, x);
    team.sum(sum);
    if (team.leader()) count[b * rim.height + y] = sum[0];
  }
};

// Rim pixels in the rows above a row.
struct CountAbove {
  static constexpr const char* kName = "complete_flow_above";
  const i64* count;  // [B,H]
  i64* above;        // [B,H]
  i64 height;

  GI_HOST_DEVICE void operator()(i64 b, i64 y, const Team& team) const {
    i64 sum[1] = {0};
    for (i64 row = team.lane; row < y; row += team.lanes) sum[0] += count[b * height + row];
    team.sum(sum);
    if (team.leader()) above[b * height + y] = sum[0];
  }
};

template <class T> struct DrawPoints {
  static constexpr const char* kName = "complete_flow_draw";
  using A = typename Accumulate<T>::type;
  Rim<T> rim;
  Map<const T> flow;
  const i64 *count, *above;
  A* points;  // [B,20,4]

  GI_HOST_DEVICE void operator()(i64 b, i64 i, const Team& team) const {
    const i64* above_row = above + b * rim.height;
    const i64 total = above_row[rim.height - 1] + count[b * rim.height + rim.height - 1];
    if (total == 0) {
      if (team.leader()) put(b, i, 0, 0);
      return;
    }
    DefaultRng1 rng;
    i64 wanted = 0;
    for (i64 draw = 0; draw <= i; ++draw) wanted = rng.below(uint32_t(total));
    i64 y = 0;  // the last row that has at most `wanted` above it
    for (i64 low = 0, high = rim.height - 1; low <= high;) {
      const i64 middle = (low + high) / 2;
      if (above_row[middle] <= wanted) y = middle, low = middle + 1;
      else high = middle - 1;
    }
    wanted -= above_row[y];
    // Each lane looks at a stretch of the row.
    const i64 stretch = (rim.width + team.lanes - 1) / team.lanes;
    const i64 x0 = team.lane * stretch, x1 = minimum(rim.width, x0 + stretch);
    i64 own = 0;
    for (i64 x = x0; x < x1; ++x) own += rim.at(b, y, x);
    wanted -= team.before(own);
    if (wanted < 0 || wanted >= own) return;
    for (i64 x = x0;; ++x)
      if (rim.at(b, y, x) && wanted-- == 0) return put(b, i, y, x);
  }

 private:
  GI_HOST_DEVICE void put(i64 b, i64 i, i64 y, i64 x) const {
    const T* f = flow.at(b, y, x);
    A* point = points + (b * kPoints + i) * 4;
    point[0] = A(y);
    point[1] = A(x);
    point[2] = to_accumulate(f[0]);
    point[3] = to_accumulate(f[flow.sc]);
  }
};

template <class T> struct Fill {
  static constexpr const char* kName = "complete_flow_fill";
  using A = typename Accumulate<T>::type;
  Map<const T> flow, mask;
  Map<T> output;
  const A* points;
  i64 width;

  GI_HOST_DEVICE void operator()(i64 b, i64 pixel, const Team&) const {
    i64 y, x;
    split(pixel, width, y, x);
    const A m = to_accumulate(*mask.at(b, y, x));
    const T* f = flow.at(b, y, x);
    T* out = output.at(b, y, x);
    if (m == 0) {
      out[0] = f[0];
      out[output.sc] = f[flow.sc];
      return;
    }
    const A* point = points + b * kPoints * 4;
    A total = 0, sum[2] = {0, 0};
    for (int i = 0; i < kPoints; ++i, point += 4) {
      const A dy = A(y) - point[0], dx = A(x) - point[1], squared = dy * dy + dx * dx;
      const A w = squared > 0 ? 1 / (squared * squared * squared) : A(1e10);
      total += w;
      sum[0] += w * point[2];
      sum[1] += w * point[3];
    }
    GI_UNROLL
    for (int c = 0; c < 2; ++c) {
      const A filled = sum[c] / total;
      out[c * output.sc] = Rounded<T>::from(m == 1 ? filled : (1 - m) * to_accumulate(f[c * flow.sc]) + m * filled);
    }
  }
};

template <class T> void forward(const CompleteFlow& a, i64* rows, Stream stream) {
  using A = typename Accumulate<T>::type;
  const i64 B = a.flow.size[0], H = a.flow.size[2], W = a.flow.size[3];
  const Rim<T> rim{Map<const T>(a.mask), H, W};
  const Map<const T> flow(a.flow);
  i64 *count = rows, *above = rows + B * H;
  A* points = static_cast<A*>(a.points);
  launch_teams(CountRim<T>{rim, count}, B, H, kWarp, stream);
  launch_teams(CountAbove{count, above, H}, B, H, kWarp, stream);
  launch_teams(DrawPoints<T>{rim, flow, count, above, points}, B, kPoints, kWarp, stream);
  launch_items(Fill<T>{flow, Map<const T>(a.mask), Map<T>(a.output), points, W}, B, H * W, stream);
}

}  // namespace

GI_END_VARIANT

namespace gi {

void complete_flow_forward(const CompleteFlow& a, i64* rows, Stream stream) {
  GI_VARIANT::with_dtype(a.flow.dtype, [&](auto t) { GI_VARIANT::forward<decltype(t)>(a, rows, stream); });
}

}  // namespace gi
