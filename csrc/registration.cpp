// The only list of operator schemas. Kernels register themselves in csrc/<operator>/bind.cpp; shape
// functions and autograd are attached in gi_kernels/ops/<operator>/__init__.py.
#include <torch/library.h>

TORCH_LIBRARY(gi, m) {
  m.def("flow_warp(Tensor input, Tensor flow) -> Tensor");
  m.def("flow_warp_backward(Tensor grad, Tensor input, Tensor flow, bool need_input, bool need_flow) -> (Tensor, Tensor)");
}
