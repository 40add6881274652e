// Unit test of the maths that every kernel shares; no torch, no framework.
#include <cmath>
#include <cstdio>

#include "common/gather.h"
#include "common/minimal_filter.h"

using namespace gi;
using namespace gi::portable;

static int failures = 0;

static void expect(bool ok, const char* what) {
  if (!ok) {
    std::printf("FAILED: %s\n", what);
    ++failures;
  }
}

static bool close(double a, double b, double tolerance) { return std::fabs(a - b) <= tolerance; }

static void test_taps() {
  const auto t = bilinear_taps<double>(1.25, 2.5, 4, 4);
  expect(t.x0 == 1 && t.y0 == 2, "corner of the taps");
  expect(close(t.weight(0), 0.75 * 0.5, 0) && close(t.weight(3), 0.25 * 0.5, 0), "weights");
  double sum = 0, dx = 0, dy = 0;
  for (int k = 0; k < 4; ++k) sum += t.weight(k), dx += t.weight_dx(k), dy += t.weight_dy(k);
  expect(close(sum, 1, 1e-15) && close(dx, 0, 1e-15) && close(dy, 0, 1e-15), "partition of unity");
  expect(bilinear_taps<double>(3, 3, 4, 4).inside[0] && !bilinear_taps<double>(3, 3, 4, 4).inside[1], "last pixel");
  expect(bilinear_taps<double>(-1, 0, 4, 4).inside[1] && !bilinear_taps<double>(-1, 0, 4, 4).inside[0], "minus one");
  expect(!bilinear_taps<float>(NAN, 0, 4, 4).any() && !bilinear_taps<float>(0, INFINITY, 4, 4).any(), "not finite");
  expect(!bilinear_taps<float>(4, 0, 4, 4).any() && !bilinear_taps<float>(-1e30f, 0, 4, 4).any(), "outside");
  expect(bilinear_taps<float>(-0.25f, 0, 4, 4).x0 == -1, "floor of a negative position");
}

static void test_resize() {
  const float flow[8] = {0, 1, 2, 3, 10, 10, 10, 10};  // [2,2,2]
  const FlowField<float> field(flow, 2, 2, 3, 3);
  const auto t = field.taps(1, 1);  // mean of x is 1.5, scaled by 3/2; y is 10 * 3/2
  expect(close(t.x0 + t.fx, 0, 0) && !t.any(), "far below the frame");
  const ResizedMap<float> map(flow, 2, 2, 3, 3);
  expect(close(map.at(0, 1, 1), 1.5, 1e-6) && close(map.at(0, 2, 2), 3, 0), "align corners");
  // The adjoint: <resize(f), g> = <f, resize_backward(g)>.
  float g[9], back[4];
  for (int i = 0; i < 9; ++i) g[i] = float(i * i % 7) - 2;
  const float one = 1;
  resize_backward<float>(g, 1, 0, 1, 3, 3, &one, back, 2, 2);
  float left = 0, right = 0;
  for (int y = 0; y < 3; ++y)
    for (int x = 0; x < 3; ++x) left += map.at(0, y, x) * g[3 * y + x];
  for (int i = 0; i < 4; ++i) right += flow[i] * back[i];
  expect(close(left, right, 1e-4), "adjoint of the resize");
}

static void test_exp() {
  double worst = 0;
  for (double x = -80; x < 80; x += 0.0137) {
    const float y = vexp<float>(splat<float>(float(x)))[0];
    worst = std::fmax(worst, std::fabs(y / std::exp(double(float(x))) - 1));
  }
  expect(worst < 3e-7, "exp in float32");
  worst = 0;
  for (double x = -700; x < 700; x += 0.137)
    worst = std::fmax(worst, std::fabs(vexp<double>(splat<double>(x))[0] / std::exp(x) - 1));
  expect(worst < 1e-15, "exp in float64");
  expect(vexp<float>(splat<float>(-INFINITY))[0] == 0 && std::isnan(vexp<float>(splat<float>(NAN))[0]), "exp limits");
}

static void test_storage() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const f16 h{uint16_t(bits)};
    const float f = to_accumulate(h);
    if (f == f) expect(Rounded<f16>::from(f).bits == h.bits, "float16 round trip");
    const bf16 b{uint16_t(bits)};
    const float v = to_accumulate(b);
    if (v == v) expect(Rounded<bf16>::from(v).bits == b.bits, "bfloat16 round trip");
  }
  expect(Rounded<bf16>::from(1.00390625f).bits == 0x3f80, "bfloat16 ties to even");
  expect(std::isnan(to_accumulate(Rounded<bf16>::from(NAN))), "bfloat16 NaN");
}

static void test_staging() {
  constexpr int C = 7, H = 5, W = 37;
  float map[C * H * W], back[C * H * W];
  for (int i = 0; i < C * H * W; ++i) map[i] = float(i);
  const i64 stride = padded<float>(C);
  Scratch slab(H * W * stride * 4);
  stage<float, float>({map, H * W, W, 1}, C, 0, H, W, slab.as<float>(), stride);
  expect(slab.as<float>()[(2 * W + 3) * stride + 4] == map[(4 * H + 2) * W + 3], "slab order");
  unstage<float, float>(slab.as<float>(), stride, C, 0, H, W, {back, H * W, W, 1});
  expect(std::memcmp(map, back, sizeof map) == 0, "slab round trip");
}

template <int M, int K> static void test_minimal_filter() {
  using F = MinimalFilter<M, K>;
  using V = Vec<double>;
  double d[F::size], g[K];
  V values[F::size], taps[K], weights[F::size], results[M];
  for (int i = 0; i < F::size; ++i) values[i] = splat<double>(d[i] = (i * i * 5 + 3 * i) % 11 - 4.5);
  for (int k = 0; k < K; ++k) taps[k] = splat<double>(g[k] = (k * 7 % 5) - 1.25);
  transform_input<F>(values);
  transform_weight<F>(taps, weights);
  for (int i = 0; i < F::size; ++i) values[i] *= weights[i];
  transform_output<F>(values, results);
  for (int m = 0; m < M; ++m) {
    double direct = 0;
    for (int k = 0; k < K; ++k) direct += d[m + k] * g[k];
    expect(close(results[m][0], direct, 1e-12), "minimal filter");
  }
}

// Scratch memory is left for the next of about its size, and never twice.
static void test_scratch() {
#if !defined(__SANITIZE_ADDRESS__)
  constexpr i64 kilobyte = 1024;
  const void* left;
  {
    const Scratch first(200 * kilobyte);
    left = first.as<char>();
  }
  const Scratch larger(300 * kilobyte), much_smaller(80 * kilobyte), same(150 * kilobyte), next(150 * kilobyte);
  expect(larger.as<char>() != left && much_smaller.as<char>() != left, "scratch of another size");
  expect(same.as<char>() == left && next.as<char>() != left, "scratch of that size");
#endif
}

int main() {
  test_scratch();
  test_taps();
  test_resize();
  test_minimal_filter<1, 1>();
  test_minimal_filter<4, 3>();
  test_minimal_filter<4, 5>();
  test_minimal_filter<8, 5>();
  test_exp();
  test_storage();
  test_staging();
  std::printf(failures ? "%d failures\n" : "all passed\n", failures);
  return failures != 0;
}
