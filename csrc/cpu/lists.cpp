// What an optimizer's step asks of many tensors at once; lowrank_kernels/backends/lists.py says it in Python.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/layouts.h"
#include "cpu/tensors.h"

namespace py = pybind11;

namespace lowrank {
namespace {

PyObject* item(const py::list& list, Py_ssize_t i) { return PyList_GET_ITEM(list.ptr(), i); }
Py_ssize_t length(const py::list& list) { return PyList_GET_SIZE(list.ptr()); }
PyObject* item_at(const py::list& list, PyObject* index) {
  const Py_ssize_t i = PyLong_AsSsize_t(index);
  if (i < 0 || i >= length(list)) throw py::index_error();
  return item(list, i);
}

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
    reader.prefetch_after(tensors.ptr(), i);
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

// Where matrices lie; None if they are not plain and alike matrices.
py::object matrix_layout(const py::list& tensors, int64_t transposed) {
  const TensorReader& reader = TensorReader::get();
  auto layout = std::make_unique<MatrixLayout>();
  layout->entries.reserve(static_cast<size_t>(length(tensors)));
  TensorInfo info;
  for (Py_ssize_t i = 0; i < length(tensors); ++i) {
    reader.prefetch_after(tensors.ptr(), i);
    PyObject* const tensor = item(tensors, i);
    if (!reader.is_plain(tensor) || !reader.try_read(tensor, &info) || info.dtype < 0 || info.ndim != 2 ||
        !(i == 0 || info.is_like(layout->like)))
      return py::none();
    layout->add(info, i < transposed);
  }
  return py::cast(std::move(layout));
}

// Copies contiguous tensors on the CPU, one by one; false, and nothing is copied, if these are not that, or do not fit.
bool copy(const py::list& targets, const py::list& sources) {
  struct Part {
    void* to;
    const void* from;
    size_t bytes;
  };
  const TensorReader& reader = TensorReader::get();
  if (length(targets) != length(sources)) return false;
  std::vector<Part> parts;
  parts.reserve(static_cast<size_t>(length(targets)));
  TensorInfo to, from;
  for (Py_ssize_t i = 0; i < length(targets); ++i) {
    reader.prefetch_after(targets.ptr(), i);
    reader.prefetch_after(sources.ptr(), i);
    if (!reader.is_plain(item(targets, i)) || !reader.is_plain(item(sources, i)) ||
        !reader.try_read(item(targets, i), &to) || !reader.try_read(item(sources, i), &from) || to.dtype < 0 ||
        to.device_type != kCpu || !to.is_like(from) || to.ndim != from.ndim ||
        !std::equal(to.sizes, to.sizes + to.ndim, from.sizes) || !to.is_contiguous() || !from.is_contiguous())
      return false;
    parts.push_back(
        {to.data(), from.data(), static_cast<size_t>(to.elements() * element_size(static_cast<DType>(to.dtype)))});
  }
  for (const Part& part : parts)
    if (part.bytes > 0) std::memcpy(part.to, part.from, part.bytes);
  return true;
}

// Which two of n tensors share memory, as their indices; (i, i): several elements of one tensor are the same (it is
// expanded). None if there are none. Views with gaps are not held against others: columns of one matrix may interleave.
// read(i, &info): what is known of a tensor, or false.
template <class Read>
py::object first_sharing(Py_ssize_t n, const Read& read) {
  struct Range {
    const char *begin, *end;
    Py_ssize_t index;
  };
  std::vector<Range> ranges;
  ranges.reserve(static_cast<size_t>(n));
  TensorInfo info;
  for (Py_ssize_t i = 0; i < n; ++i) {
    if (!read(i, &info) || info.dtype < 0 || info.elements() == 0) continue;
    for (int d = 0; d < info.ndim; ++d)
      if (info.strides[d] == 0 && info.sizes[d] > 1) return py::make_tuple(i, i);
    if (info.address == nullptr || !(info.is_contiguous() || (info.ndim == 2 && info.transposed().is_contiguous())))
      continue;
    const char* const begin = static_cast<const char*>(info.address);
    ranges.push_back({begin, begin + info.elements() * element_size(static_cast<DType>(info.dtype)), i});
  }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < ranges.size(); ++i) {
    const auto [first, second] = std::minmax(ranges[i - 1].index, ranges[i].index);
    if (ranges[i].begin < ranges[i - 1].end) return py::make_tuple(first, second);
  }
  return py::none();
}

py::object sharing(const py::list& tensors) {
  const TensorReader& reader = TensorReader::get();
  return first_sharing(length(tensors),
                       [&](Py_ssize_t i, TensorInfo* info) { return reader.try_read(item(tensors, i), info); });
}
py::object sharing_of_layout(const MatrixLayout& matrices) {
  return first_sharing(static_cast<Py_ssize_t>(matrices.entries.size()), [&](Py_ssize_t i, TensorInfo* info) {
    const MatrixLayout::Entry& entry = matrices.entries[static_cast<size_t>(i)];
    *info = matrices.like;
    info->address = entry.view.data;
    info->ndim = 2;
    info->sizes[0] = entry.rows, info->sizes[1] = entry.columns;
    info->strides[0] = entry.view.row_stride, info->strides[1] = entry.view.column_stride;
    return true;
  });
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

// The values of a dictionary, key by key.
class StateReader {
 public:
  explicit StateReader(const py::dict& state) : state_(state) {}
  // Throws KeyError.
  PyObject* operator()(PyObject* param) {
    PyObject* const value = find(param);
    if (value == nullptr) {
      PyErr_SetObject(PyExc_KeyError, param);
      throw py::error_already_set();
    }
    return value;
  }
  // Null if there is none.
  PyObject* find(PyObject* param) {
    // States are mostly in the order of the parameters, the As and Bs in turn, and hashing a tensor calls Python.
    PyObject *key = nullptr, *value = nullptr;
    for (int tries = 0; tries < 2; ++tries) {
      if (PyDict_Next(state_.ptr(), &position_, &key, &value) && key == param) return value;
    }
    value = PyDict_GetItemWithError(state_.ptr(), param);
    if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

 private:
  const py::dict& state_;
  Py_ssize_t position_ = 0;
};

py::list states(const py::dict& state, const py::list& params) {
  py::list found;
  StateReader state_of(state);
  for (Py_ssize_t i = 0; i < length(params); ++i) found.append(py::handle(state_of(item(params, i))));
  return found;
}

// Whether each parameter of some groups has a state, and one that is not empty unless that may be.
bool complete(const py::dict& state, const py::list& groups, bool may_be_empty) {
  StateReader state_of(state);
  for (Py_ssize_t g = 0; g < length(groups); ++g) {
    const py::list params = groups[static_cast<size_t>(g)];
    if (PyDict_GET_SIZE(state.ptr()) < length(params)) return false;
    for (Py_ssize_t i = 0; i < length(params); ++i) {
      PyObject* const found = state_of.find(item(params, i));
      if (found == nullptr || !PyDict_Check(found) || (!may_be_empty && PyDict_GET_SIZE(found) == 0)) return false;
    }
  }
  return true;
}

// What stands under a key of a state; null if nothing does.
PyObject* entry_of(PyObject* state, const py::str& key) {
  if (!PyDict_Check(state)) throw py::type_error("states must be dictionaries");
  PyObject* const value = PyDict_GetItemWithError(state, key.ptr());
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

py::list column(const py::list& states, const py::str& key) {
  py::list found;
  for (Py_ssize_t i = 0; i < length(states); ++i) {
    if (PyObject* const value = entry_of(item(states, i), key)) found.append(py::handle(value));
  }
  return found;
}

// Whether the state of each of some parameters holds, under a key, this very value.
bool holds(const py::dict& state, const py::list& params, const py::list& indices, const py::str& key,
           const py::list& values) {
  if (length(indices) != length(values)) return false;
  StateReader state_of(state);
  for (Py_ssize_t i = 0; i < length(indices); ++i) {
    if (entry_of(state_of(item_at(params, item(indices, i))), key) != item(values, i)) return false;
  }
  return true;
}

// Of some parameters all that a moment step needs, each looked at once: those that have a gradient, the gradients,
// those that have none, the moments of the former, and where all that lies, or None if compiled code cannot go by it.
py::tuple gather(const py::list& params, const py::list& indices, const py::dict& state, const py::str& exp_avg,
                 const py::str& exp_avg_sq) {
  const TensorReader& reader = TensorReader::get();
  py::list members, stepped, grads, idle, exp_avgs, exp_avg_sqs;
  StateReader state_of(state);
  auto layout = std::make_unique<StepLayout>();
  layout->entries.reserve(static_cast<size_t>(length(indices)));
  // A few parameters at a time, so that memory has answered for one of them when the others have been asked for.
  constexpr Py_ssize_t kAtATime = 16;
  struct Found {
    PyObject *index, *param, *state, *m, *v;
    py::object grad;
  } found[kAtATime];
  TensorInfo param_info, grad_info, m_info, v_info;
  bool fits = true;
  for (Py_ssize_t begin = 0; begin < length(indices); begin += kAtATime) {
    const Py_ssize_t count = std::min(kAtATime, length(indices) - begin);
    for (Py_ssize_t i = 0; i < count; ++i) {
      found[i].index = item(indices, begin + i);
      prefetch<1>(found[i].param = item_at(params, found[i].index));
    }
    for (Py_ssize_t i = 0; i < count; ++i) prefetch_contents(found[i].param);
    for (Py_ssize_t i = 0; i < count; ++i) reader.prefetch_parts(found[i].param);
    for (Py_ssize_t i = 0; i < count; ++i) {
      prefetch<1>((found[i].grad = reader.grad(found[i].param)).ptr());
      if (!found[i].grad.is_none()) prefetch<1>(found[i].state = state_of(found[i].param));
    }
    for (Py_ssize_t i = 0; i < count; ++i) {
      if (found[i].grad.is_none()) continue;
      prefetch_contents(found[i].grad.ptr());
      prefetch_contents<6>(found[i].state);
    }
    for (Py_ssize_t i = 0; i < count; ++i) {
      if (found[i].grad.is_none()) continue;
      if ((found[i].m = entry_of(found[i].state, exp_avg))) prefetch<1>(found[i].m);
      if ((found[i].v = entry_of(found[i].state, exp_avg_sq))) prefetch<1>(found[i].v);
      reader.prefetch_parts(found[i].grad.ptr());
    }
    for (Py_ssize_t i = 0; i < count; ++i) {
      if (found[i].grad.is_none()) continue;
      for (PyObject* moment : {found[i].m, found[i].v})
        if (moment) prefetch_contents(moment);
    }
    for (Py_ssize_t i = 0; i < count; ++i) {
      if (found[i].grad.is_none()) continue;
      for (PyObject* moment : {found[i].m, found[i].v})
        if (moment) reader.prefetch_parts(moment);
    }
    for (Py_ssize_t i = 0; i < count; ++i) {
      const auto& [index, param, state, m, v, grad] = found[i];
      if (grad.is_none()) {
        idle.append(py::handle(index));
        continue;
      }
      members.append(py::handle(index));
      stepped.append(py::handle(param));
      grads.append(grad);
      if (m) exp_avgs.append(py::handle(m));
      if (v) exp_avg_sqs.append(py::handle(v));
      const auto read = [&](PyObject* tensor, TensorInfo* info) {
        return tensor == nullptr || (reader.is_plain(tensor) && reader.try_read(tensor, info));
      };
      fits = fits && read(param, &param_info) && read(grad.ptr(), &grad_info) && read(m, &m_info) && read(v, &v_info) &&
             layout->add(param_info, grad_info, m ? &m_info : nullptr, v ? &v_info : nullptr);
    }
  }
  const auto all_or_none = [&](const py::list& moments) { return moments.empty() || moments.size() == stepped.size(); };
  py::object known = py::none();
  if (fits && !layout->entries.empty() && all_or_none(exp_avgs) && all_or_none(exp_avg_sqs))
    known = py::cast(std::move(layout));
  return py::make_tuple(members, stepped, grads, idle, exp_avgs, exp_avg_sqs, known);
}

// The first of some parameters that has a sparse gradient; None if there is none.
py::object first_sparse_gradient(const py::list& params, const py::list& indices) {
  const TensorReader& reader = TensorReader::get();
  TensorInfo info;
  for (Py_ssize_t i = 0; i < length(indices); ++i) {
    const py::object grad = reader.grad(item_at(params, item(indices, i)));
    if (!grad.is_none() && !reader.try_read(grad.ptr(), &info) && grad.attr("is_sparse").cast<bool>())
      return py::reinterpret_borrow<py::object>(item(indices, i));
  }
  return py::none();
}

}  // namespace

void bind_lists(py::module_& m) {
  py::class_<MatrixLayout>(m, "MatrixLayout", "Where the matrices of a list lie.")
      .def_property_readonly("columns", &MatrixLayout::columns, "What all have; -1 if they differ.")
      .def_property_readonly("tall", &MatrixLayout::tall, "Whether no matrix has more columns than rows.")
      .def("fits", &MatrixLayout::fits, "Whether another list has the same dtype, device and sizes.");
  m.def("plain", &plain, "Whether all tensors of a list are their own memory: no subclass but Parameter.");
  m.def("signature", &signature, py::arg("tensors"), py::arg("transposed") = 0,
        "dtype, device and sizes of all tensors of a list; None if one is not plain and strided.");
  m.def("sizes", &sizes, "One dimension of all matrices of a list; None if one is no plain matrix.");
  m.def("copy", &copy, "Copies a list of contiguous tensors into another; false if they are not that.");
  m.def("sharing", &sharing, "Two tensors of a list that share memory, as their indices; None if there are none.");
  m.def("sharing", &sharing_of_layout, "The same of matrices whose layout is known.");
  m.def("consecutive", &consecutive, "Whether the tensors of a list lie one behind the other, each contiguous.");
  m.def("alike", &alike, "Whether all tensors of a list are plain and of one dtype, device and number of dimensions.");
  m.def("held", &held, "What stands under some keys of some dictionaries of objects known by weak references.");
  m.def("first_sparse_gradient", &first_sparse_gradient, "The first of some parameters that has a sparse gradient.");
  m.def("matrix_layout", &matrix_layout, "Where plain and alike matrices lie; None if they are not that.");
  py::class_<StepLayout>(m, "StepLayout", "Where the tensors of a moment step lie; for adamw().")
      .def("matrices", &StepLayout::matrices, py::arg("grads"), py::arg("transposed"),
           "The layout of the parameters, or of their gradients; None if one is no matrix.");
  m.def("gather", &gather,
        "Those of some parameters that have a gradient, the gradients, those that have none, the moments, the layout.");
  m.def("holds", &holds, "Whether the states of some parameters hold these very values under a key.");
  m.def("complete", &complete, "Whether each parameter of some groups has a state.");
  m.def("states", &states, "The values of a dictionary for a list of parameters.");
  m.def("column", &column, "The values under a key, of those dictionaries of a list that have it.");
}

}  // namespace lowrank
