// What an optimizer's step asks of many tensors at once; lowrank_kernels/backends/lists.py says it in Python.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/tensors.h"

namespace py = pybind11;

namespace lowrank {
namespace {

PyObject* item(const py::list& list, Py_ssize_t i) { return PyList_GET_ITEM(list.ptr(), i); }
Py_ssize_t length(const py::list& list) { return PyList_GET_SIZE(list.ptr()); }

bool plain(const py::list& tensors) {
  const TensorReader& reader = TensorReader::get();
  for (Py_ssize_t i = 0; i < length(tensors); ++i)
    if (!reader.is_plain(item(tensors, i))) return false;
  return true;
}

// dtype, device and sizes of each tensor; None if one is not plain, strided and of one of our dtypes.
py::object signature(const py::list& tensors, int64_t transposed) {
  const TensorReader& reader = TensorReader::get();
  std::vector<int64_t> numbers;
  numbers.reserve(static_cast<size_t>(3 * length(tensors)));
  TensorInfo info;
  for (Py_ssize_t i = 0; i < length(tensors); ++i) {
    reader.fetch_ahead(tensors.ptr(), i);
    PyObject* const tensor = item(tensors, i);
    if (!reader.is_plain(tensor) || !reader.try_read(tensor, &info) || info.dtype < 0) return py::none();
    if (i < transposed && info.ndim != 2) return py::none();
    numbers.push_back(info.dtype | info.ndim << 8 | info.device_type << 16 |
                      static_cast<int64_t>(info.device_index) << 32);
    if (i < transposed) std::swap(info.sizes[0], info.sizes[1]);
    numbers.insert(numbers.end(), info.sizes, info.sizes + info.ndim);
  }
  return py::bytes(reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(int64_t));
}

// One dimension of each matrix; None if one is no plain matrix.
py::object sizes(const py::list& tensors, int64_t transposed, int dim) {
  const TensorReader& reader = TensorReader::get();
  py::list found(static_cast<size_t>(length(tensors)));
  TensorInfo info;
  for (Py_ssize_t i = 0; i < length(tensors); ++i) {
    PyObject* const tensor = item(tensors, i);
    if (!reader.is_plain(tensor) || !reader.try_read(tensor, &info) || info.ndim != 2) return py::none();
    const int64_t size = dim == 0 ? info.rows(i < transposed) : info.columns(i < transposed);
    PyList_SET_ITEM(found.ptr(), i, py::int_(size).release().ptr());
  }
  return std::move(found);
}

// Whether each tensor is contiguous and begins where the one before it ends.
bool consecutive(const py::list& tensors) {
  const TensorReader& reader = TensorReader::get();
  const char* next = nullptr;
  TensorInfo info;
  for (Py_ssize_t i = 0; i < length(tensors); ++i) {
    if (!reader.try_read(item(tensors, i), &info) || info.dtype < 0 || !info.is_contiguous()) return false;
    const char* const begin = static_cast<const char*>(info.address);
    if (i > 0 && begin != next) return false;
    next = begin + info.elements() * element_size(static_cast<DType>(info.dtype));
  }
  return true;
}

bool alike(const py::list& tensors, const py::object& like, int ndim) {
  const TensorReader& reader = TensorReader::get();
  if (length(tensors) == 0) return true;
  TensorInfo first, info;
  PyObject* const model = like.is_none() ? item(tensors, 0) : like.ptr();
  if (!reader.is_plain(model) || !reader.try_read(model, &first) || first.dtype < 0) return false;
  for (Py_ssize_t i = 0; i < length(tensors); ++i) {
    PyObject* const tensor = item(tensors, i);
    if (!reader.is_plain(tensor) || !reader.try_read(tensor, &info) || !info.is_like(first) ||
        (ndim >= 0 && info.ndim != ndim))
      return false;
  }
  return true;
}

// As alike(params), and each of `others` has the dtype, device and sizes of its parameter.
bool match(const py::list& params, const py::list& others) {
  const TensorReader& reader = TensorReader::get();
  if (length(params) != length(others)) return false;
  TensorInfo first, param, other;
  for (Py_ssize_t i = 0; i < length(params); ++i) {
    reader.fetch_ahead(params.ptr(), i);
    reader.fetch_ahead(others.ptr(), i);
    PyObject *const a = item(params, i), *const b = item(others, i);
    if (!reader.is_plain(a) || !reader.is_plain(b) || !reader.try_read(a, &param) || !reader.try_read(b, &other))
      return false;
    if (i == 0) first = param;
    if (param.dtype < 0 || !param.is_like(first) || !other.is_like(first) || other.ndim != param.ndim ||
        !std::equal(param.sizes, param.sizes + param.ndim, other.sizes))
      return false;
  }
  return true;
}

// Whether each of `others`, if there are any, is plain, of that dtype, and has as many elements as its parameter.
bool sized(const py::list& params, const py::list& others, int dtype) {
  const TensorReader& reader = TensorReader::get();
  if (length(others) == 0) return true;
  if (length(params) != length(others)) return false;
  TensorInfo param, other;
  for (Py_ssize_t i = 0; i < length(params); ++i) {
    reader.fetch_ahead(others.ptr(), i);
    PyObject* const b = item(others, i);
    if (!reader.is_plain(b) || !reader.try_read(item(params, i), &param) || !reader.try_read(b, &other) ||
        other.dtype != dtype || other.elements() != param.elements())
      return false;
  }
  return true;
}

// What objects, known by weak references, hold: for each (attribute, key), what stands in that dictionary of each of
// them under that key. None if an object is gone or holds no such thing.
py::object held(const py::list& references, const py::tuple& wanted) {
  const Py_ssize_t n = length(references), columns = PyTuple_GET_SIZE(wanted.ptr());
  std::vector<std::pair<PyObject*, PyObject*>> names;
  std::vector<py::list> found;
  for (Py_ssize_t k = 0; k < columns; ++k) {
    const py::tuple name = wanted[static_cast<size_t>(k)];
    names.emplace_back(PyTuple_GET_ITEM(name.ptr(), 0), PyTuple_GET_ITEM(name.ptr(), 1));
    found.emplace_back();
  }
  for (Py_ssize_t i = 0; i < n; ++i) {
    const auto owner = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(item(references, i)));
    if (!owner) throw py::error_already_set();
    if (owner.is_none()) return py::none();
    py::object dictionary;
    for (Py_ssize_t k = 0; k < columns; ++k) {
      if (k == 0 || names[k].first != names[k - 1].first)
        dictionary = py::reinterpret_steal<py::object>(PyObject_GetAttr(owner.ptr(), names[k].first));
      if (!dictionary) throw py::error_already_set();
      if (!PyDict_Check(dictionary.ptr())) return py::none();
      PyObject* const value = PyDict_GetItemWithError(dictionary.ptr(), names[k].second);
      if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
      if (value == nullptr || value == Py_None) return py::none();
      found[k].append(py::handle(value));
    }
  }
  py::tuple result(static_cast<size_t>(columns));
  for (Py_ssize_t k = 0; k < columns; ++k) PyTuple_SET_ITEM(result.ptr(), k, found[k].release().ptr());
  return std::move(result);
}

py::tuple gradients(const py::list& params, const py::list& indices) {
  const TensorReader& reader = TensorReader::get();
  py::list members, stepped, grads, idle;
  for (Py_ssize_t i = 0; i < length(indices); ++i) {
    const Py_ssize_t index = PyLong_AsSsize_t(item(indices, i));
    if (index < 0 || index >= length(params)) throw py::index_error();
    const py::object param = py::reinterpret_borrow<py::object>(item(params, index)), grad = reader.grad(param.ptr());
    if (grad.is_none()) {
      idle.append(py::handle(item(indices, i)));
    } else {
      members.append(py::handle(item(indices, i)));
      stepped.append(param);
      grads.append(grad);
    }
  }
  return py::make_tuple(members, stepped, grads, idle);
}

py::list states(const py::dict& state, const py::list& params) {
  py::list found;
  PyObject *key = nullptr, *value = nullptr;
  Py_ssize_t position = 0;
  for (Py_ssize_t i = 0; i < length(params); ++i) {
    PyObject* const param = item(params, i);
    // States are mostly in the order of the parameters, the As and Bs in turn, and hashing a tensor calls Python.
    bool next = false;
    for (int tries = 0; tries < 2 && !next; ++tries) {
      next = PyDict_Next(state.ptr(), &position, &key, &value) && key == param;
    }
    if (!next) {
      value = PyDict_GetItemWithError(state.ptr(), param);
      if (value == nullptr) {
        if (!PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, param);
        throw py::error_already_set();
      }
    }
    found.append(py::handle(value));
  }
  return found;
}

py::list column(const py::list& states, const py::str& key) {
  py::list found;
  for (Py_ssize_t i = 0; i < length(states); ++i) {
    if (!PyDict_Check(item(states, i))) throw py::type_error("states must be dictionaries");
    PyObject* const value = PyDict_GetItemWithError(item(states, i), key.ptr());
    if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
    if (value != nullptr) found.append(py::handle(value));
  }
  return found;
}

}  // namespace

void bind_lists(py::module_& m) {
  m.def("plain", &plain, "Whether all tensors of a list are their own memory: no subclass but Parameter.");
  m.def("signature", &signature, py::arg("tensors"), py::arg("transposed") = 0,
        "dtype, device and sizes of all tensors of a list; None if one is not plain and strided.");
  m.def("sizes", &sizes, "One dimension of all matrices of a list; None if one is no plain matrix.");
  m.def("consecutive", &consecutive, "Whether the tensors of a list lie one behind the other, each contiguous.");
  m.def("alike", &alike, "Whether all tensors of a list are plain and of one dtype, device and number of dimensions.");
  m.def("sized", &sized, "Whether all tensors of the second list have a dtype, and the sizes of the first list's.");
  m.def("match", &match, "Whether all tensors of two lists are alike, and equal in shape pair by pair.");
  m.def("held", &held, "What stands under some keys of some dictionaries of objects known by weak references.");
  m.def("gradients", &gradients,
        "Those of some parameters that have a gradient, the gradients, and those that have none.");
  m.def("states", &states, "The values of a dictionary for a list of parameters.");
  m.def("column", &column, "The values under a key, of those dictionaries of a list that have it.");
}

}  // namespace lowrank
