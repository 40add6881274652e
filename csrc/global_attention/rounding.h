// Weights p and score gradients as left factors of the products that attention's gradients are.
//
// Where products round their factors, an error of p or grad_s moves all channels of a gradient together, along
// what the gradient is made of: many such errors change its size more than rounding it would. So each row of a
// rounded factor gets a gain, (x.x) / (x.rounded), with which its product by the exact row is right again. By
// the gain the row of the gradient is multiplied at the end.
#pragma once

#include "common/product.h"

GI_BEGIN_VARIANT

// Scores of this many queries and keys are held at once.
constexpr i64 kQueryBlock = 64;
constexpr i64 kKeyBlock = 256;

template <class S> struct ScoreFactors {
  Factor<S> weights_turned, grads_turned, grads;  // keys x queries, keys x queries, queries x keys
};

// Of terms that are not rounded: factors in place, no gains.
template <class S> class ScoreRounding {
 public:
  explicit ScoreRounding(i64) {}

  // Before the first keys, and before each block of keys.
  void start(i64) {}
  void start_keys() {}

  // Of a block whose rows lie `row` apart; `first` is its first query.
  ScoreFactors<S> factors(S* weights, S* grads, i64 row, i64, i64, i64) {
    return {{weights, 1, row}, {grads, 1, row}, {grads, row, 1}};
  }

  // By what the gradient of a query, of a key or of a value is to be multiplied.
  S query_gain(i64) const { return 1; }
  S key_gain(i64) const { return 1; }
  S value_gain(i64) const { return 1; }
};

#if defined(__AVX512BF16__)

template <> class ScoreRounding<Pair> {
 public:
  explicit ScoreRounding(i64 queries)
      : grads_memory_(kQueryBlock * kKeyBlock * i64(sizeof(bf16))),
        sums_memory_((4 * kKeyBlock + 2 * queries) * i64(sizeof(float))), values_(sums_memory_.as<float>(), kKeyBlock),
        keys_(values_.end(), kKeyBlock), queries_(keys_.end(), queries) {}

  void start(i64 queries) { queries_.clear(queries); }

  void start_keys() {
    values_.clear(kKeyBlock);
    keys_.clear(kKeyBlock);
  }

  // In place but for the grads.
  ScoreFactors<Pair> factors(float* weights, float* grads, i64 row, i64 first, i64 rows, i64 keys) {
    bf16* out = grads_memory_.as<bf16>();
    for (i64 r = 0; r < rows; r += 2) {
      const i64 second = r + 1 < rows ? keys : 0;  // keys of the second row
      float *p = weights + r * row, *g = grads + r * row;
      Vec<float> exact[2] = {}, rounded[2] = {};
      for (i64 j = 0; j < keys; j += 16) {
        const auto at = [&](const float* rows, i64 r, i64 count) { return first_of(rows + r * row + j, count - j); };
        Rows p_rows(at(p, 0, keys), at(p, 1, second)), g_rows(at(g, 0, keys), at(g, 1, second));
        _mm512_storeu_si512(p + j, p_rows.pairs);
        _mm512_storeu_si512(g + j, g_rows.pairs);
        _mm256_storeu_si256((__m256i*)(out + r * kKeyBlock + j), _mm512_castsi512_si256(g_rows.halves));
        _mm256_storeu_si256((__m256i*)(out + (r + 1) * kKeyBlock + j), _mm512_extracti64x4_epi64(g_rows.halves, 1));
        values_.add(j, p_rows);
        keys_.add(j, g_rows);
        for (int i = 0; i < 2; ++i) {
          exact[i] += g_rows.exact[i] * g_rows.exact[i];
          rounded[i] += g_rows.exact[i] * g_rows.rounded[i];
        }
      }
      queries_.add(first + r, exact[0], rounded[0]);
      if (second) queries_.add(first + r + 1, exact[1], rounded[1]);
    }
    const auto pairs = [](void* memory) { return static_cast<const Pair*>(memory); };
    return {{pairs(weights), 1, 2 * row}, {pairs(grads), 1, 2 * row}, {pairs(out), kKeyBlock / 2, 1}};
  }

  float query_gain(i64 query) const { return queries_.gain(query); }
  float key_gain(i64 key) const { return keys_.gain(key); }
  float value_gain(i64 key) const { return values_.gain(key); }

 private:
  // Sixteen numbers of two rows.
  struct Rows {
    Vec<float> exact[2], rounded[2];
    __m512i halves, pairs;  // one row after the other, and across

    Rows(__m512 first, __m512 second)
        : exact{(Vec<float>)first, (Vec<float>)second}, halves((__m512i)_mm512_cvtne2ps_pbh(second, first)),
          pairs(pair_halves(halves)) {
      rounded[0] = (Vec<float>)_mm512_slli_epi32(pairs, 16);
      rounded[1] = (Vec<float>)_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000)));
    }
  };

  // x.x and x.rounded of some rows x.
  class Gains {
   public:
    Gains(float* memory, i64 count) : exact_(memory), rounded_(memory + count), end_(memory + 2 * count) {}

    float* end() const { return end_; }

    void clear(i64 count) {
      std::memset(exact_, 0, count * sizeof(float));
      std::memset(rounded_, 0, count * sizeof(float));
    }

    // Number j of each of sixteen rows, from two places along them.
    void add(i64 j, const Rows& x) {
      store<float>(exact_ + j, load<float>(exact_ + j) + x.exact[0] * x.exact[0] + x.exact[1] * x.exact[1]);
      store<float>(rounded_ + j, load<float>(rounded_ + j) + x.exact[0] * x.rounded[0] + x.exact[1] * x.rounded[1]);
    }

    void add(i64 j, const Vec<float>& exact, const Vec<float>& rounded) {
      exact_[j] += sum_lanes<float>(exact);
      rounded_[j] += sum_lanes<float>(rounded);
    }

    // Squares of very small or large numbers, or of what is none, say nothing.
    float gain(i64 j) const { return rounded_[j] > 1e-30f && rounded_[j] < 1e30f ? exact_[j] / rounded_[j] : 1; }

   private:
    float *exact_, *rounded_, *end_;
  };

  Scratch grads_memory_, sums_memory_;
  Gains values_, keys_, queries_;
};

#endif

GI_END_VARIANT
