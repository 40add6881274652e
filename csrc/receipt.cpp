// A module that says what was built, against what. It does not touch torch, so it can be imported
// when the kernels cannot.
#include <pybind11/pybind11.h>

#include "common/select.h"
#include "receipt.h"  // made by CMake: GI_RECEIPT, a JSON object

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build receipt of the compiled kernels.";
  m.def("receipt", [] { return std::string(GI_RECEIPT); }, "The build receipt as JSON.");
  m.def("cpu_capability", [] { return std::string(gi::cpu_capability_name()); },
        "The instruction set whose kernels run on this CPU.");
}
