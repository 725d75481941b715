// What the CPU code offers to Python. Tensors come as lists, read here (tensors.h), or as tables: int64 buffers
// (array.array("q")), one section of n numbers per column.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/grouped.h"
#include "cpu/kernels.h"
#include "cpu/layouts.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/sizes.h"
#include "cpu/tensors.h"

namespace py = pybind11;

namespace lowrank {
namespace {

// A table of `columns` sections; it keeps the buffer locked while it lives.
class Table {
 public:
  Table(const char* what, const py::buffer& buffer, int64_t columns, int64_t n)
      : what_(what), info_(buffer.request()), n_(n) {
    if (info_.itemsize != 8 || info_.ndim != 1 || info_.strides[0] != 8 || info_.size != columns * n) {
      throw std::invalid_argument(std::string(what) + ": the table must be a dense int64 buffer of " +
                                  std::to_string(columns) + " sections of " + std::to_string(n));
    }
  }
  int64_t at(int64_t column, int64_t i) const { return static_cast<const int64_t*>(info_.ptr)[column * n_ + i]; }
  // What has `elements` elements and is there.
  void* data(int64_t column, int64_t i, int64_t elements) const {
    return memory(what_, static_cast<intptr_t>(at(column, i)), elements);
  }

 private:
  const char* what_;
  py::buffer_info info_;
  int64_t n_;
};

DType dtype_of(int code) {
  if (code < 0 || code > 3) throw std::invalid_argument("unknown dtype code");
  return static_cast<DType>(code);
}

void check_rank(int64_t r) {
  if (r < 0 || r > kMaxRank) throw std::invalid_argument("the rank must be at most " + std::to_string(kMaxRank));
}

// Matrices of `columns` columns: a list of tensors, of which the first `transposed` are stored as their transposes, or
// one stacked tensor (n, rows, columns), of which all or none are; or such a list as it was read before.
class Matrices {
 public:
  Matrices(const char* what, const py::handle& tensors, int64_t transposed) : layout_(&own_) {
    const TensorReader& reader = TensorReader::get();
    if (PyList_Check(tensors.ptr())) {
      own_.entries.reserve(static_cast<size_t>(PyList_GET_SIZE(tensors.ptr())));
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tensors.ptr()); ++i) {
        reader.prefetch_after(tensors.ptr(), i);
        const TensorInfo info = reader.read(PyList_GET_ITEM(tensors.ptr(), i));
        if (info.ndim != 2) throw std::invalid_argument(std::string(what) + ": a tensor that is no matrix");
        own_.add(info, i < transposed);
      }
      return;
    }
    TensorInfo one = reader.read(tensors.ptr());
    if (one.ndim != 3) throw std::invalid_argument(std::string(what) + ": a stack must have 3 dimensions");
    const int64_t count = one.sizes[0], step = one.strides[0] * element_size(dtype_of(one.dtype));
    one.ndim = 2;
    for (int d = 0; d < 2; ++d) one.sizes[d] = one.sizes[d + 1], one.strides[d] = one.strides[d + 1];
    one.address = one.data();
    for (int64_t i = 0; i < count; ++i) {
      own_.add(one, i < transposed);
      one.address = static_cast<char*>(one.address) + step;
    }
  }
  Matrices(const char* what, const py::handle& tensors, int64_t transposed, const MatrixLayout* known)
      : Matrices(what, known ? py::object(py::list()) : py::reinterpret_borrow<py::object>(tensors), transposed) {
    if (known && static_cast<Py_ssize_t>(known->entries.size()) != PyObject_Size(tensors.ptr()))
      throw std::invalid_argument(std::string(what) + ": a layout of another list");
    if (known) layout_ = known;
  }
  Matrices(const Matrices&) = delete;
  Matrices& operator=(const Matrices&) = delete;

  int64_t size() const { return static_cast<int64_t>(layout_->entries.size()); }
  const TensorInfo& like() const { return layout_->like; }
  int64_t rows(int64_t i) const { return layout_->entries[i].rows; }
  // The i-th one, which must have this shape.
  View view(const char* what, int64_t i, int64_t rows, int64_t columns) const {
    const MatrixLayout::Entry& entry = layout_->entries[i];
    if (entry.rows != rows || entry.columns != columns)
      throw std::invalid_argument(std::string(what) + ": matrices that do not fit each other");
    return entry.view;
  }

 private:
  MatrixLayout own_;
  const MatrixLayout* layout_;
};

void check_sizes(const char* what, bool fit) {
  if (!fit) throw std::invalid_argument(std::string(what) + ": lists of different lengths");
}

// The first tensor that is neither contiguous nor a matrix, or that cannot be read; -1 if there is none.
int64_t first_irregular(const py::list& tensors) {
  const TensorReader& reader = TensorReader::get();
  TensorInfo info;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!reader.try_read(PyList_GET_ITEM(tensors.ptr(), i), &info) || !(info.ndim == 2 || info.is_contiguous()))
      return static_cast<int64_t>(i);
  }
  return -1;
}

// The layout of lists that the caller has checked (moments may be missing); throws where compiled code cannot take
// them.
StepLayout layout_of(const py::list& params, const py::list& grads, const py::list& exp_avgs,
                     const py::list& exp_avg_sqs) {
  const TensorReader& reader = TensorReader::get();
  const auto item_of = [](const py::list& list, size_t i) { return PyList_GET_ITEM(list.ptr(), i); };
  StepLayout layout;
  layout.entries.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    TensorInfo m, v;
    if (!exp_avgs.empty()) m = reader.read(item_of(exp_avgs, i));
    if (!exp_avg_sqs.empty()) v = reader.read(item_of(exp_avg_sqs, i));
    if (!layout.add(reader.read(item_of(params, i)), reader.read(item_of(grads, i)), exp_avgs.empty() ? nullptr : &m,
                    exp_avg_sqs.empty() ? nullptr : &v))
      throw std::invalid_argument("grouped_adamw: tensors that do not fit each other");
  }
  return layout;
}

// Params, grads and moments (or empty lists), or what was read of these very lists before, or null.
class StepLists {
 public:
  StepLists(const py::list& params, const py::list& grads, const py::list& exp_avgs, const py::list& exp_avg_sqs,
            const StepLayout* known)
      : layout_(known ? known : &own_) {
    for (const py::list* list : {&grads, &exp_avgs, &exp_avg_sqs}) check_length(params, *list, list != &grads);
    if (known == nullptr) own_ = layout_of(params, grads, exp_avgs, exp_avg_sqs);
    if (layout_->entries.size() != params.size()) throw std::invalid_argument("grouped_adamw: a layout of other lists");
  }
  StepLists(const StepLists&) = delete;
  StepLists& operator=(const StepLists&) = delete;

  static void check_length(const py::list& params, const py::list& list, bool may_be_empty) {
    if (list.size() != params.size() && !(may_be_empty && list.empty()))
      throw std::invalid_argument("grouped_adamw: lists of different lengths");
  }
  const StepLayout& layout() const { return *layout_; }

 private:
  StepLayout own_;
  const StepLayout* layout_;
};

// Without maps: rows of numbers where they are contiguous. `missed` steps and `rank_dims`, which dimension is r, are
// lists of int, or empty; with maps of rank r all are matrices.
std::vector<AdamWItem> step_items(const AdamWScalars& scalars, const StepLayout& layout, const py::list& missed,
                                  const py::list& rank_dims, double step, bool bias_correction, bool mapped,
                                  int64_t r) {
  const auto number = [&](const py::list& list, size_t i) -> long long {
    if (list.empty()) return 0;
    const long long value = PyLong_AsLongLong(PyList_GET_ITEM(list.ptr(), i));
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  };
  std::vector<AdamWItem> items(layout.entries.size());
  double steps_known = -1, correction1 = 1, correction2 = 1;
  for (size_t i = 0; i < items.size(); ++i) {
    AdamWItem& item = items[i];
    const StepEntry& entry = layout.entries[i];
    item.rank_dim = static_cast<int>(number(rank_dims, i));
    item.param = entry.param;
    item.grad = entry.grad;
    item.m = entry.m;
    item.v = entry.v;
    item.rows = entry.rows;
    item.columns = entry.columns;
    if (mapped && item.rank() != r) throw std::invalid_argument("grouped_adamw: maps of another rank than a factor's");
    if (entry.contiguous) {
      const int64_t rest = r > 0 ? entry.elements / r : 0;
      item.rows = !mapped ? 1 : item.rank_dim == 1 ? rest : r;
      item.columns = !mapped ? entry.elements : item.rank_dim == 1 ? r : rest;
      item.param.row_stride = item.grad.row_stride = item.columns;
      item.param.column_stride = item.grad.column_stride = 1;
    }
    const double steps = step - static_cast<double>(number(missed, i));
    if (bias_correction && steps != steps_known) {
      correction1 = 1 - std::pow(scalars.beta1, steps);
      correction2 = 1 - std::pow(scalars.beta2, steps);
      steps_known = steps;
    }
    item.step_size = scalars.lr / correction1;
    item.scale_v = 1 / std::sqrt(correction2);
  }
  return items;
}

// The r × r maps are (n, r, r), contiguous, of the type of the moments.
void adamw(const py::list& params, const py::list& grads, const py::list& exp_avgs, const py::list& exp_avg_sqs,
           const StepLayout* known, const py::list& missed, const py::list& rank_dims, double lr, double beta1,
           double beta2, double eps, double weight_decay, double step, bool bias_correction, bool maximize, int64_t r,
           intptr_t grad_maps, intptr_t momentum_maps, intptr_t param_maps, intptr_t direction_maps, intptr_t drifts,
           int threads) {
  const StepLists lists(params, grads, exp_avgs, exp_avg_sqs, known);
  for (const py::list* list : {&missed, &rank_dims}) StepLists::check_length(params, *list, true);
  const bool mapped = grad_maps || momentum_maps || param_maps || direction_maps || drifts;
  if (mapped && (rank_dims.empty() || r < 0)) throw std::invalid_argument("grouped_adamw: maps without a rank");
  if (mapped) check_rank(r);
  if (params.empty()) return;
  const AdamWScalars scalars{dtype_of(lists.layout().like.dtype), lr, beta1, beta2, eps, weight_decay, maximize};
  const int64_t bytes = r * r * (scalars.dtype == DType::kFloat64 ? 8 : 4);
  std::vector<AdamWItem> items =
      step_items(scalars, lists.layout(), missed, rank_dims, step, bias_correction, mapped, r);
  for (size_t i = 0; mapped && i < items.size(); ++i) {
    const auto map = [&](intptr_t maps) {
      return maps ? reinterpret_cast<void*>(maps + static_cast<int64_t>(i) * bytes) : nullptr;
    };
    items[i].grad_map = map(grad_maps);
    items[i].momentum_map = map(momentum_maps);
    items[i].param_map = map(param_maps);
    items[i].direction_map = map(direction_maps);
    items[i].drift = map(drifts);
  }
  const py::gil_scoped_release released;
  grouped_adamw(scalars, items.data(), static_cast<int64_t>(items.size()), threads);
}

// The factors of one side as for adamw, their partners as for gram; drifts (n, r, r) of the type of the moments.
void altlora_turn(const py::list& params, const py::list& grads, const py::list& exp_avgs, const py::list& exp_avg_sqs,
                  const StepLayout* known, const py::list& partners, int64_t partners_transposed,
                  const MatrixLayout* partners_known, const py::list& missed, const py::list& rank_dims, double lr,
                  double beta1, double beta2, double eps, double weight_decay, double step, bool bias_correction,
                  bool maximize, int64_t r, intptr_t behind, intptr_t moved, double damping, double own_damping,
                  double weight, int threads) {
  const char* const what = "grouped_altlora_turn";
  const StepLists lists(params, grads, exp_avgs, exp_avg_sqs, known);
  StepLists::check_length(params, missed, true);
  StepLists::check_length(params, rank_dims, false);
  const Matrices ys(what, partners, partners_transposed, partners_known);
  check_sizes(what, ys.size() == static_cast<int64_t>(params.size()));
  check_rank(r);
  if (params.empty() || r == 0) return;
  if (!ys.like().is_like(lists.layout().like))
    throw std::invalid_argument("grouped_altlora_turn: partners of another dtype or device");
  const AdamWScalars scalars{dtype_of(lists.layout().like.dtype), lr, beta1, beta2, eps, weight_decay, maximize};
  std::vector<AdamWItem> items = step_items(scalars, lists.layout(), missed, rank_dims, step, bias_correction, true, r);
  std::vector<GramItem> grams(items.size());
  for (int64_t i = 0; i < ys.size(); ++i) {
    grams[i].rows = ys.rows(i);
    grams[i].x = ys.view(what, i, grams[i].rows, r);
  }
  const int64_t elements = ys.size() * r * r;
  const TurnArguments turn{
      memory(what, behind, elements), memory(what, moved, elements), r, damping, own_damping, weight};
  const py::gil_scoped_release released;
  grouped_altlora_turn(scalars, turn, items.data(), grams.data(), ys.size(), threads);
}

// x, previous (or None) and q, how many of each are stored transposed, and what was read of them before, or None. R is
// (n, r, r), contiguous.
void qr(const py::list& xs, int64_t x_transposed, const MatrixLayout* x_layout, const py::object& previous,
        int64_t previous_transposed, const MatrixLayout* previous_layout, const py::list& qs, int64_t q_transposed,
        const MatrixLayout* q_layout, int dtype, int64_t r, intptr_t rs, int threads) {
  const char* const what = "grouped_qr";
  const DType type = dtype_of(dtype);
  const int64_t size = type == DType::kFloat64 ? 8 : 4;
  check_rank(r);
  const Matrices x(what, xs, x_transposed, x_layout), q(what, qs, q_transposed, q_layout);
  const Matrices old(what, previous.is_none() ? py::object(py::list()) : previous, previous_transposed,
                     previous_layout);
  check_sizes(what, q.size() == x.size() && (previous.is_none() || old.size() == x.size()));
  char* const first = memory<char>(what, rs, x.size() * r * r);
  std::vector<QrItem> items(static_cast<size_t>(x.size()));
  for (int64_t i = 0; i < x.size(); ++i) {
    QrItem& item = items[i];
    item.rows = x.rows(i);
    if (item.rows < r) throw std::invalid_argument("grouped_qr: a matrix is not tall");
    item.x = x.view(what, i, item.rows, r);
    if (!previous.is_none()) item.previous = old.view(what, i, item.rows, r);
    item.q = q.view(what, i, item.rows, r);
    item.r = first + i * r * r * size;
  }
  const py::gil_scoped_release released;
  grouped_qr(type, items.data(), x.size(), r, threads);
}

// Sections: left, right, u, v, their rows (left, right), and row and column strides of left, right, u, v. S is (n,
// rank), contiguous.
void svd_product(int64_t n, const py::buffer& table_buffer, int dtype, int64_t k, int64_t rank, intptr_t ss,
                 int threads) {
  const char* const what = "grouped_svd_product";
  const Table table(what, table_buffer, 14, n);
  const DType type = dtype_of(dtype);
  const int64_t size = type == DType::kFloat64 ? 8 : 4;
  check_rank(k);
  if (rank < 1 || rank > k) throw std::invalid_argument("grouped_svd_product: the rank must be between 1 and k");
  char* const first = memory<char>(what, ss, n * rank);
  std::vector<SvdProductItem> items(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    SvdProductItem& item = items[i];
    item.left_rows = table.at(4, i);
    item.right_rows = table.at(5, i);
    if (item.left_rows < k || item.right_rows < k)
      throw std::invalid_argument("grouped_svd_product: a factor is not tall");
    item.left = {table.data(0, i, 1), table.at(6, i), table.at(7, i)};
    item.right = {table.data(1, i, 1), table.at(8, i), table.at(9, i)};
    item.u = {table.data(2, i, 1), table.at(10, i), table.at(11, i)};
    item.v = {table.data(3, i, 1), table.at(12, i), table.at(13, i)};
    item.s = first + i * rank * size;
  }
  const py::gil_scoped_release released;
  grouped_svd_product(type, items.data(), n, k, rank, threads);
}

// x and y (or None), how many of each are stored transposed, and what was read of them before, or None. The Grams are
// (n, r, k), contiguous.
void gram(const py::list& xs, int64_t x_transposed, const MatrixLayout* x_layout, const py::object& ys,
          int64_t y_transposed, const MatrixLayout* y_layout, int dtype, bool wide, int64_t r, int64_t k,
          intptr_t grams, int threads) {
  const char* const what = "grouped_gram";
  check_rank(r);
  check_rank(k);
  const Matrices x(what, xs, x_transposed, x_layout);
  const Matrices y(what, ys.is_none() ? py::object(py::list()) : ys, y_transposed, y_layout);
  check_sizes(what, ys.is_none() || x.size() == y.size());
  char* const first = memory<char>(what, grams, x.size() * r * k);
  std::vector<GramItem> items(static_cast<size_t>(x.size()));
  for (int64_t i = 0; i < x.size(); ++i) {
    GramItem& item = items[i];
    item.rows = x.rows(i);
    item.x = x.view(what, i, item.rows, r);
    item.symmetric = ys.is_none();
    if (!item.symmetric) item.y = y.view(what, i, item.rows, k);
    item.gram = first + i * r * k * (wide ? 8 : 4);
  }
  const py::gil_scoped_release released;
  grouped_gram(dtype_of(dtype), wide, items.data(), x.size(), r, k, threads);
}

// Right-hand sides and where the results go, lists or stacks; `left`: both as transposes. The Grams are (n, r, r),
// contiguous.
void solve(const py::object& rhs, const py::object& out, bool left, int dtype, bool wide, int64_t r, intptr_t grams,
           double damping, int threads) {
  const char* const what = "grouped_solve";
  check_rank(r);
  const int64_t transposed = left ? std::numeric_limits<int64_t>::max() : 0;
  const Matrices sides(what, rhs, transposed), results(what, out, transposed);
  check_sizes(what, sides.size() == results.size());
  const char* const first = memory<const char>(what, grams, sides.size() * r * r);
  std::vector<SolveItem> items(static_cast<size_t>(sides.size()));
  for (int64_t i = 0; i < sides.size(); ++i) {
    SolveItem& item = items[i];
    item.rows = sides.rows(i);
    item.rhs = sides.view(what, i, item.rows, r);
    item.out = results.view(what, i, item.rows, r);
    item.gram = first + i * r * r * (wide ? 8 : 4);
  }
  const py::gil_scoped_release released;
  grouped_solve(dtype_of(dtype), wide, items.data(), sides.size(), r, damping, threads);
}

// x and out, and how many of each are stored transposed.
void polar(const py::list& xs, int64_t x_transposed, const py::list& outs, int64_t out_transposed, int dtype, int64_t r,
           int threads) {
  const char* const what = "grouped_polar";
  check_rank(r);
  const Matrices x(what, xs, x_transposed), out(what, outs, out_transposed);
  check_sizes(what, x.size() == out.size());
  std::vector<PolarItem> items(static_cast<size_t>(x.size()));
  for (int64_t i = 0; i < x.size(); ++i) {
    PolarItem& item = items[i];
    item.rows = x.rows(i);
    if (item.rows < r) throw std::invalid_argument("grouped_polar: a matrix is not tall");
    item.x = x.view(what, i, item.rows, r);
    item.out = out.view(what, i, item.rows, r);
  }
  const py::gil_scoped_release released;
  grouped_polar(dtype_of(dtype), items.data(), x.size(), r, threads);
}

// A stack (n, r, r) by address and strides.
Stack stack_of(const char* what, int64_t n, int64_t r, intptr_t data, int64_t matrix_stride, int64_t row_stride,
               int64_t column_stride) {
  check_rank(r);
  return {memory<const void>(what, data, n * r * r), matrix_stride, row_stride, column_stride};
}

// Values (n, r) and vectors (n, r, r), or 0 where they are not asked for, contiguous.
void eigh(int64_t n, int64_t r, int dtype, intptr_t xs, int64_t matrix_stride, int64_t row_stride,
          int64_t column_stride, intptr_t values, intptr_t vectors, int threads) {
  const char* const what = "grouped_eigh";
  const Stack stack = stack_of(what, n, r, xs, matrix_stride, row_stride, column_stride);
  void* const into = memory(what, values, n * r);
  const py::gil_scoped_release released;
  grouped_eigh(dtype_of(dtype), stack, into, reinterpret_cast<void*>(vectors), n, r, threads);
}

// The inverses (n, r, r), contiguous.
void damped_inverse(int64_t n, int64_t r, int dtype, intptr_t rs, int64_t matrix_stride, int64_t row_stride,
                    int64_t column_stride, double damping, intptr_t out, int threads) {
  const char* const what = "grouped_damped_inverse";
  const Stack stack = stack_of(what, n, r, rs, matrix_stride, row_stride, column_stride);
  void* const into = memory(what, out, n * r * r);
  const py::gil_scoped_release released;
  grouped_damped_inverse(dtype_of(dtype), stack, damping, into, n, r, threads);
}

// Grams of double, drifts and what realigns (or 0), all (n, r, r), contiguous.
void preconditioner(int64_t n, int64_t r, int dtype, intptr_t grams, intptr_t drifts, double damping, double weight,
                    bool transposed, intptr_t out, intptr_t realigned, int threads) {
  const char* const what = "grouped_preconditioner";
  check_rank(r);
  const int64_t elements = n * r * r;
  const PreconditionerArguments arguments{memory<const double>(what, grams, elements),
                                          reinterpret_cast<const void*>(drifts),
                                          memory(what, out, elements),
                                          memory(what, realigned, drifts != 0 ? elements : 0),
                                          r,
                                          damping,
                                          weight,
                                          transposed};
  const py::gil_scoped_release released;
  grouped_preconditioner(dtype_of(dtype), arguments, n, threads);
}

// Right-hand sides and solutions (n, r, r), contiguous; all of double.
void sylvester(int64_t n, int64_t r, intptr_t left, const std::array<int64_t, 3>& left_strides, intptr_t right,
               const std::array<int64_t, 3>& right_strides, intptr_t rhs, intptr_t out, int threads) {
  const char* const what = "grouped_sylvester";
  const auto stack = [&](intptr_t data, const std::array<int64_t, 3>& strides) {
    return stack_of(what, n, r, data, strides[0], strides[1], strides[2]);
  };
  const int64_t elements = n * r * r;
  const SylvesterArguments arguments{stack(left, left_strides), stack(right, right_strides),
                                     memory<const double>(what, rhs, elements), memory<double>(what, out, elements), r};
  const py::gil_scoped_release released;
  grouped_sylvester(arguments, n, threads);
}

// Sections of the layers: u, v, out_u, out_v, d_out, d_in, row and column strides of u, v, out_u, out_v. Of the terms,
// term by term for all layers: left, right, k, row and column strides of left, of right, dtype (+4: dense). One double
// c for each term of each layer.
void lorsum(int64_t n, const py::buffer& layer_buffer, int64_t terms, const py::buffer& term_buffer, intptr_t c,
            int dtype, int64_t r, int sweeps, double proximal, bool u_first, int threads) {
  const Table layers("grouped_lorsum", layer_buffer, 14, n), parts("grouped_lorsum", term_buffer, 8, terms * n);
  check_rank(r);
  if (terms < 1 || terms > kMaxLorsumTerms) throw std::invalid_argument("grouped_lorsum: too many terms");
  const double* const coefficients = memory<const double>("grouped_lorsum", c, terms * n);
  std::vector<LorsumTerm> all(static_cast<size_t>(terms * n));
  std::vector<LorsumItem> items(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    LorsumItem& item = items[i];
    item.d_out = layers.at(4, i);
    item.d_in = layers.at(5, i);
    item.u = {layers.data(0, i, item.d_out * r), layers.at(6, i), layers.at(7, i)};
    item.v = {layers.data(1, i, item.d_in * r), layers.at(8, i), layers.at(9, i)};
    item.out_u = {layers.data(2, i, item.d_out * r), layers.at(10, i), layers.at(11, i)};
    item.out_v = {layers.data(3, i, item.d_in * r), layers.at(12, i), layers.at(13, i)};
    item.terms = &all[static_cast<size_t>(i * terms)];
    for (int64_t j = 0; j < terms; ++j) {
      LorsumTerm& term = all[static_cast<size_t>(i * terms + j)];
      const int64_t at = j * n + i;
      term.k = parts.at(2, at);
      term.dense = parts.at(7, at) >= 4;
      term.dtype = dtype_of(static_cast<int>(parts.at(7, at) % 4));
      term.left = {parts.data(0, at, term.k * item.d_out), parts.at(3, at), parts.at(4, at)};
      if (!term.dense) term.right = {parts.data(1, at, term.k * item.d_in), parts.at(5, at), parts.at(6, at)};
      term.c = coefficients[at];
    }
  }
  const LorsumScalars scalars{dtype_of(dtype), r, terms, sweeps, proximal, u_first};
  const py::gil_scoped_release released;
  grouped_lorsum(scalars, items.data(), n, threads);
}

// Dense matrices of one dtype on the CPU.
class Dense {
 public:
  Dense(const char* what, const py::handle& first) : what_(what), first_(TensorReader::get().read(first.ptr())) {
    if (first_.ndim != 2 || first_.device_type != kCpu) fail();
    dtype_ = dtype_of(first_.dtype);
    if (element_size(dtype_) < 4) fail();
  }
  DType dtype() const { return dtype_; }
  int64_t size(int dimension) const { return first_.sizes[dimension]; }
  Dense like(const py::handle& tensor) const { return Dense(what_, tensor); }
  // What must be a (rows, columns) one, or null of None.
  void* data(const py::handle& tensor, int64_t rows, int64_t columns) const {
    if (tensor.is_none()) return nullptr;
    const TensorInfo info = read(tensor, rows, columns);
    if (!info.is_contiguous()) fail();
    return info.data();
  }
  // The same of one whose rows are dense, but may lie apart.
  Activation activation(const py::handle& tensor, int64_t rows, int64_t columns) const {
    if (tensor.is_none()) return {};
    const TensorInfo info = read(tensor, rows, columns);
    if (columns > 1 && info.strides[1] != 1) fail();
    return {info.data(), info.strides[0]};
  }
  [[noreturn]] void fail() const {
    throw std::invalid_argument(std::string(what_) +
                                ": needs contiguous matrices of one dtype, fp32 or fp64, that fit each other");
  }

 private:
  TensorInfo read(const py::handle& tensor, int64_t rows, int64_t columns) const {
    const TensorInfo info = TensorReader::get().read(tensor.ptr());
    if (info.ndim != 2 || info.sizes[0] != rows || info.sizes[1] != columns || !info.is_like(first_)) fail();
    return info;
  }

  const char* what_;
  TensorInfo first_;
  DType dtype_ = DType::kFloat32;
};

// The list's members as `read` gives them; as many as there are pairs, or none.
template <class Read>
auto read_pairs(const py::list& tensors, AdapterLayer& layer, const Dense& dense, const Read& read) {
  std::vector<decltype(read(py::handle()))> parts;
  for (const py::handle tensor : tensors) parts.push_back(read(tensor));
  const int64_t count = static_cast<int64_t>(parts.size());
  if (count > 0 && layer.pairs > 0 && count != layer.pairs) dense.fail();
  layer.pairs = std::max(layer.pairs, count);
  return parts;
}

// Of `downs` (r, d_in) and `ups` (d_out, r); where they do not tell, r and d_in are as given.
AdapterLayer adapter_layer(const Dense& dense, const py::list& downs, const py::list& ups, double scale, int64_t r,
                           int64_t d_in) {
  AdapterLayer layer;
  layer.tokens = dense.size(0), layer.scale = scale, layer.r = r, layer.d_in = d_in;
  if (!ups.empty()) layer.r = dense.like(ups[0]).size(1), layer.d_out = dense.like(ups[0]).size(0);
  if (!downs.empty()) layer.r = dense.like(downs[0]).size(0), layer.d_in = dense.like(downs[0]).size(1);
  layer.downs = read_pairs(downs, layer, dense, [&](const py::handle& down) -> const void* {
    return dense.data(down, layer.r, layer.d_in);
  });
  layer.ups = read_pairs(ups, layer, dense,
                         [&](const py::handle& up) -> const void* { return dense.data(up, layer.d_out, layer.r); });
  return layer;
}

// (tokens, r), one for each pair; None only if they are written.
std::vector<Activation> activations(const Dense& dense, AdapterLayer& layer, const py::list& tensors, bool written) {
  return read_pairs(tensors, layer, dense, [&](const py::handle& tensor) {
    if (tensor.is_none() && !written) dense.fail();
    return dense.activation(tensor, layer.tokens, layer.r);
  });
}

// y (tokens, d_out), if not None, is added to, and needs `ups`. Of `through` (tokens, r), with x (tokens, d_in) and
// `downs`, those that are not None are written; without, they are read.
void adapter_forward(const py::object& x, const py::list& downs, const py::list& ups, double scale, const py::object& y,
                     const py::list& through, int threads) {
  const Dense dense("lora_linear", x.is_none() ? y : x);
  AdapterLayer layer = adapter_layer(dense, downs, ups, scale, 0, 0);
  const AdapterForward call{dense.data(x, layer.tokens, layer.d_in), dense.data(y, layer.tokens, layer.d_out),
                            activations(dense, layer, through, !x.is_none())};
  if (x.is_none() != downs.empty() || y.is_none() != ups.empty() || through.empty()) dense.fail();
  const py::gil_scoped_release released;
  run_adapter(dense.dtype(), layer, call, threads);
}

// What is not None of grad_x (tokens, d_in), which is added to (to `before` if that is not None), grad_a (r, d_in) and
// grad_b (d_out, r); of grad (tokens, d_out) with `ups`, x (tokens, d_in) and hidden (tokens, r). Of `through` (tokens,
// r), with grad, those that are not None are written; without, they are read.
void adapter_backward(const py::object& grad, const py::object& x, const py::object& hidden, const py::object& before,
                      const py::list& through, const py::list& downs, const py::list& ups, double scale,
                      const py::object& grad_x, const py::object& grad_a, const py::object& grad_b, int threads) {
  const bool begins = !grad.is_none();
  const char* const what = "lora_linear_backward";
  if (!begins && through.empty()) throw std::invalid_argument("lora_linear_backward: nothing to begin with");
  const Dense dense(what, begins ? grad : py::object(through[0]));
  const bool has_a = !grad_a.is_none();
  AdapterLayer layer = adapter_layer(dense, downs, ups, scale, has_a ? dense.like(grad_a).size(0) : 0,
                                     has_a ? dense.like(grad_a).size(1) : 0);
  const int64_t tokens = layer.tokens, d_in = layer.d_in, d_out = layer.d_out, r = layer.r;
  AdapterBackward call{dense.data(grad, tokens, d_out), dense.data(x, tokens, d_in), dense.data(before, tokens, d_in),
                       dense.activation(hidden, tokens, r), activations(dense, layer, through, begins)};
  call.grad_x = dense.data(grad_x, tokens, d_in);
  call.grad_a = dense.data(grad_a, r, d_in);
  call.grad_b = dense.data(grad_b, d_out, r);
  if (begins == ups.empty() || (call.grad_x && downs.empty())) dense.fail();
  if ((call.grad_a && x.is_none()) || (call.grad_b && (hidden.is_none() || !begins)))
    throw std::invalid_argument("lora_linear_backward: a gradient without what it is made of");
  const py::gil_scoped_release released;
  run_adapter_backward(dense.dtype(), layer, call, threads);
}

}  // namespace

void bind_lists(py::module_& m);  // lists.cpp

void bind_cpu(py::module_& m) {
  TensorReader::get();
  watch_for_fork();
  bind_lists(m);
  m.def("adamw", &adamw, "One AdamW step of a list of parameters, in place.");
  m.def("altlora_turn", &altlora_turn, "One turn of AltLoRA of the factors of one side, in place.");
  m.def("first_irregular", &first_irregular,
        "The first tensor of a list that is neither contiguous nor a matrix; -1 if there is none.");
  m.def("qr", &qr, "Thin QR of a list of tall matrices.");
  m.def("svd_product", &svd_product, "Truncated SVD of a list of products of thin factors.");
  m.def("gram", &gram, "Gram and cross-Gram matrices of a list of thin matrices.");
  m.def("solve", &solve, "Damped positive definite systems of a list.");
  m.def("polar", &polar, "Orthonormal polar factors of a list of tall matrices.");
  m.def("eigh", &eigh, "Eigenvalues and eigenvectors of a stack of symmetric matrices.");
  m.def("damped_inverse", &damped_inverse, "Inverses of the triangular factors of a stack, with damping.");
  m.def("preconditioner", &preconditioner, "Inverses of a stack of damped Gram matrices, and what realigns momentum.");
  m.def("sylvester", &sylvester, "Sylvester equations of a stack, with symmetric coefficients.");
  m.def("lorsum", &lorsum,
        "Rank-r approximations of sums of low-rank matrices of a list, by alternating least squares.");
  m.def("adapter_forward", &adapter_forward, "What an adapter adds to a linear layer's output, in place.");
  m.def("adapter_backward", &adapter_backward, "The gradients of an adapter.");
  m.attr("max_lorsum_terms") = kMaxLorsumTerms;
  m.def("guard_scratch", &guard_scratch, py::arg("guard"),
        "For tests: end the process where a kernel writes behind its scratch.");
  m.def("instruction_set", &instruction_set, "The instruction set that the CPU kernels use now.");
  m.def("use_instruction_set", &use_instruction_set, py::arg("name"),
        "Use 'avx512', 'avx2' or 'portable' kernels from now on; False (and no change) where that cannot run.");
}

}  // namespace lowrank
