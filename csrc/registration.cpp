// The only list of operator schemas. Kernels register themselves in csrc/<operator>/bind.cpp; shape
// functions and autograd are attached in gi_kernels/ops/<operator>/__init__.py.
#include <torch/library.h>

TORCH_LIBRARY(gi, m) {
  m.def("flow_warp(Tensor input, Tensor flow) -> Tensor");
  m.def("flow_warp_backward(Tensor grad, Tensor input, Tensor flow, bool need_input, bool need_flow) -> (Tensor, Tensor)");
  m.def("deformable_aggregation(Tensor features, Tensor keys, Tensor values, Tensor flows, Tensor errors, Tensor key_error_weight, Tensor value_error_weight, Tensor value_bias) -> Tensor");
  m.def("deformable_aggregation_backward(Tensor grad, Tensor features, Tensor keys, Tensor values, Tensor flows, Tensor errors, Tensor key_error_weight, Tensor value_error_weight, Tensor value_bias, bool need_sources, bool need_maps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("pixel_projection(Tensor input, Tensor weight) -> Tensor");
  m.def("pixel_projection_backward(Tensor grad, Tensor input, Tensor weight, bool need_input, bool need_weight) -> (Tensor, Tensor)");
  m.def("projected_aggregation(Tensor features, Tensor references, Tensor key_weight, Tensor value_weight, Tensor flows, Tensor errors, Tensor key_error_weight, Tensor value_error_weight, Tensor value_bias) -> Tensor");
  m.def("projected_aggregation_backward(Tensor grad, Tensor features, Tensor references, Tensor key_weight, Tensor value_weight, Tensor flows, Tensor errors, Tensor key_error_weight, Tensor value_error_weight, Tensor value_bias, bool need_references, bool need_weights, bool need_maps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("fused_convolution_pack(Tensor weight, Tensor? bias) -> Tensor");
  m.def("fused_convolution(Tensor[] inputs, Tensor packed, int channels, int[2] kernel, Tensor? addend, int activation, bool reflect) -> Tensor");
  m.def("global_attention(Tensor query, Tensor[] keys, Tensor[] values) -> (Tensor, Tensor, Tensor)");
  m.def("global_attention_backward(Tensor grad, Tensor query, Tensor[] keys, Tensor[] values, Tensor output, Tensor remainder, Tensor log_sum) -> (Tensor, Tensor[], Tensor[])");
  m.def("flow_consistency(Tensor flow, Tensor flow_backward) -> Tensor");
  m.def("complete_flow(Tensor flow, Tensor mask) -> Tensor");
  m.def("correlation_lookup(Tensor[] volumes, Tensor coords, int radius) -> Tensor");
  m.def("correlation_lookup_backward(Tensor grad, Tensor[] volumes, Tensor coords, int radius, bool need_volumes, bool need_coords) -> (Tensor[], Tensor)");
  m.def("correlation_lookup_on_demand(Tensor features1, Tensor[] features2, Tensor coords, int radius) -> Tensor");
  m.def("correlation_lookup_on_demand_backward(Tensor grad, Tensor features1, Tensor[] features2, Tensor coords, int radius, bool need_features1, bool need_features2, bool need_coords) -> (Tensor, Tensor[], Tensor)");
  m.def("convex_upsample(Tensor flow, Tensor mask) -> Tensor");
  m.def("convex_upsample_backward(Tensor grad, Tensor flow, Tensor mask, bool need_flow, bool need_mask) -> (Tensor, Tensor)");
  m.def("batch_norm(Tensor x, Tensor weight, Tensor bias, float eps, bool relu) -> (Tensor, Tensor, Tensor)");
  m.def("batch_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor variance, float eps, bool relu) -> (Tensor, Tensor, Tensor)");
  m.def("fourier(Tensor x, float inner) -> Tensor");
  m.def("fourier_inverse(Tensor spectrum, int width, Tensor? addend, float inner) -> Tensor");
  m.def("reflect_pad(Tensor x, int margin) -> Tensor");
  m.def("relayout(Tensor x, bool channels_last) -> Tensor");
  m.def("window_pool(Tensor logits, Tensor features, int rows, int columns) -> Tensor");
  m.def("window_pool_backward(Tensor grad, Tensor logits, Tensor features, int rows, int columns, bool need_logits, bool need_features) -> (Tensor, Tensor)");
  m.def("window_query(Tensor features, Tensor queries, int rows, int columns) -> Tensor");
  m.def("window_query_backward(Tensor grad, Tensor features, Tensor queries, int rows, int columns, bool need_features, bool need_queries) -> (Tensor, Tensor)");
  m.def("window_spread(Tensor logits, Tensor latents, int rows, int columns) -> Tensor");
  m.def("window_spread_backward(Tensor grad, Tensor logits, Tensor latents, int rows, int columns, bool need_logits, bool need_latents) -> (Tensor, Tensor)");
}
