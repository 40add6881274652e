#include "global_attention/kernel.h"

#include "global_attention/rounding.h"

GI_BEGIN_VARIANT

namespace {

// Rows [first, first + count) of head h of item b of an array [B,h,N,d]: channels are the d numbers
// of a row.
template <class T> struct Rows {
  T* data;
  i64 channel, row, channels;  // strides, and d

  Rows(const Array& a, i64 b, i64 h)
      : data(static_cast<T*>(a.data) + b * a.stride[0] + h * a.stride[1]), channel(a.stride[3]), row(a.stride[2]),
        channels(a.size[3]) {}

  // As the left factor of a product over the channels.
  template <class S> void pack_rows(i64 first, i64 count, S* rows, i64 stride) const {
    GI_VARIANT::pack_rows(data + first * row, channel, row, channels, count, rows, stride);
  }
  // As the right factor of a product over the channels: B[c][n] is row n.
  template <class S> void pack_transposed(i64 first, i64 count, S* panels) const {
    pack_panels(data + first * row, channel, row, channels, count, panels);
  }
  // As the right factor of a product over the rows.
  template <class S> void pack(i64 first, i64 count, S* panels) const {
    pack_panels(data + first * row, row, channel, count, channels, panels);
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
  A *top, *total;  // largest score, and sum of the weights exp(score - top)
  A* rounded;      // sum of the weights as they are multiplied by values
  A* sums;         // of weight * value, rows of `width`
  i64 width;
};

// Products q k of query i become weights exp(score - top) with score = factor q k, and the new top; what was
// summed before is rescaled.
template <class A>
void accumulate_softmax(A* products, i64 keys, A factor, const Running<A>& state, i64 i) {
  constexpr i64 L = kLanes<A>;
  for (i64 j = keys; j < padded<A>(keys); ++j) products[j] = -__builtin_huge_val();
  Vec<A> highest = load<A>(products);
  for (i64 j = L; j < keys; j += L) highest = vmax<A>(load<A>(products + j), highest);
  const A top = state.top[i], new_top = maximum(top, max_lanes<A>(highest) * factor);
  // Where all scores are minus infinity so far, there is nothing to be relative to.
  const Vec<A> base = splat<A>(new_top == -__builtin_huge_val() ? A(0) : new_top);
  Vec<A> sum = {};
  for (i64 j = 0; j < keys; j += L) {
    const Vec<A> e = vexp<A>(load<A>(products + j) * factor - base);
    store<A>(products + j, e);
    sum += e;
  }
  if (new_top != top) {
    const A shrink = vexp<A>(splat<A>(top) - base)[0];
    state.total[i] *= shrink;
    state.rounded[i] *= shrink;
    scale(state.sums + i * state.width, state.width, shrink);
    state.top[i] = new_top;
  }
  state.total[i] += sum_lanes<A>(sum);
}

// Numbers become what rounding to T takes from them.
template <class T, class A> void keep_remainder(A* data, i64 count) {
  for (i64 c = 0; c < count; c += kLanes<A>) {
    T rounded[kLanes<A>];
    const Vec<A> v = load<A>(data + c);
    store<A>(rounded, v);
    store<A>(data + c, v - load<A>(rounded));
  }
}

template <class T>
void forward_typed(const AttentionForward& a, i64 begin, i64 end) {
  using A = typename Accumulate<T>::type;
  using S = typename Terms<T>::type;
  constexpr bool kRounds = !std::is_same_v<S, A>;
  const i64 heads = a.query.size[1], N = a.query.size[2], d = a.query.size[3];
  const i64 items = (N + a.item_queries - 1) / a.item_queries, most = minimum(N, a.item_queries);
  const i64 row = padded_terms<S>(d), width = paneled<S>(d), scores_row = paneled<S>(kKeyBlock);
  const A factor = 1 / __builtin_sqrt(A(d));
  Scratch query_memory(most * row * i64(sizeof(S))), sum_memory(most * (width + 3) * i64(sizeof(A))),
      score_memory(kQueryBlock * scores_row * i64(sizeof(A))), key_memory(terms<S>(d) * scores_row * i64(sizeof(S))),
      value_memory(terms<S>(kKeyBlock) * width * i64(sizeof(S)));
  S *queries = query_memory.as<S>(), *keys = key_memory.as<S>(), *values = value_memory.as<S>();
  A* scores = score_memory.as<A>();
  A* sums = sum_memory.as<A>();
  const Running<A> state{sums + most * width, sums + most * (width + 1), sums + most * (width + 2), sums, width};
  for (i64 item = begin; item < end; ++item) {
    const i64 first = item % items * a.item_queries, h = item / items % heads, b = item / items / heads;
    const i64 count = minimum(a.item_queries, N - first);
    Rows<const T>(a.query, b, h).pack_rows(first, count, queries, row);
    std::memset(sums, 0, count * width * sizeof(A));
    for (i64 i = 0; i < count; ++i) {
      state.top[i] = -__builtin_huge_val();
      state.total[i] = state.rounded[i] = 0;
    }
    for (i64 s = 0; s < a.segments; ++s)
      for (i64 j = 0; j < a.keys[s].size[2]; j += kKeyBlock) {
        const i64 block = minimum(kKeyBlock, a.keys[s].size[2] - j);
        Rows<const T>(a.keys[s], b, h).pack_transposed(j, block, keys);
        Rows<const T>(a.values[s], b, h).pack(j, block, values);
        for (i64 i = 0; i < count; i += kQueryBlock) {
          const i64 rows = minimum(kQueryBlock, count - i);
          multiply<S>(rows, block, d, {queries + i * row, row, 1}, {keys, terms<S>(d) * kPanel<S>}, scores, scores_row,
                      Into::overwrite);
          for (i64 r = 0; r < rows; ++r) accumulate_softmax<A>(scores + r * scores_row, block, factor, state, i + r);
          const auto weights = as_factor<S>(scores, scores_row, rows, block);
          if constexpr (kRounds)
            for (i64 r = 0; r < rows; ++r) state.rounded[i + r] += sum_pairs(weights.data + r * scores_row, block);
          multiply<S>(rows, d, block, weights, {values, terms<S>(block) * kPanel<S>}, sums + i * width, width,
                      Into::add);
        }
      }
    A* log_sum = static_cast<A*>(a.log_sum) + (b * heads + h) * N + first;
    for (i64 i = 0; i < count; ++i) {
      scale(sums + i * width, width, 1 / (kRounds ? state.rounded : state.total)[i]);
      log_sum[i] = state.top[i] + __builtin_log(state.total[i]);
    }
    write(Rows<T>(a.output, b, h), first, count, sums, width);
    if constexpr (sizeof(T) < sizeof(A)) {
      keep_remainder<T>(sums, count * width);
      write(Rows<T>(a.remainder, b, h), first, count, sums, width);
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

// With s = factor q k and p = exp(s - log_sum): grad_v = p^T g, grad_p = g v^T,
// grad_s = p (grad_p - sum(g out)), grad_k = factor grad_s^T q, grad_q = factor grad_s k.
// Products q k become p, and grad_p becomes grad_s.
template <class A>
void softmax_backward(A* products, A* grads, i64 keys, A factor, A log_sum, A dot) {
  constexpr i64 L = kLanes<A>;
  for (i64 j = 0; j < keys; j += L) {
    const Vec<A> p = vexp<A>(load<A>(products + j) * factor - log_sum);
    store<A>(products + j, p);
    store<A>(grads + j, p * (load<A>(grads + j) - dot));
  }
}

// dots[i] += sum over the channels of a[i] b[i].
template <class T, class A>
void add_dots(const Rows<const T>& a, const Rows<const T>& b, i64 count, A* dots, Scratch& memory) {
  const i64 row = padded<A>(a.channels);
  memory.reserve(2 * kQueryBlock * row * i64(sizeof(A)));
  A *left = memory.as<A>(), *right = left + kQueryBlock * row;
  for (i64 i = 0; i < count; i += kQueryBlock) {
    const i64 rows = minimum(kQueryBlock, count - i);
    a.pack_rows(i, rows, left, row);
    b.pack_rows(i, rows, right, row);
    for (i64 r = 0; r < rows; ++r) dots[i + r] += dot(left + r * row, right + r * row, row);
  }
}

template <class T>
void backward_typed(const AttentionBackward& back, i64 begin, i64 end) {
  using A = typename Accumulate<T>::type;
  using S = typename Terms<T>::type;
  const AttentionForward& a = back.forward;
  const i64 heads = a.query.size[1], N = a.query.size[2], d = a.query.size[3];
  const i64 row = padded_terms<S>(d), width = paneled<S>(d), scores_row = paneled<S>(kKeyBlock);
  const i64 depth_panel = terms<S>(d) * kPanel<S>, query_panel = terms<S>(N) * kPanel<S>;
  const A factor = 1 / __builtin_sqrt(A(d));
  const auto sums = [](i64 count) { return count * i64(sizeof(A)); };
  const auto factors = [](i64 count) { return count * i64(sizeof(S)); };
  // Queries and incoming gradients as rows, left factors, and packed, right factors.
  Scratch query_memory(factors(N * row + terms<S>(N) * width)), grad_memory(factors(N * row + terms<S>(N) * width)),
      sum_memory(sums(N * width)), dot_memory(sums(N)), row_memory, score_memory(sums(2 * kQueryBlock * scores_row)),
      key_memory(factors(terms<S>(d) * scores_row + terms<S>(kKeyBlock) * width)),
      value_memory(factors(terms<S>(d) * scores_row)), result_memory(sums(2 * kKeyBlock * width));
  S *queries = query_memory.as<S>(), *query_panels = queries + N * row;
  S *grads = grad_memory.as<S>(), *grad_panels = grads + N * row;
  A *grad_query = sum_memory.as<A>(), *dots = dot_memory.as<A>();
  A *scores = score_memory.as<A>(), *grad_scores = scores + kQueryBlock * scores_row;
  S *keys_transposed = key_memory.as<S>(), *keys = keys_transposed + terms<S>(d) * scores_row;
  S* values_transposed = value_memory.as<S>();
  A *grad_key = result_memory.as<A>(), *grad_value = grad_key + kKeyBlock * width;
  ScoreRounding<S> rounding(N);
  for (i64 item = begin; item < end; ++item) {
    const i64 h = item % heads, b = item / heads;
    const A* log_sum = static_cast<const A*>(a.log_sum) + item * N;
    const Rows<const T> query(a.query, b, h), grad(back.grad, b, h);
    std::memset(dots, 0, sums(N));
    add_dots(grad, Rows<const T>(a.output, b, h), N, dots, row_memory);
    if constexpr (sizeof(T) < sizeof(A)) add_dots(grad, Rows<const T>(a.remainder, b, h), N, dots, row_memory);
    query.pack_rows(0, N, queries, row);
    query.pack(0, N, query_panels);
    grad.pack_rows(0, N, grads, row);
    grad.pack(0, N, grad_panels);
    std::memset(grad_query, 0, sums(N * width));
    rounding.start(N);
    for (i64 s = 0; s < a.segments; ++s)
      for (i64 j = 0; j < a.keys[s].size[2]; j += kKeyBlock) {
        const i64 block = minimum(kKeyBlock, a.keys[s].size[2] - j);
        const Rows<const T> key(a.keys[s], b, h), value(a.values[s], b, h);
        key.pack_transposed(j, block, keys_transposed);
        key.pack(j, block, keys);
        value.pack_transposed(j, block, values_transposed);
        std::memset(grad_key, 0, sums(2 * kKeyBlock * width));
        rounding.start_keys();
        for (i64 i = 0; i < N; i += kQueryBlock) {
          const i64 rows = minimum(kQueryBlock, N - i), panel_row = terms<S>(i) * kPanel<S>;
          multiply<S>(rows, block, d, {queries + i * row, row, 1}, {keys_transposed, depth_panel}, scores, scores_row,
                      Into::overwrite);
          multiply<S>(rows, block, d, {grads + i * row, row, 1}, {values_transposed, depth_panel}, grad_scores,
                      scores_row, Into::overwrite);
          for (i64 r = 0; r < rows; ++r)
            softmax_backward<A>(scores + r * scores_row, grad_scores + r * scores_row, block, factor, log_sum[i + r],
                                dots[i + r]);
          const auto left = rounding.factors(scores, grad_scores, scores_row, i, rows, block);
          multiply<S>(block, d, rows, left.weights_turned, {grad_panels + panel_row, query_panel}, grad_value, width,
                      Into::add);
          multiply<S>(block, d, rows, left.grads_turned, {query_panels + panel_row, query_panel}, grad_key, width,
                      Into::add);
          multiply<S>(rows, d, block, left.grads, {keys, terms<S>(block) * kPanel<S>}, grad_query + i * width, width,
                      Into::add);
        }
        for (i64 r = 0; r < block; ++r) {
          scale(grad_key + r * width, width, factor * rounding.key_gain(r));
          scale(grad_value + r * width, width, rounding.value_gain(r));
        }
        write(Rows<T>(back.grad_keys[s], b, h), j, block, grad_key, width);
        write(Rows<T>(back.grad_values[s], b, h), j, block, grad_value, width);
      }
    for (i64 i = 0; i < N; ++i) scale(grad_query + i * width, width, factor * rounding.query_gain(i));
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
