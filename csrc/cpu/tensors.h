// What a Python tensor says of itself. The extension knows nothing of torch's C++ ABI: it asks through DLPack's
// exchange table, a C ABI that torch puts on its tensor type since 2.10, and of older ones by the methods that Python
// code would call.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "cpu/common.h"

namespace lowrank {

// As DLPack 1.x lays it out (github.com/dmlc/dlpack, include/dlpack/dlpack.h).
struct DLTensor {
  void* data;
  struct {
    int32_t type, index;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLExchangeTable {
  struct {
    uint32_t major, minor;
  } version;
  DLExchangeTable* previous;
  void *allocate, *managed_from_tensor, *tensor_from_managed;
  int (*describe)(void* tensor, DLTensor* out);  // -1 with a Python error set if it cannot
  void* current_stream;
};

constexpr int kCpu = 1;  // DLPack's number of the device

// What is at an address that has `elements` elements there. Fake and distributed tensors answer 0, which must not be
// read or written. `what`: the operation, where it is known.
template <typename T = void>
T* memory(const char* what, T* address, int64_t elements) {
  if (address == nullptr && elements > 0)
    throw std::invalid_argument((what ? std::string(what) + ": " : std::string()) +
                                "a tensor without memory (fake, meta or distributed)");
  return address;
}
template <typename T = void>
T* memory(const char* what, intptr_t address, int64_t elements) {
  return memory(what, reinterpret_cast<T*>(address), elements);
}

// A strided tensor of at most kDimensions dimensions; nothing is owned.
struct TensorInfo {
  static constexpr int kDimensions = 8;
  void* address = nullptr;
  int dtype = -1;  // of DType, -1 for any other
  int device_type = 0, device_index = 0;
  int ndim = 0;
  int64_t sizes[kDimensions], strides[kDimensions];  // of the first ndim dimensions

  int64_t elements() const {
    int64_t count = 1;
    for (int d = 0; d < ndim; ++d) count *= sizes[d];
    return count;
  }
  bool is_like(const TensorInfo& other) const {
    return dtype == other.dtype && device_type == other.device_type && device_index == other.device_index;
  }
  bool is_contiguous() const {
    int64_t expected = 1;
    for (int d = ndim - 1; d >= 0; --d) {
      if (sizes[d] == 0) return true;
      if (sizes[d] != 1 && strides[d] != expected) return false;
      expected *= sizes[d];
    }
    return true;
  }
  // Of a matrix.
  TensorInfo transposed() const {
    TensorInfo other = *this;
    std::swap(other.sizes[0], other.sizes[1]);
    std::swap(other.strides[0], other.strides[1]);
    return other;
  }
  void* data() const { return memory(nullptr, address, elements()); }
  // As a matrix, or as the transpose of one.
  View matrix(bool transposed) const { return {data(), strides[transposed ? 1 : 0], strides[transposed ? 0 : 1]}; }
  int64_t rows(bool transposed) const { return sizes[transposed ? 1 : 0]; }
  int64_t columns(bool transposed) const { return sizes[transposed ? 0 : 1]; }
};

// Asks the cache for what the third and fourth word of an object that is soon to be read point to: one of them is
// where a tensor's Python object keeps the address of the rest of it. A guess that costs nothing where it is wrong, as
// nothing is read there.
template <int kWords = 4>
LOWRANK_INLINE void prefetch_contents(const PyObject* object) {
  void* words[kWords];
  if (Py_TYPE(object)->tp_basicsize < static_cast<Py_ssize_t>(sizeof(words))) return;
  std::memcpy(words, object, sizeof(words));
  for (int word = 2; word < kWords; ++word) {
    for (int line = 0; line < 3; ++line) prefetch<1>(static_cast<const char*>(words[word]) + kLineBytes * line);
  }
}

class TensorReader {
 public:
  // Made when the module is loaded: it calls Python, which may hand the interpreter to a thread that would wait here.
  // The references are never given back, so that nothing runs when Python shuts down.
  static const TensorReader& get() {
    static const TensorReader* reader = new TensorReader();
    return *reader;
  }

  // Whether it is a tensor that is its own memory: no subclass but Parameter.
  bool is_plain(PyObject* object) const {
    return Py_TYPE(object) == tensor_type_ || Py_TYPE(object) == parameter_type_;
  }

  // Asks the cache for what a tensor's implementation, which is read here, points to: storage, autograd's part,
  // version.
  void prefetch_parts(PyObject* tensor) const {
    if (implementation_word_ == 0 || !is_plain(tensor)) return;
    const void* const parts = implementation(tensor);
    if (parts == nullptr) return;
    void* words[8];
    std::memcpy(words, parts, sizeof(words));
    for (int word = 2; word < 8; ++word) prefetch<1>(words[word]);
  }

  // While the i-th tensor of a list is read.
  void prefetch_after(const PyObject* list, Py_ssize_t i) const {
    constexpr Py_ssize_t kObject = 18, kContents = 12, kParts = 6;
    const Py_ssize_t n = PyList_GET_SIZE(list);
    if (i + kObject < n) prefetch<1>(PyList_GET_ITEM(list, i + kObject));
    if (i + kContents < n) prefetch_contents(PyList_GET_ITEM(list, i + kContents));
    if (i + kParts < n) prefetch_parts(PyList_GET_ITEM(list, i + kParts));
  }

  // False, without a Python error, for what is no strided tensor, or one that stands for the negative of its memory.
  bool try_read(PyObject* tensor, TensorInfo* out) const {
    if ((table_ ? describe(tensor, out) : ask(tensor, out)) && !(may_be_negated(*out) && is_negated(tensor)))
      return true;
    PyErr_Clear();
    return false;
  }

  TensorInfo read(PyObject* tensor) const {
    TensorInfo info;
    if (!try_read(tensor, &info))
      throw std::invalid_argument("not a strided tensor of at most 8 dimensions, or one that is negated lazily");
    return info;
  }

  // .grad; throws what Python would.
  pybind11::object grad(PyObject* tensor) const {
    if (!PyType_IsSubtype(Py_TYPE(tensor), tensor_type_)) throw pybind11::type_error("a parameter that is no tensor");
    PyObject* value = grad_ != nullptr ? grad_->d_getset->get(tensor, grad_->d_getset->closure)
                                       : PyObject_GetAttr(tensor, grad_name_);
    if (value == nullptr) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(value);
  }

 private:
  TensorReader() {
    const pybind11::module_ torch = pybind11::module_::import("torch");
    const pybind11::object type = torch.attr("Tensor");
    tensor_type_ = reinterpret_cast<PyTypeObject*>(keep(type));
    parameter_type_ = reinterpret_cast<PyTypeObject*>(keep(torch.attr("nn").attr("Parameter")));
    grad_name_ = keep(pybind11::str("grad"));
    PyObject* const grad = keep(type.attr("grad"));  // as torch has it now: written in C
    if (Py_TYPE(grad) == &PyGetSetDescr_Type) grad_ = reinterpret_cast<PyGetSetDescrObject*>(grad);
    if (pybind11::hasattr(type, "__dlpack_c_exchange_api__")) {
      const pybind11::object capsule = type.attr("__dlpack_c_exchange_api__");
      table_ = static_cast<const DLExchangeTable*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
      if (table_ == nullptr) PyErr_Clear();
      while (table_ != nullptr && table_->version.major != 1) table_ = table_->previous;
      if (table_ != nullptr && table_->describe == nullptr) table_ = nullptr;
    }
    const char* const names[] = {"float32", "float64", "bfloat16", "float16"};  // as in DType
    for (int i = 0; i < 4; ++i) dtypes_[i] = keep(torch.attr(names[i]));
    data_ptr_ = keep(type.attr("data_ptr"));
    size_ = keep(type.attr("size"));
    stride_ = keep(type.attr("stride"));
    get_device_ = keep(type.attr("get_device"));
    is_neg_ = keep(type.attr("is_neg"));
    dtype_name_ = keep(pybind11::str("dtype"));
    is_meta_name_ = keep(pybind11::str("is_meta"));
    find_implementation(torch);
  }

  // Which word of a tensor's Python object is the address of its implementation: that right behind which the sizes are.
  void find_implementation(const pybind11::module_& torch) {
    const pybind11::object tensor = torch.attr("empty")(2, 3);
    DLTensor found;
    if (table_ == nullptr || !is_plain(tensor.ptr())) return;
    if (table_->describe(tensor.ptr(), &found) != 0) return PyErr_Clear();
    for (int word : {2, 3}) {
      implementation_word_ = word;
      const intptr_t distance =
          reinterpret_cast<intptr_t>(found.shape) - reinterpret_cast<intptr_t>(implementation(tensor.ptr()));
      if (distance >= 64 && distance < 256) return;
    }
    implementation_word_ = 0;
  }
  const void* implementation(PyObject* tensor) const {
    void* words[4];
    std::memcpy(words, tensor, sizeof(words));
    return words[implementation_word_];
  }

  // The imaginary part of a conjugated tensor is a view of every other number with their signs to be changed
  // (Tensor.is_neg()): it has no dimension of unit stride.
  static bool may_be_negated(const TensorInfo& info) {
    for (int d = 0; d < info.ndim; ++d)
      if (info.strides[d] == 1 && info.sizes[d] > 1) return false;
    return true;
  }
  bool is_negated(PyObject* tensor) const {
    const auto answer = pybind11::reinterpret_steal<pybind11::object>(PyObject_CallOneArg(is_neg_, tensor));
    return answer.ptr() != Py_False;
  }

  static PyObject* keep(const pybind11::object& object) { return pybind11::object(object).release().ptr(); }

  bool describe(PyObject* tensor, TensorInfo* out) const {
    DLTensor found;
    if (!PyType_IsSubtype(Py_TYPE(tensor), tensor_type_) || table_->describe(tensor, &found) != 0) return false;
    if (found.ndim > TensorInfo::kDimensions) return false;
    constexpr uint8_t kFloat = 2, kBfloat = 4;
    const auto is = [&](uint8_t code, int bits) { return found.dtype.code == code && found.dtype.bits == bits; };
    out->dtype = is(kFloat, 32) ? 0 : is(kFloat, 64) ? 1 : is(kBfloat, 16) ? 2 : is(kFloat, 16) ? 3 : -1;
    out->address = static_cast<char*>(found.data) + found.byte_offset;
    out->device_type = found.device.type;
    out->device_index = found.device.index;
    out->ndim = found.ndim;
    for (int d = 0; d < found.ndim; ++d) {
      out->sizes[d] = found.shape[d];
      out->strides[d] = found.strides[d];
    }
    return true;
  }

  bool ask(PyObject* tensor, TensorInfo* out) const {
    if (!PyType_IsSubtype(Py_TYPE(tensor), tensor_type_)) return false;
    // Python is not called again once it has reported an error.
    const auto call = [&](PyObject* method, pybind11::object* result) {
      *result = pybind11::reinterpret_steal<pybind11::object>(PyObject_CallOneArg(method, tensor));
      return static_cast<bool>(*result);
    };
    const auto attribute = [&](PyObject* name, pybind11::object* result) {
      *result = pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttr(tensor, name));
      return static_cast<bool>(*result);
    };
    pybind11::object address, sizes, strides, device, dtype, meta;
    if (!call(data_ptr_, &address) || !call(size_, &sizes) || !call(stride_, &strides) || !call(get_device_, &device) ||
        !attribute(dtype_name_, &dtype) || !attribute(is_meta_name_, &meta) || meta.ptr() == Py_True)
      return false;
    out->ndim = static_cast<int>(PyTuple_GET_SIZE(sizes.ptr()));
    if (out->ndim > TensorInfo::kDimensions) return false;
    for (int d = 0; d < out->ndim; ++d) {
      out->sizes[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes.ptr(), d));
      out->strides[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), d));
    }
    out->dtype = -1;
    for (int i = 0; i < 4; ++i)
      if (dtype.ptr() == dtypes_[i]) out->dtype = i;
    out->address = PyLong_AsVoidPtr(address.ptr());
    out->device_index = static_cast<int>(PyLong_AsLongLong(device.ptr()));
    out->device_type = out->device_index < 0 ? kCpu : 2;
    return !PyErr_Occurred();
  }

  const DLExchangeTable* table_ = nullptr;
  int implementation_word_ = 0;  // 0: not known
  PyTypeObject *tensor_type_, *parameter_type_;
  PyGetSetDescrObject* grad_ = nullptr;
  PyObject *grad_name_, *data_ptr_, *size_, *stride_, *get_device_, *is_neg_, *dtype_name_, *is_meta_name_, *dtypes_[4];
};

}  // namespace lowrank
