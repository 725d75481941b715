// What a Python tensor says of itself. The extension knows nothing of torch's C++ ABI: it calls the methods that Python
// code would call, once per tensor and without the lists, integers and loops of Python in between.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <utility>

#include "cpu/common.h"

namespace lowrank {

class TensorMethods {
 public:
  using Two = std::pair<int64_t, int64_t>;

  // torch is imported long before; the references are never given back, so that nothing runs when Python shuts down.
  static const TensorMethods& get() {
    static const TensorMethods* methods = new TensorMethods();
    return *methods;
  }

  void* address(PyObject* tensor) const {
    const pybind11::object value = call(data_ptr_, tensor);
    void* address = PyLong_AsVoidPtr(value.ptr());
    if (address == nullptr && PyErr_Occurred()) throw pybind11::error_already_set();
    return address;
  }

  // The address of something with `elements` elements: fake and distributed tensors answer 0, which must not be read.
  void* data(PyObject* tensor, int64_t elements) const {
    void* p = address(tensor);
    if (p == nullptr && elements > 0)
      throw std::invalid_argument("a tensor without memory (fake, meta or distributed)");
    return p;
  }

  int64_t elements(PyObject* tensor) const { return integer(call(numel_, tensor).ptr()); }

  bool is_contiguous(PyObject* tensor) const { return call(is_contiguous_, tensor).ptr() == Py_True; }

  // Rows and columns of a matrix, or its two strides.
  Two shape(PyObject* tensor) const { return two(call(size_, tensor)); }
  Two strides(PyObject* tensor) const { return two(call(stride_, tensor)); }

 private:
  TensorMethods() {
    const pybind11::object type = pybind11::module_::import("torch").attr("Tensor");
    data_ptr_ = pybind11::object(type.attr("data_ptr")).release().ptr();
    numel_ = pybind11::object(type.attr("numel")).release().ptr();
    is_contiguous_ = pybind11::object(type.attr("is_contiguous")).release().ptr();
    stride_ = pybind11::object(type.attr("stride")).release().ptr();
    size_ = pybind11::object(type.attr("size")).release().ptr();
  }

  static pybind11::object call(PyObject* method, PyObject* tensor) {
    PyObject* result = PyObject_CallOneArg(method, tensor);
    if (result == nullptr) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(result);
  }

  static int64_t integer(PyObject* number) {
    const long long value = PyLong_AsLongLong(number);
    if (value == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
    return value;
  }

  static Two two(const pybind11::object& pair) {
    if (!PyTuple_Check(pair.ptr()) || PyTuple_GET_SIZE(pair.ptr()) != 2)
      throw std::invalid_argument("a tensor that is neither contiguous nor a matrix");
    return {integer(PyTuple_GET_ITEM(pair.ptr(), 0)), integer(PyTuple_GET_ITEM(pair.ptr(), 1))};
  }

  PyObject *data_ptr_, *numel_, *is_contiguous_, *stride_, *size_;
};

}  // namespace lowrank
