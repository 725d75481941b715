// Python's view of csrc: functions over Python's tensors, lists of them or single ones, which are read through DLPack
// (cpu/tensors.h), and over addresses with sizes and strides. No torch headers, no torch ABI.
#include <pybind11/pybind11.h>

namespace lowrank {
void bind_cpu(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);
}  // namespace lowrank

// The version of what Python and these functions ask of each other. Raise it, here and in backends/extension.py,
// whenever a function's arguments, their meaning or its result change, or a function is added or taken away: Python
// refuses an extension of another number, such as one that was not built again after the sources were updated.
constexpr int kInterface = 9;

PYBIND11_MODULE(_csrc, m) {
  m.doc() = "lowrank_kernels: CPU kernels and the cuSOLVER/cuBLAS loader";
  m.attr("interface") = kInterface;
  lowrank::bind_cpu(m);
  lowrank::bind_cuda(m);
}
