#include "global_attention/kernel.h"

#include "common/product.h"

GI_BEGIN_VARIANT

namespace {

// Scores of this many queries and keys are held at once.
constexpr i64 kQueryBlock = 64;
constexpr i64 kKeyBlock = 256;

// Rows [first, first + count) of head h of item b of an array [B,h,N,d]: channels are the d numbers
// of a row.
template <class T> struct Rows {
  T* data;
  i64 channel, row, channels;  // strides, and d

  Rows(const Array& a, i64 b, i64 h)
      : data(static_cast<T*>(a.data) + b * a.stride[0] + h * a.stride[1]), channel(a.stride[3]), row(a.stride[2]),
        channels(a.size[3]) {}

  template <class A> void read(i64 first, i64 count, A* rows, i64 stride) const {
    stage_row<A, T>(data + first * row, channel, row, channels, count, rows, stride);
  }
  // As the right factor of a product over the channels: B[c][n] is row n.
  template <class A> void pack_transposed(i64 first, i64 count, A* panels) const {
    pack_panels<A, T>(data + first * row, channel, row, channels, count, panels);
  }
  // As the right factor of a product over the rows.
  template <class A> void pack(i64 first, i64 count, A* panels) const {
    pack_panels<A, T>(data + first * row, row, channel, count, channels, panels);
  }
};

template <class T, class A>
void write(const Rows<T>& target, i64 first, i64 count, const A* rows, i64 stride) {
  unstage_row<A, T>(rows, stride, target.channels, count, target.data + first * target.row, target.channel, target.row);
}

template <class A> void scale(A* data, i64 count, A factor) {
  for (i64 i = 0; i < count; ++i) data[i] *= factor;
}

// Of rows that are filled up with zeros to whole vectors.
template <class A> A dot(const A* a, const A* b, i64 count) {
  Vec<A> sum = {};
  for (i64 c = 0; c < count; c += kLanes<A>) sum += load<A>(a + c) * load<A>(b + c);
  return sum_lanes<A>(sum);
}

template <class A> A max_lanes(const Vec<A>& v) {
  A top = v[0];
  for (int i = 1; i < kLanes<A>; ++i) top = maximum(top, v[i]);
  return top;
}

// ---- forward ----

// What is known of the softmax of some queries after some of the keys.
template <class A> struct Running {
  A *top, *total;  // largest score, and sum of exp(score - top)
  A* sums;         // of exp(score - top) * value, rows of paneled(d)
};

// Scores of one query become exp(score - top), with the new top; what was summed before is rescaled.
template <class A>
void accumulate_softmax(A* scores, i64 keys, A& top, A& total, A* sums, i64 width) {
  constexpr i64 L = kLanes<A>;
  for (i64 j = keys; j < padded<A>(keys); ++j) scores[j] = -__builtin_huge_val();
  Vec<A> highest = load<A>(scores);
  for (i64 j = L; j < keys; j += L) highest = vmax<A>(load<A>(scores + j), highest);
  const A new_top = maximum(top, max_lanes<A>(highest));
  // Where all scores are minus infinity so far, there is nothing to be relative to.
  const Vec<A> base = splat<A>(new_top == -__builtin_huge_val() ? A(0) : new_top);
  Vec<A> sum = {};
  for (i64 j = 0; j < keys; j += L) {
    const Vec<A> e = vexp<A>(load<A>(scores + j) - base);
    store<A>(scores + j, e);
    sum += e;
  }
  if (new_top != top) {
    const A shrink = vexp<A>(splat<A>(top) - base)[0];
    total *= shrink;
    scale(sums, width, shrink);
    top = new_top;
  }
  total += sum_lanes<A>(sum);
}

template <class T>
void forward_typed(const AttentionForward& a, i64 begin, i64 end) {
  using A = typename Accumulate<T>::type;
  const i64 heads = a.query.size[1], N = a.query.size[2], d = a.query.size[3];
  const i64 items = (N + a.item_queries - 1) / a.item_queries, most = minimum(N, a.item_queries);
  const i64 row = padded<A>(d), width = paneled<A>(d), scores_row = paneled<A>(kKeyBlock);
  const A factor = 1 / __builtin_sqrt(A(d));
  Scratch query_memory(most * row * i64(sizeof(A))), sum_memory(most * (width + 2) * i64(sizeof(A))),
      score_memory(kQueryBlock * scores_row * i64(sizeof(A))), key_memory(d * scores_row * i64(sizeof(A))),
      value_memory(kKeyBlock * width * i64(sizeof(A)));
  A *queries = query_memory.as<A>(), *scores = score_memory.as<A>(), *keys = key_memory.as<A>(),
    *values = value_memory.as<A>();
  const Running<A> state{sum_memory.as<A>() + most * width, sum_memory.as<A>() + most * (width + 1),
                         sum_memory.as<A>()};
  for (i64 item = begin; item < end; ++item) {
    const i64 first = item % items * a.item_queries, h = item / items % heads, b = item / items / heads;
    const i64 count = minimum(a.item_queries, N - first);
    Rows<const T>(a.query, b, h).template read<A>(first, count, queries, row);
    scale(queries, count * row, factor);
    std::memset(state.sums, 0, count * width * sizeof(A));
    for (i64 i = 0; i < count; ++i) {
      state.top[i] = -__builtin_huge_val();
      state.total[i] = 0;
    }
    for (i64 s = 0; s < a.segments; ++s)
      for (i64 j = 0; j < a.keys[s].size[2]; j += kKeyBlock) {
        const i64 block = minimum(kKeyBlock, a.keys[s].size[2] - j);
        Rows<const T>(a.keys[s], b, h).template pack_transposed<A>(j, block, keys);
        Rows<const T>(a.values[s], b, h).template pack<A>(j, block, values);
        for (i64 i = 0; i < count; i += kQueryBlock) {
          const i64 rows = minimum(kQueryBlock, count - i);
          multiply<A>(rows, block, d, {queries + i * row, row, 1}, {keys, d * kPanel<A>}, scores, scores_row,
                      Into::overwrite);
          for (i64 r = 0; r < rows; ++r)
            accumulate_softmax<A>(scores + r * scores_row, block, state.top[i + r], state.total[i + r],
                                  state.sums + (i + r) * width, width);
          multiply<A>(rows, d, block, {scores, scores_row, 1}, {values, block * kPanel<A>}, state.sums + i * width,
                      width, Into::add);
        }
      }
    A* log_sum = static_cast<A*>(a.log_sum) + (b * heads + h) * N + first;
    for (i64 i = 0; i < count; ++i) {
      scale(state.sums + i * width, width, 1 / state.total[i]);
      log_sum[i] = state.top[i] + __builtin_log(state.total[i]);
    }
    write(Rows<T>(a.output, b, h), first, count, state.sums, width);
    if constexpr (sizeof(T) < sizeof(A)) {
      const Rows<const T> output(a.output, b, h);
      output.template read<A>(first, count, queries, row);
      for (i64 i = 0; i < count; ++i)
        for (i64 c = 0; c < d; ++c) state.sums[i * width + c] -= queries[i * row + c];
      write(Rows<T>(a.remainder, b, h), first, count, state.sums, width);
    }
  }
}

i64 forward_items(const AttentionForward& a) {
  return a.query.size[0] * a.query.size[1] * ((a.query.size[2] + a.item_queries - 1) / a.item_queries);
}

void forward(const AttentionForward& a, i64 begin, i64 end) {
  with_dtype(a.query.dtype, [&](auto t) { forward_typed<decltype(t)>(a, begin, end); });
}

// ---- backward: a piece of work is one head of one item, so no two pieces share a number ----

// With p = exp(s - log_sum), s = q k and the scaled query q: grad_v = p^T g, grad_p = g v^T,
// grad_s = p (grad_p - sum(g out)), grad_k = grad_s^T q, grad_q = grad_s k.
template <class A>
void softmax_backward(A* scores, A* grads, i64 keys, A log_sum, A dot) {
  constexpr i64 L = kLanes<A>;
  for (i64 j = 0; j < keys; j += L) {
    const Vec<A> p = vexp<A>(load<A>(scores + j) - log_sum);
    store<A>(scores + j, p);
    store<A>(grads + j, p * (load<A>(grads + j) - dot));
  }
}

template <class T>
void backward_typed(const AttentionBackward& back, i64 begin, i64 end) {
  using A = typename Accumulate<T>::type;
  const AttentionForward& a = back.forward;
  const i64 heads = a.query.size[1], N = a.query.size[2], d = a.query.size[3];
  const i64 row = padded<A>(d), width = paneled<A>(d), scores_row = paneled<A>(kKeyBlock);
  const A factor = 1 / __builtin_sqrt(A(d));
  const auto bytes = [](i64 count) { return count * i64(sizeof(A)); };
  // Queries and incoming gradients as rows, left factors, and packed, right factors.
  Scratch query_memory(bytes(N * (row + width))), grad_memory(bytes(N * (row + width))), sum_memory(bytes(N * width)),
      dot_memory(bytes(N)), score_memory(bytes(2 * kQueryBlock * scores_row)),
      key_memory(bytes(d * scores_row + kKeyBlock * width)), value_memory(bytes(d * scores_row)),
      result_memory(bytes(2 * kKeyBlock * width));
  A *queries = query_memory.as<A>(), *query_panels = queries + N * row;
  A *grads = grad_memory.as<A>(), *grad_panels = grads + N * row;
  A *grad_query = sum_memory.as<A>(), *dots = dot_memory.as<A>();
  A *scores = score_memory.as<A>(), *grad_scores = scores + kQueryBlock * scores_row;
  A *keys_transposed = key_memory.as<A>(), *keys = keys_transposed + d * scores_row, *values = value_memory.as<A>();
  A *grad_key = result_memory.as<A>(), *grad_value = grad_key + kKeyBlock * width;
  for (i64 item = begin; item < end; ++item) {
    const i64 h = item % heads, b = item / heads;
    const A* log_sum = static_cast<const A*>(a.log_sum) + item * N;
    const Rows<const T> query(a.query, b, h), grad(back.grad, b, h);
    grad.template read<A>(0, N, grads, row);
    grad.template pack<A>(0, N, grad_panels);
    std::memset(dots, 0, bytes(N));
    const auto add_dots = [&](const Array& part) {
      Rows<const T>(part, b, h).template read<A>(0, N, queries, row);
      for (i64 i = 0; i < N; ++i) dots[i] += dot(grads + i * row, queries + i * row, row);
    };
    add_dots(a.output);
    if constexpr (sizeof(T) < sizeof(A)) add_dots(a.remainder);
    query.template read<A>(0, N, queries, row);
    scale(queries, N * row, factor);
    query.template pack<A>(0, N, query_panels);
    scale(query_panels, N * width, factor);
    std::memset(grad_query, 0, bytes(N * width));
    for (i64 s = 0; s < a.segments; ++s)
      for (i64 j = 0; j < a.keys[s].size[2]; j += kKeyBlock) {
        const i64 block = minimum(kKeyBlock, a.keys[s].size[2] - j);
        const Rows<const T> key(a.keys[s], b, h), value(a.values[s], b, h);
        key.template pack_transposed<A>(j, block, keys_transposed);
        key.template pack<A>(j, block, keys);
        value.template pack_transposed<A>(j, block, values);
        std::memset(grad_key, 0, bytes(2 * kKeyBlock * width));
        for (i64 i = 0; i < N; i += kQueryBlock) {
          const i64 rows = minimum(kQueryBlock, N - i);
          multiply<A>(rows, block, d, {queries + i * row, row, 1}, {keys_transposed, d * kPanel<A>}, scores,
                      scores_row, Into::overwrite);
          multiply<A>(rows, block, d, {grads + i * row, row, 1}, {values, d * kPanel<A>}, grad_scores, scores_row,
                      Into::overwrite);
          for (i64 r = 0; r < rows; ++r)
            softmax_backward<A>(scores + r * scores_row, grad_scores + r * scores_row, block, log_sum[i + r],
                                dots[i + r]);
          multiply<A>(block, d, rows, {scores, 1, scores_row}, {grad_panels + i * kPanel<A>, N * kPanel<A>},
                      grad_value, width, Into::add);
          multiply<A>(block, d, rows, {grad_scores, 1, scores_row}, {query_panels + i * kPanel<A>, N * kPanel<A>},
                      grad_key, width, Into::add);
          multiply<A>(rows, d, block, {grad_scores, scores_row, 1}, {keys, block * kPanel<A>}, grad_query + i * width,
                      width, Into::add);
        }
        write(Rows<T>(back.grad_keys[s], b, h), j, block, grad_key, width);
        write(Rows<T>(back.grad_values[s], b, h), j, block, grad_value, width);
      }
    scale(grad_query, N * width, factor);
    write(Rows<T>(back.grad_query, b, h), 0, N, grad_query, width);
  }
}

void backward(const AttentionBackward& a, i64 begin, i64 end) {
  with_dtype(a.forward.query.dtype, [&](auto t) { backward_typed<decltype(t)>(a, begin, end); });
}

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {forward_items, forward, backward};

GI_END_VARIANT
