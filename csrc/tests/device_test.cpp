// Unit test of what CUDA kernels are written with, their launches run as loops on the CPU.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <random>
#include <vector>

#include "common/contributors.h"

using namespace gi;
using namespace gi::portable;

static int failures = 0;

static void expect(bool ok, const char* what) {
  if (!ok) {
    std::printf("FAILED: %s\n", what);
    ++failures;
  }
}

static const Stream kNoStream{nullptr};

static void test_order() {
  std::mt19937 random(1);
  struct Member {
    i64 next;
  };
  for (int size = 0; size < 70; ++size) {
    std::vector<i64> order(size);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    std::vector<Member> members(2 * size + 1, Member{-7});
    i64 first = kEnd;
    for (const i64 i : order) {
      members[2 * i].next = first;
      first = 2 * i;
    }
    order_list(first, members.data());
    i64 count = 0, at = first;
    for (; at == 2 * count && count < size; ++count) at = members[at].next;
    expect(count == size && at == kEnd, "order of a list");
  }
}

// Every lane's sum, maximum and count of what came before.
struct Collective {
  static constexpr const char* kName = "collective";
  static constexpr int kSumBytes = 2 * sizeof(double);
  i64* results;  // [items]: how many lanes were right

  template <class AnyTeam> GI_HOST_DEVICE void operator()(i64 outer, i64 item, const AnyTeam& team) const {
    double v[2] = {double(team.lane + item), double(outer)};
    team.sum(v);
    const i64 lanes = team.lanes;
    bool right = v[0] == double(lanes * item + lanes * (lanes - 1) / 2) && v[1] == double(lanes * outer);
    if constexpr (std::is_same_v<AnyTeam, Team>) {
      right = right && team.largest(-team.lane) == 0 && team.largest(team.lane) == team.lanes - 1;
      right = right && team.before(team.lane + 1) == i64(team.lane) * (team.lane + 1) / 2;
    }
    double again[1] = {right ? 1. : 0.};
    team.sum(again);
    if (team.leader()) results[item] += again[0] == double(lanes);
  }
};

static void test_teams() {
  for (const int lanes : {1, 2, 4}) {
    std::vector<i64> results(5, 0);
    launch_teams(Collective{results.data()}, 3, 5, lanes, kNoStream);
    expect(results == std::vector<i64>(5, 3), "what lanes tell each other");
  }
  std::vector<i64> results(5, 0);
  launch_columns(Collective{results.data()}, 3, 5, kNoStream);
  expect(results == std::vector<i64>(5, 3), "what lanes of columns tell each other");
  launch_teams(Collective{nullptr}, 0, 5, 4, kNoStream);
  launch_columns(Collective{nullptr}, 3, 0, kNoStream);
  expect(lanes_for(0) == 1 && lanes_for(3) == 4 && lanes_for(1000) == kWarp, "number of lanes");
}

static void test_split() {
  for (const i64 size : {i64(1), i64(7), i64(1) << 33})
    for (const i64 index : {i64(0), i64(6), i64(1) << 34, (i64(1) << 40) + 5}) {
      i64 q, r;
      split(index, size, q, r);
      expect(q == index / size && r == index % size, "split");
    }
}

template <class T> static void test_packs() {
  using A = typename Accumulate<T>::type;
  constexpr int V = kPack<T>;
  static_assert(sizeof(Pack<T, V>) == 16);
  A numbers[V], back[V], sum[V] = {};
  for (int i = 0; i < V; ++i) numbers[i] = A(i) - 2;
  alignas(16) T memory[V];
  write(memory, numbers);
  widen(read<T, V>(memory), back);
  add(sum, A(3), read<T, V>(memory));
  bool same = true, tripled = true;
  for (int i = 0; i < V; ++i) {
    same = same && back[i] == numbers[i];
    tripled = tripled && sum[i] == 3 * numbers[i];
  }
  expect(same && tripled, "packs");
  expect(dot(numbers, read_if<T, V>(false, static_cast<const T*>(nullptr))) == 0, "nothing read");
  alignas(16) A wide[V];
  write_wide(wide, numbers);
  expect(std::equal(wide, wide + V, numbers), "wide packs");
  Array a;
  a.data = memory;
  a.size[0] = 1;
  a.size[1] = V;
  a.stride[0] = 3;  // of one item: means nothing
  a.stride[1] = 1;
  expect(packed<T>(a, 2, 1), "packed");
  a.size[0] = 2;
  expect(!packed<T>(a, 2, 1), "items between packs");
  a.stride[0] = V;
  a.data = reinterpret_cast<char*>(memory) + sizeof(T);
  expect(!packed<T>(a, 2, 1), "unaligned");
}

// <warp(x), g> = <x, gather(g)>, with many pixels on one cell and some outside.
static void test_lists() {
  constexpr int H = 6, W = 5, frames = 2;
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  std::vector<float> flow(frames * 2 * H * W), x(frames * H * W), g(x.size()), gathered(x.size(), NAN);
  for (float& v : flow) v = 2 * normal(random);
  for (int p = 0; p < H * W; ++p) flow[p] = 2.25f - float(p % W), flow[H * W + p] = 1.5f - float(p / W);
  flow[3] = NAN;
  for (float& v : x) v = normal(random);
  for (float& v : g) v = normal(random);
  const FlowField<float> field(flow.data(), H, W, H, W);
  std::vector<double> memory(contributor_bytes<float>(frames, H, W) / sizeof(double) + 2);
  const auto lists = lists_in<float>(memory.data(), frames, H, W);
  make_lists(lists, field, frames, kNoStream);
  for (int f = 0; f < frames; ++f) {
    double left = 0, right = 0;
    for (int y = 0; y < H; ++y)
      for (int x0 = 0; x0 < W; ++x0) {
        const auto t = field.frame(f).taps(y, x0);
        const float own = g[(f * H + y) * W + x0];
        for (int k = 0; k < 4; ++k)
          if (t.inside[k]) left += double(t.weight(k) * x[(f * H + t.y(k)) * W + t.x(k)] * own);
        float sum = 0;
        i64 last[4] = {-1, -1, -1, -1};
        lists.for_each_four(f, y, x0, [&](const i64 (&p)[4], const float (&weight)[4], const bool (&there)[4]) {
          for (int k = 0; k < 4; ++k) {
            expect(there[k] ? p[k] > last[k] : weight[k] == 0 && p[k] == 0, "lists in the order of the pixels");
            if (there[k]) last[k] = p[k];
            sum += weight[k] * g[f * H * W + p[k]];
          }
        });
        right += double(sum * x[(f * H + y) * W + x0]);
      }
    expect(std::fabs(left - right) < 1e-4 * (1 + std::fabs(left)), "gather of a warp's gradient");
  }
}

// <resize(x), g> = <x, adjoint(g)>, shrinking, growing, of one pixel.
static void test_resize_adjoint() {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  const int sizes[][2] = {{5, 7}, {1, 1}, {9, 3}, {2, 6}, {1, 4}, {20, 21}};
  for (const auto& from : sizes)
    for (const auto& to : sizes) {
      const int h = from[0], w = from[1], H = to[0], W = to[1];
      constexpr int maps = 4, blocks = 2;
      std::vector<float> x(maps * h * w), parts(blocks * maps * H * W), back(x.size(), NAN);
      for (float& v : x) v = normal(random);
      for (float& v : parts) v = normal(random);
      launch_adjoint(ResizeAdjoint<float>{parts.data(), back.data(), blocks, maps * H * W, H * W, 2 * H * W, H, W, h, w,
                                          2, ResizeAxis<float>(h, H), ResizeAxis<float>(w, W), 1, 1},
                     maps, kNoStream);
      double left = 0, right = 0;
      for (int m = 0; m < maps; ++m)
        for (int p = 0; p < H * W; ++p)
          for (int block = 0; block < blocks; ++block)
            left += double(ResizedMap<float>(x.data() + m * h * w, h, w, H, W).at(0, p / W, p % W) *
                           parts[(block * maps + m) * H * W + p]);
      for (size_t i = 0; i < x.size(); ++i) right += double(x[i] * back[i]);
      expect(std::fabs(left - right) < 1e-4 * (10 + std::fabs(left)), "adjoint of a resize");
    }
}

int main() {
  test_order();
  test_teams();
  test_split();
  test_packs<float>();
  test_packs<double>();
  test_packs<bf16>();
  test_packs<f16>();
  test_lists();
  test_resize_adjoint();
  std::printf(failures ? "%d failures\n" : "all passed\n", failures);
  return failures != 0;
}
