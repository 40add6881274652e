#include "global_attention/kernel.h"

#include "common/staging.h"

GI_BEGIN_VARIANT

namespace {

// out = sum_i exp(l_i - l) o_i with l = log sum_i exp(l_i): the softmax over all segments together.
template <class T>
void merge_typed(const MergeAttention& a, i64 begin, i64 end) {
  using A = typename Accumulate<T>::type;
  constexpr i64 L = kLanes<A>;
  Scratch memory(a.segments * i64(sizeof(A)));
  A* weight = memory.as<A>();
  for (i64 item = begin; item < end; ++item) {
    const i64 b = item / a.queries, n = item % a.queries;
    for (i64 h = 0; h < a.heads; ++h) {
      A top = -__builtin_huge_val();
      for (i64 s = 0; s < a.segments; ++s) {
        const Array& l = a.log_sums[s];
        weight[s] = static_cast<const A*>(l.data)[b * l.stride[0] + h * l.stride[1] + n * l.stride[2]];
        if (!(weight[s] <= top)) top = weight[s];  // a NaN stays
      }
      A sum = 0;
      for (i64 s = 0; s < a.segments; ++s) {
        weight[s] = vexp<A>(splat<A>(weight[s] - top))[0];
        sum += weight[s];
      }
      for (i64 s = 0; s < a.segments; ++s) weight[s] /= sum;
      const Array& l = a.log_sum;
      static_cast<A*>(l.data)[b * l.stride[0] + h * l.stride[1] + n * l.stride[2]] = top + __builtin_log(sum);
      T* out = static_cast<T*>(a.output.data) + b * a.output.stride[0] + h * a.output.stride[1] + n * a.output.stride[2];
      const auto source = [&](i64 s) {
        const Array& o = a.outputs[s];
        return static_cast<const T*>(o.data) + b * o.stride[0] + h * o.stride[1] + n * o.stride[2];
      };
      i64 c = 0;
      for (; c + L <= a.dim; c += L) {
        Vec<A> total = {};
        for (i64 s = 0; s < a.segments; ++s) total += load<A>(source(s) + c) * weight[s];
        store<A>(out + c, total);
      }
      for (; c < a.dim; ++c) {
        A total = 0;
        for (i64 s = 0; s < a.segments; ++s) total += to_accumulate(source(s)[c]) * weight[s];
        out[c] = Rounded<T>::from(total);
      }
    }
  }
}

void merge(const MergeAttention& a, i64 begin, i64 end) {
  with_dtype(a.output.dtype, [&](auto t) { merge_typed<decltype(t)>(a, begin, end); });
}

}  // namespace

extern const MergeAttentionKernels merge_attention_kernels;
const MergeAttentionKernels merge_attention_kernels = {merge};

GI_END_VARIANT
