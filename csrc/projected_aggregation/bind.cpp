// References are projected for a block of channels, and aggregated, before the next block is: all
// keys and values together are never in memory, and the backward pass makes them again.
#include "deformable_aggregation/launch.h"
#include "product/multiply.h"

namespace gi {
namespace {

// Channels whose keys and values are in memory at a time.
constexpr i64 kBlock = 128;

// What the references [B,T,R,H,W] are projected to, for a block of channels.
class Projection {
 public:
  Projection(const at::Tensor& references, const at::Tensor& key_weight, const at::Tensor& value_weight,
             at::ScalarType dtype, i64 channels)
      : key_weight_(key_weight), value_weight_(value_weight), B_(references.size(0)), T_(references.size(1)),
        H_(references.size(3)), W_(references.size(4)),
        pixels(references.reshape({B_ * T_, 1, references.size(2), H_ * W_}).transpose(2, 3)),
        memory_(allocate(channels, dtype)) {}

  // Memory for rows of `channels` channels.
  at::Tensor allocate(i64 channels, at::ScalarType dtype) const {
    return empty_result({B_ * T_ * H_ * W_ * 2 * channels}, pixels.options().dtype(dtype));
  }

  // Weights of channels [first, first + count): [2 count, R].
  at::Tensor weights(i64 first, i64 count) const {
    return at::cat({key_weight_.narrow(0, first, count), value_weight_.narrow(0, first, count)});
  }

  // Keys, then values, of `count` channels at every pixel, in memory from allocate(): [BT,HW,2 count].
  at::Tensor rows(const at::Tensor& memory, i64 count) const {
    return memory.narrow(0, 0, B_ * T_ * H_ * W_ * 2 * count).view({B_ * T_, H_ * W_, 2 * count});
  }

  // The keys (0) or the values (1) among rows: [B,T,count,H,W].
  at::Tensor maps(const at::Tensor& rows, int which) const {
    const i64 count = rows.size(2) / 2;
    return rows.narrow(2, which * count, count).view({B_, T_, H_, W_, count}).permute({0, 1, 4, 2, 3});
  }

  // Rows for the given weights; overwritten by the next call.
  at::Tensor project(const at::Tensor& weights) const {
    const at::Tensor out = rows(memory_, weights.size(0) / 2);
    multiply(out, pixels, weights.t().expand({B_ * T_, 1, weights.size(1), weights.size(0)}), false);
    return out;
  }

 private:
  const at::Tensor &key_weight_, &value_weight_;
  i64 B_, T_, H_, W_;

 public:
  const at::Tensor pixels;  // [BT,1,HW,R]

 private:
  at::Tensor memory_;
};

at::Tensor forward(const at::Tensor& features, const at::Tensor& references, const at::Tensor& key_weight,
                   const at::Tensor& value_weight, const at::Tensor& flows, const at::Tensor& errors,
                   const at::Tensor& key_error_weight, const at::Tensor& value_error_weight,
                   const at::Tensor& value_bias) {
  at::Tensor output = empty_result_like(features);
  if (output.numel() == 0) return output;
  const auto maps = AggregationMaps{flows, errors, key_error_weight, value_error_weight, value_bias}.contiguous();
  const i64 C = features.size(1);
  const bool low = is_low(features);
  // PyTorch's products in low precision are the fastest, and want to be large.
  const i64 block = low ? C : std::min(kBlock, C);
  const Projection p(references, key_weight, value_weight, features.scalar_type(), low ? 0 : block);
  for (i64 first = 0; first < C; first += block) {
    const i64 count = std::min(block, C - first);
    const at::Tensor weights = p.weights(first, count);
    const at::Tensor rows = low ? project_low(p.pixels, weights) : p.project(weights);
    aggregate(output.narrow(1, first, count), features.narrow(1, first, count), p.maps(rows, 0), p.maps(rows, 1),
              maps.channels(first, count));
  }
  return output;
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Of references, key and value weight, flows, errors, and the three vectors together as [3,C].
// The gradient of references is channels-last where they are, else contiguous. Everything on the way is
// in accumulation type: numbers rounded before a product would bias all that it makes of them.
Gradients backward(const at::Tensor& grad, const at::Tensor& features, const at::Tensor& references,
                   const at::Tensor& key_weight, const at::Tensor& value_weight, const at::Tensor& flows,
                   const at::Tensor& errors, const at::Tensor& key_error_weight, const at::Tensor& value_error_weight,
                   const at::Tensor& value_bias, bool need_references, bool need_weights, bool need_maps) {
  const i64 C = features.size(1), B = references.size(0), T = references.size(1), R = references.size(2),
            H = references.size(3), W = references.size(4), frames = B * T;
  const at::ScalarType dtype = accumulation_type(features);
  const auto options = references.options().dtype(dtype);
  const bool rows_first = references.stride(2) == 1;
  at::Tensor grad_key = empty_contiguous_gradient(key_weight, need_weights);
  at::Tensor grad_value = empty_contiguous_gradient(value_weight, need_weights);
  at::Tensor grad_flows = empty_contiguous_gradient(flows, need_maps);
  at::Tensor grad_errors = empty_contiguous_gradient(errors, need_maps);
  at::Tensor grad_vectors = at::empty({3, C}, flows.options());
  at::Tensor sum = at::empty({0}, options);  // of the gradient of references: [BT,HW,R] or [BT,R,HW]
  if (need_references) sum = empty_result({frames, rows_first ? H * W : R, rows_first ? R : H * W}, options);
  const auto gradients = [&]() -> Gradients {
    at::Tensor grad_references = sum.to(references.scalar_type());
    if (need_references)
      grad_references = rows_first ? grad_references.view({B, T, H, W, R}).permute({0, 1, 4, 2, 3})
                                   : grad_references.view({B, T, R, H, W});
    return {grad_references, grad_key, grad_value, grad_flows, grad_errors, grad_vectors};
  };
  if (grad.numel() == 0) {
    for (const at::Tensor& t : {sum, grad_key, grad_value, grad_flows, grad_errors, grad_vectors}) t.zero_();
    return gradients();
  }
  const auto maps = AggregationMaps{flows, errors, key_error_weight, value_error_weight, value_bias}.contiguous();
  const i64 block = std::min(kBlock, C);
  const Projection p(references, key_weight, value_weight, dtype, block);
  const bool need_sources = need_references || need_weights;
  at::Tensor source_memory, map_parts;
  if (need_sources) source_memory = p.allocate(block, dtype);
  if (need_maps) map_parts = at::empty({aggregation_blocks(C), B, T, 3, H, W}, flows.options());
  for (i64 first = 0; first < C; first += block) {
    const i64 count = std::min(block, C - first);
    const at::Tensor weights = p.weights(first, count), rows = p.project(weights);
    AggregationGradients result;
    at::Tensor grad_rows;
    if (need_sources) {
      grad_rows = p.rows(source_memory, count);
      result.keys = p.maps(grad_rows, 0);
      result.values = p.maps(grad_rows, 1);
    }
    if (need_maps) result.map_parts = map_parts.narrow(0, aggregation_blocks(first), aggregation_blocks(count));
    result.weight_parts = at::empty({B, 3, count}, flows.options());
    aggregate_backward(result, grad.narrow(1, first, count).to(dtype), features.narrow(1, first, count),
                       p.maps(rows, 0), p.maps(rows, 1), maps.channels(first, count));
    grad_vectors.narrow(1, first, count).copy_(result.weight_parts.sum(0));
    if (need_references && rows_first)
      multiply(sum, grad_rows.unsqueeze(1), weights.expand({frames, 1, 2 * count, R}), first > 0);
    else if (need_references)
      multiply(sum, weights.t().expand({frames, 1, R, 2 * count}), grad_rows.unsqueeze(1).transpose(2, 3),
               first > 0);
    if (need_weights) {
      const at::Tensor grad_weights = at::empty({1, 2 * count, R}, options);
      multiply(grad_weights, grad_rows.transpose(1, 2).unsqueeze(0), p.pixels.transpose(0, 1), false);
      grad_key.narrow(0, first, count).copy_(grad_weights[0].narrow(0, 0, count));
      grad_value.narrow(0, first, count).copy_(grad_weights[0].narrow(0, count, count));
    }
  }
  if (need_maps) reduce_maps(grad_flows, grad_errors, map_parts);
  return gradients();
}

}  // namespace

TORCH_LIBRARY_IMPL(gi, CPU, m) {
  m.impl("projected_aggregation", forward);
  m.impl("projected_aggregation_backward", backward);
}

}  // namespace gi
