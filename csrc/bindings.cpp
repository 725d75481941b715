// Python's view of csrc: functions over tables of addresses, sizes and strides. No torch headers, no torch ABI.
#include <pybind11/pybind11.h>

namespace lowrank {
void bind_cpu(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);
}  // namespace lowrank

PYBIND11_MODULE(_csrc, m) {
  m.doc() = "lowrank_kernels: CPU kernels and the cuSOLVER/cuBLAS loader";
  lowrank::bind_cpu(m);
  lowrank::bind_cuda(m);
}
