// Gram matrices of a list.
#include "cpu/grouped.h"
#include "cpu/row_sums.h"

namespace lowrank {
namespace {

template <class T>
void run(DType dtype, bool wide, const GramItem* items, int64_t n, int64_t r, int64_t k, int threads) {
  const Kernels<T>& kernel = kernels<T>();
  sum_rows(
      n, r, r * k, static_cast<size_t>(gram_scratch(r, k)) * sizeof(double), threads,
      [&](int64_t i) { return items[i].rows; },
      [&](int64_t i, int64_t next, int64_t first, int64_t rows, char* scratch, double* sums) {
        GramItem item = items[i];
        if (next >= 0) item.next = &items[next];
        kernel.gram_rows(dtype, wide, item, r, k, first, rows, reinterpret_cast<double*>(scratch), sums);
      },
      [&](int64_t i, const double* sums) {
        const bool symmetric = items[i].symmetric;
        if (wide) {
          write_gram<double>(sums, r, k, symmetric, items[i].gram);
        } else {
          write_gram<T>(sums, r, k, symmetric, items[i].gram);
        }
      });
}

}  // namespace

void grouped_gram(DType dtype, bool wide, const GramItem* items, int64_t n, int64_t r, int64_t k, int threads) {
  with_compute_type(dtype, [&](auto t) { run<decltype(t)>(dtype, wide, items, n, r, k, threads); });
}

}  // namespace lowrank
