// The torch side of the aggregation, for operators that make its keys and values.
#pragma once

#include "common/binding.h"

namespace gi {

// The small arguments of the aggregation, contiguous, in accumulation type.
struct AggregationMaps {
  at::Tensor flows, errors;                                    // [B,T,2,h,w], [B,T,1,h,w]
  at::Tensor key_error_weight, value_error_weight, value_bias;  // [C] each

  AggregationMaps contiguous() const;
  AggregationMaps channels(i64 first, i64 count) const;
};

// output = the aggregation of features, keys and values.
void aggregate(const at::Tensor& output, const at::Tensor& features, const at::Tensor& keys, const at::Tensor& values,
               const AggregationMaps& maps);

// Gradients for the incoming `grad`. Undefined tensors among the results are not computed.
struct AggregationGradients {
  at::Tensor keys, values;  // [B,T,C,H,W]
  at::Tensor map_parts;     // [aggregation_blocks(C),B,T,3,H,W]: along x, along y, error
  at::Tensor weight_parts;  // [B,3,C]: key_error_weight, value_error_weight, value_bias
};
i64 aggregation_blocks(i64 channels);
void aggregate_backward(const AggregationGradients& result, const at::Tensor& grad, const at::Tensor& features,
                        const at::Tensor& keys, const at::Tensor& values, const AggregationMaps& maps);

// Gradients of flows and errors from their parts.
void reduce_maps(const at::Tensor& grad_flows, const at::Tensor& grad_errors, const at::Tensor& map_parts);

}  // namespace gi
