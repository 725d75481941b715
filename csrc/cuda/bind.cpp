// What the CUDA host code (cuSOLVER, cuBLAS by dlopen) offers to Python.
#include <pybind11/pybind11.h>

namespace lowrank {

void bind_cuda(pybind11::module_&) {}

}  // namespace lowrank
