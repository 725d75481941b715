// Where the tensors of a list lie, read in one pass: at hundreds of small layers a second look at them costs as much as
// their arithmetic.
#pragma once

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <vector>

#include "cpu/tensors.h"

namespace lowrank {

// A list of matrices of one dtype and device, of which the first `transposed` are stored as their transposes.
struct MatrixLayout {
  struct Entry {
    View view;
    int64_t rows = 0, columns = 0;
  };
  TensorInfo like;
  std::vector<Entry> entries;

  void add(const TensorInfo& info, bool transposed) {
    if (entries.empty()) like = info;
    if (!info.is_like(like)) throw std::invalid_argument("matrices of different dtypes or devices");
    entries.push_back({info.matrix(transposed), info.rows(transposed), info.columns(transposed)});
  }
  // What all have, or -1.
  int64_t columns() const {
    for (const Entry& entry : entries)
      if (entry.columns != entries[0].columns) return -1;
    return entries.empty() ? -1 : entries[0].columns;
  }
  bool tall() const {
    return std::all_of(entries.begin(), entries.end(), [](const Entry& entry) { return entry.rows >= entry.columns; });
  }
  // Whether another list has the same dtype, device and sizes.
  bool fits(const MatrixLayout& other) const {
    const auto same = [](const Entry& a, const Entry& b) { return a.rows == b.rows && a.columns == b.columns; };
    return like.is_like(other.like) &&
           std::equal(entries.begin(), entries.end(), other.entries.begin(), other.entries.end(), same);
  }
};

// A parameter and its gradient, contiguous both, or matrices (which have rows and columns), and its moments, contiguous
// or null.
struct StepEntry {
  View param, grad;
  void* m = nullptr;
  void* v = nullptr;
  int64_t elements = 0, rows = 0, columns = 0;
  bool contiguous = false, is_matrix = false;
};

struct StepLayout {
  TensorInfo like;  // dtype and device of all
  std::vector<StepEntry> entries;

  // False if these do not fit each other, or what came before: dtypes, devices, sizes, strides that are not taken.
  // `m` and `v` may be null.
  bool add(const TensorInfo& param, const TensorInfo& grad, const TensorInfo* m, const TensorInfo* v) {
    if (entries.empty()) like = param;
    if (param.dtype < 0 || !param.is_like(like) || !grad.is_like(like) || grad.ndim != param.ndim ||
        !std::equal(param.sizes, param.sizes + param.ndim, grad.sizes))
      return false;
    StepEntry entry;
    entry.elements = param.elements();
    entry.contiguous = param.is_contiguous() && grad.is_contiguous();
    if (!entry.contiguous && param.ndim != 2) return false;
    const int state_dtype = static_cast<int>(param.dtype == 1 ? DType::kFloat64 : DType::kFloat32);
    for (const TensorInfo* moment : {m, v}) {
      if (moment && (moment->dtype != state_dtype || moment->device_type != like.device_type ||
                     moment->device_index != like.device_index || moment->ndim != param.ndim ||
                     !std::equal(param.sizes, param.sizes + param.ndim, moment->sizes) || !moment->is_contiguous()))
        return false;
    }
    entry.is_matrix = param.ndim == 2;
    if (entry.is_matrix) {
      entry.param = param.matrix(false);
      entry.grad = grad.matrix(false);
      entry.rows = param.rows(false);
      entry.columns = param.columns(false);
    } else {
      entry.param.data = param.data();
      entry.grad.data = grad.data();
    }
    if (m) entry.m = m->data();
    if (v) entry.v = v->data();
    entries.push_back(entry);
    return true;
  }

  // The parameters, or their gradients, as matrices, or as the transposes of these; null if one is none.
  std::unique_ptr<MatrixLayout> matrices(bool grads, bool transposed) const {
    auto found = std::make_unique<MatrixLayout>();
    found->like = like;
    found->entries.reserve(entries.size());
    for (const StepEntry& entry : entries) {
      if (!entry.is_matrix) return nullptr;
      const View& view = grads ? entry.grad : entry.param;
      if (transposed) {
        found->entries.push_back({{view.data, view.column_stride, view.row_stride}, entry.columns, entry.rows});
      } else {
        found->entries.push_back({view, entry.rows, entry.columns});
      }
    }
    return found;
  }
};

}  // namespace lowrank
