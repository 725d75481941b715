// The batched routines that the Python side composes: cuBLAS and cuSOLVER calls over device addresses on a torch
// stream. Conventions are the vendor's: column-major, leading dimensions and strides in elements, pointer tables on the
// device.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "cuda/libraries.h"

namespace lowrank {
namespace cuda {

using Address = std::uintptr_t;

// Where a call runs: handles are kept per (device, stream); the workspace is torch memory that the caller keeps alive.
struct Place {
  int device;
  Address stream;
  Address workspace;
  std::size_t workspace_bytes;
};

class Routines {
 public:
  explicit Routines(std::shared_ptr<Libraries> libraries) : libraries_(std::move(libraries)) {}

  // C = alpha·op(A)·op(B) + beta·C for `batch` matrices at constant strides. fp32 means fp32: no TF32, whatever torch's
  // global switch says.
  void gemm(const Place& place, bool is_double, bool transpose_a, bool transpose_b, int m, int n, int k, double alpha,
            Address a, int lda, long long stride_a, Address b, int ldb, long long stride_b, double beta, Address c,
            int ldc, long long stride_c, int batch);
  // X·op(A) = B (right) or op(A)·X = B (left) in place of B (m×n), A triangular. `a`, `b`: tables of addresses.
  void trsm(const Place& place, bool is_double, bool right, bool upper, bool transpose, int m, int n, Address a,
            int lda, Address b, int ldb, int batch);
  // Householder QR of m×n matrices in place. `a`, `tau`: tables of addresses.
  void geqrf(const Place& place, bool is_double, int m, int n, Address a, int lda, Address tau, int batch);
  // SVD of n×n matrices, n ≤ 32, contiguous; A is destroyed. Returns the scratch length in elements if `work` is 0.
  int gesvdj(const Place& place, bool is_double, int n, Address a, Address s, Address u, Address v, Address work,
             int work_length, Address info, int batch);
  // Eigenvectors (in place of A, lower triangle read) and ascending eigenvalues of n×n fp64 matrices, contiguous.
  // Returns the scratch length in bytes if `work` is 0.
  std::size_t syev(const Place& place, bool jacobi, int n, Address a, Address w, Address work, std::size_t work_bytes,
                   Address info, int batch);

  const Libraries& libraries() const { return *libraries_; }
  int cublas_handles();

 private:
  // Handles of one (device, stream). Never destroyed: at process exit the driver may be gone before us.
  struct Context {
    std::mutex in_use;  // a handle carries its stream and workspace: one call at a time
    cublasHandle_t cublas = nullptr;
    cusolverDnHandle_t cusolver = nullptr;
    cusolverDnParams_t params = nullptr;
    gesvdjInfo_t gesvdj = nullptr;
    syevjInfo_t syevj = nullptr;
    Address workspace = 0;
    std::vector<char> host_work;
  };
  class InUse;

  std::shared_ptr<Libraries> libraries_;
  std::mutex contexts_lock_;
  std::map<std::pair<int, Address>, std::unique_ptr<Context>> contexts_;
};

}  // namespace cuda
}  // namespace lowrank
