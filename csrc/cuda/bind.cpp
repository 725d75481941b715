// What the CUDA host code (cuSOLVER, cuBLAS by dlopen) offers to Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <vector>

#include "cuda/routines.h"

namespace py = pybind11;

namespace lowrank {
namespace {

using cuda::Libraries;
using cuda::Routines;

py::dict status(const Routines& routines) {
  const Libraries& libraries = routines.libraries();
  py::dict result, files;
  const char* names[] = {"cudart", "cublas", "cusolver"};
  for (int which = 0; which < cuda::kLibraries; ++which) {
    const cuda::OpenedLibrary& opened = libraries.library(static_cast<cuda::Library>(which));
    py::dict file;
    file["soname"] = opened.soname;
    file["path"] = opened.path;
    file["origin"] = opened.origin;
    file["error"] = opened.error;
    files[names[which]] = file;
  }
  result["cuda_major"] = libraries.major();
  result["libraries"] = files;
  result["missing_symbols"] = libraries.missing_symbols();
  int cusolver = 0, runtime = 0;
  if (libraries.cusolverGetVersion.resolved()) libraries.cusolverGetVersion(&cusolver);
  if (libraries.cudaRuntimeGetVersion.resolved()) libraries.cudaRuntimeGetVersion(&runtime);
  result["cusolver_version"] = cusolver;
  result["cuda_runtime_version"] = runtime;
  return result;
}

}  // namespace

void bind_cuda(py::module_& m) {
  py::register_exception<cuda::CudaLibraryError>(m, "CudaLibraryError", PyExc_RuntimeError);

  py::class_<cuda::Place>(m, "CudaPlace")
      .def(py::init([](int device, cuda::Address stream, cuda::Address workspace, std::size_t workspace_bytes) {
             return cuda::Place{device, stream, workspace, workspace_bytes};
           }),
           py::arg("device"), py::arg("stream"), py::arg("workspace"), py::arg("workspace_bytes"));

  // All routines release the GIL: the first call on a stream creates handles, which takes long.
  using NoGil = py::call_guard<py::gil_scoped_release>;
  py::class_<Routines>(m, "CudaRoutines")
      .def(py::init([](std::vector<int> majors, std::vector<std::string> folders, bool use_loaded, bool use_system) {
             return std::make_unique<Routines>(
                 std::make_shared<Libraries>(std::move(majors), std::move(folders), use_loaded, use_system));
           }),
           py::arg("majors"), py::arg("folders"), py::arg("use_loaded") = true, py::arg("use_system") = true)
      .def("status", &status)
      .def("symbol_names", [](const Routines& routines) { return routines.libraries().symbol_names(); })
      .def("cublas_handles", &Routines::cublas_handles)
      .def("gemm", &Routines::gemm, NoGil())
      .def("trsm", &Routines::trsm, NoGil())
      .def("geqrf", &Routines::geqrf, NoGil())
      .def("gesvdj", &Routines::gesvdj, NoGil())
      .def("syev", &Routines::syev, NoGil());
}

}  // namespace lowrank
