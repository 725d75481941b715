// What the CPU code offers to Python.
#include <pybind11/pybind11.h>

namespace lowrank {

void bind_cpu(pybind11::module_&) {}

}  // namespace lowrank
