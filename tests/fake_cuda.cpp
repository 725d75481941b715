// libcudart, libcublas and libcusolver for a machine without a GPU: the routines that csrc/cuda calls, written from
// NVIDIA's documentation (column-major, leading dimensions, tables of addresses), running on host memory. One source
// for all three; FAKE_CUDA_MAJOR 12 leaves XsyevBatched out. What they check strictly is what a mistake in the host
// code gets wrong: leading dimensions, sizes, NaN in what must not be read is kept.
#include <cmath>
#include <cstdlib>
#include <utility>
#include <vector>

#include "cuda/types.h"

using namespace lowrank::cuda;

namespace lowrank {
namespace cuda {
struct cublasContext {
  void* stream;
  void* workspace;
};
struct cusolverDnContext {
  void* stream;
};
struct gesvdjInfo {};
struct syevjInfo {};
struct cusolverDnParams {};
}  // namespace cuda
}  // namespace lowrank

namespace {

int current_device = 0;
constexpr auto kBlasInvalid = static_cast<cublasStatus_t>(7);
constexpr auto kSolverInvalid = static_cast<cusolverStatus_t>(3);

template <class T>
struct Matrix {  // column-major view, transposed on request
  T* data;
  int ld;
  bool transposed;
  T& operator()(int i, int j) const {
    return transposed ? data[j + static_cast<long>(i) * ld] : data[i + static_cast<long>(j) * ld];
  }
};

template <class T>
cublasStatus_t gemm(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                    const T* alpha, const T* a, int lda, long long sa, const T* b, int ldb, long long sb, const T* beta,
                    T* c, int ldc, long long sc, int batch) {
  if (handle == nullptr || m < 0 || n < 0 || k < 0 || batch < 0) return kBlasInvalid;
  if (lda < (ta == CUBLAS_OP_N ? m : k) || ldb < (tb == CUBLAS_OP_N ? k : n) || ldc < m) return kBlasInvalid;
  for (int p = 0; p < batch; ++p) {
    Matrix<const T> A{a + p * sa, lda, ta == CUBLAS_OP_T}, B{b + p * sb, ldb, tb == CUBLAS_OP_T};
    Matrix<T> C{c + p * sc, ldc, false};
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < n; ++j) {
        T sum = 0;
        for (int l = 0; l < k; ++l) sum += A(i, l) * B(l, j);
        C(i, j) = *beta == 0 ? *alpha * sum : *alpha * sum + *beta * C(i, j);
      }
    }
  }
  return CUBLAS_STATUS_SUCCESS;
}

template <class T>
cublasStatus_t trsm(cublasHandle_t handle, cublasSideMode_t side, cublasFillMode_t uplo, cublasOperation_t trans, int m,
                    int n, const T* alpha, const T* const* a, int lda, T* const* b, int ldb, int batch) {
  const bool right = side == CUBLAS_SIDE_RIGHT;
  const int order = right ? n : m;
  if (handle == nullptr || lda < order || ldb < m) return kBlasInvalid;
  for (int p = 0; p < batch; ++p) {
    // op(A) X = B; from the right, op(A)ᵀ Xᵀ = Bᵀ.
    const bool transposed = (trans == CUBLAS_OP_T) != right;
    const bool upper = (uplo == CUBLAS_FILL_MODE_UPPER) != transposed;
    Matrix<const T> A{a[p], lda, transposed};
    Matrix<T> B{b[p], ldb, right};
    const int columns = right ? m : n;
    for (int j = 0; j < columns; ++j) {
      for (int step = 0; step < order; ++step) {
        const int i = upper ? order - 1 - step : step;
        T sum = *alpha * B(i, j);
        for (int l = upper ? i + 1 : 0; l < (upper ? order : i); ++l) sum -= A(i, l) * B(l, j);
        B(i, j) = sum / A(i, i);
      }
    }
  }
  return CUBLAS_STATUS_SUCCESS;
}

template <class T>
cublasStatus_t geqrf(cublasHandle_t handle, int m, int n, T* const* a, int lda, T* const* tau, int* info, int batch) {
  *info = m < 0 ? -1 : n < 0 ? -2 : lda < m ? -4 : batch < 0 ? -7 : 0;
  if (handle == nullptr || *info != 0) return kBlasInvalid;
  for (int p = 0; p < batch; ++p) {
    Matrix<T> A{a[p], lda, false};
    for (int j = 0; j < n && j < m; ++j) {
      T squares = 0;
      for (int i = j + 1; i < m; ++i) squares += A(i, j) * A(i, j);
      tau[p][j] = 0;
      if (squares == 0) continue;
      const T alpha = A(j, j),
              beta = alpha > 0 ? -std::sqrt(alpha * alpha + squares) : std::sqrt(alpha * alpha + squares);
      tau[p][j] = (beta - alpha) / beta;
      for (int i = j + 1; i < m; ++i) A(i, j) /= alpha - beta;
      A(j, j) = beta;
      for (int l = j + 1; l < n; ++l) {
        T dot = A(j, l);
        for (int i = j + 1; i < m; ++i) dot += A(i, j) * A(i, l);
        dot *= tau[p][j];
        A(j, l) -= dot;
        for (int i = j + 1; i < m; ++i) A(i, l) -= dot * A(i, j);
      }
    }
  }
  return CUBLAS_STATUS_SUCCESS;
}

// Eigenvalues ascending, eigenvectors in the columns of A; reads the lower triangle only. Cyclic Jacobi.
template <class T>
void eigen(int n, T* a, int lda, T* w) {
  std::vector<T> s(n * n), v(n * n, 0);
  for (int j = 0; j < n; ++j) {
    v[j + j * n] = 1;
    for (int i = j; i < n; ++i) s[i + j * n] = s[j + i * n] = a[i + j * lda];
  }
  for (int sweep = 0; sweep < 60; ++sweep) {
    T off = 0, all = 0;
    for (int j = 0; j < n; ++j) {
      for (int i = 0; i < n; ++i) (i == j ? all : off) += s[i + j * n] * s[i + j * n];
    }
    if (off <= 1e-32 * all) break;
    for (int p = 0; p < n; ++p) {
      for (int q = p + 1; q < n; ++q) {
        if (s[p + q * n] == 0) continue;
        const T theta = (s[q + q * n] - s[p + p * n]) / (2 * s[p + q * n]);
        const T t = (theta >= 0 ? 1 : -1) / (std::abs(theta) + std::sqrt(theta * theta + 1));
        const T c = 1 / std::sqrt(t * t + 1), sine = t * c;
        auto rotate = [&](T& x, T& y) {
          const T old = x;
          x = c * old - sine * y;
          y = sine * old + c * y;
        };
        for (int i = 0; i < n; ++i) rotate(s[i + p * n], s[i + q * n]);
        for (int i = 0; i < n; ++i) rotate(s[p + i * n], s[q + i * n]);
        for (int i = 0; i < n; ++i) rotate(v[i + p * n], v[i + q * n]);
      }
    }
  }
  std::vector<int> order(n);
  for (int i = 0; i < n; ++i) order[i] = i;
  for (int i = 0; i < n; ++i) {
    for (int j = i + 1; j < n; ++j) {
      if (s[order[j] * (n + 1)] < s[order[i] * (n + 1)]) std::swap(order[i], order[j]);
    }
    w[i] = s[order[i] * (n + 1)];
    for (int row = 0; row < n; ++row) a[row + i * lda] = v[row + order[i] * n];
  }
}

template <class T>
cusolverStatus_t gesvdj(cusolverDnHandle_t handle, int m, int n, T* a, int lda, T* s, T* u, int ldu, T* v, int ldv,
                        T* work, int lwork, int* info, gesvdjInfo_t params, int batch) {
  if (handle == nullptr || params == nullptr || m != n || n > 32 || lda < m || ldu < m || ldv < n || work == nullptr ||
      lwork < n * batch) {
    return kSolverInvalid;
  }
  for (int p = 0; p < batch; ++p, a += lda * n, s += n, u += ldu * m, v += ldv * n) {
    // One-sided Jacobi in fp64: rotate the columns of A V until they are orthogonal.
    std::vector<double> x(n * n), r(n * n, 0);
    for (int j = 0; j < n; ++j) {
      r[j + j * n] = 1;
      for (int i = 0; i < n; ++i) x[i + j * n] = a[i + j * lda];
    }
    for (int sweep = 0; sweep < 60; ++sweep) {
      bool rotated = false;
      for (int c1 = 0; c1 < n; ++c1) {
        for (int c2 = c1 + 1; c2 < n; ++c2) {
          double aa = 0, bb = 0, ab = 0;
          for (int i = 0; i < n; ++i) {
            aa += x[i + c1 * n] * x[i + c1 * n];
            bb += x[i + c2 * n] * x[i + c2 * n];
            ab += x[i + c1 * n] * x[i + c2 * n];
          }
          if (std::abs(ab) <= 1e-15 * std::sqrt(aa * bb)) continue;
          rotated = true;
          const double zeta = (bb - aa) / (2 * ab);
          const double t = (zeta >= 0 ? 1 : -1) / (std::abs(zeta) + std::sqrt(1 + zeta * zeta));
          const double c = 1 / std::sqrt(1 + t * t), sine = c * t;
          for (std::vector<double>* y : {&x, &r}) {
            for (int i = 0; i < n; ++i) {
              const double old = (*y)[i + c1 * n];
              (*y)[i + c1 * n] = c * old - sine * (*y)[i + c2 * n];
              (*y)[i + c2 * n] = sine * old + c * (*y)[i + c2 * n];
            }
          }
        }
      }
      if (!rotated) break;
    }
    std::vector<double> norms(n, 0);
    std::vector<int> order(n);
    for (int j = 0; j < n; ++j) {
      order[j] = j;
      for (int i = 0; i < n; ++i) norms[j] += x[i + j * n] * x[i + j * n];
      norms[j] = std::sqrt(norms[j]);
    }
    for (int i = 0; i < n; ++i) {
      for (int j = i + 1; j < n; ++j) {
        if (norms[order[j]] > norms[order[i]]) std::swap(order[i], order[j]);
      }
      s[i] = static_cast<T>(norms[order[i]]);
      for (int row = 0; row < n; ++row) {  // 0/0: what is left undefined for a zero singular value is NaN here
        u[row + i * ldu] = static_cast<T>(x[row + order[i] * n] / norms[order[i]]);
        v[row + i * ldv] = static_cast<T>(r[row + order[i] * n]);
      }
    }
    for (int i = 0; i < lda * n; ++i) a[i] = NAN;
    info[p] = 0;
  }
  return CUSOLVER_STATUS_SUCCESS;
}

}  // namespace

extern "C" {

#ifdef FAKE_CUDART
cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  if (device > 1) return static_cast<cudaError_t>(101);
  return current_device = device, cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = FAKE_CUDA_MAJOR * 1000, cudaSuccess; }
#endif

#ifdef FAKE_CUBLAS
cublasStatus_t cublasCreate_v2(cublasHandle_t* handle) { return *handle = new cublasContext{}, CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasDestroy_v2(cublasHandle_t handle) { return delete handle, CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
  return handle->stream = stream, CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t handle, void* workspace, size_t) {
  return handle->workspace = workspace, CUBLAS_STATUS_SUCCESS;
}
#define FAKE_BLAS(X, T)                                                                                                \
  cublasStatus_t cublas##X##gemmStridedBatched(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb,      \
                                               int m, int n, int k, const T* alpha, const T* a, int lda, long long sa, \
                                               const T* b, int ldb, long long sb, const T* beta, T* c, int ldc,        \
                                               long long sc, int batch) {                                              \
    return gemm(handle, ta, tb, m, n, k, alpha, a, lda, sa, b, ldb, sb, beta, c, ldc, sc, batch);                      \
  }                                                                                                                    \
  cublasStatus_t cublas##X##trsmBatched(cublasHandle_t handle, cublasSideMode_t side, cublasFillMode_t uplo,           \
                                        cublasOperation_t trans, cublasDiagType_t, int m, int n, const T* alpha,       \
                                        const T* const* a, int lda, T* const* b, int ldb, int batch) {                 \
    return trsm(handle, side, uplo, trans, m, n, alpha, a, lda, b, ldb, batch);                                        \
  }                                                                                                                    \
  cublasStatus_t cublas##X##geqrfBatched(cublasHandle_t handle, int m, int n, T* const* a, int lda, T* const* tau,     \
                                         int* info, int batch) {                                                       \
    return geqrf(handle, m, n, a, lda, tau, info, batch);                                                              \
  }
FAKE_BLAS(S, float)
FAKE_BLAS(D, double)
#endif

#ifdef FAKE_CUSOLVER
cusolverStatus_t cusolverGetVersion(int* version) {
  return *version = FAKE_CUDA_MAJOR == 13 ? 12000 : 11600, CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnCreate(cusolverDnHandle_t* handle) {
  return *handle = new cusolverDnContext{}, CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnDestroy(cusolverDnHandle_t handle) { return delete handle, CUSOLVER_STATUS_SUCCESS; }
cusolverStatus_t cusolverDnSetStream(cusolverDnHandle_t handle, cudaStream_t stream) {
  return handle->stream = stream, CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnCreateGesvdjInfo(gesvdjInfo_t* info) {
  return *info = new gesvdjInfo, CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnCreateSyevjInfo(syevjInfo_t* info) { return *info = new syevjInfo, CUSOLVER_STATUS_SUCCESS; }
#define FAKE_GESVDJ(X, T)                                                                                         \
  cusolverStatus_t cusolverDn##X##gesvdjBatched_bufferSize(cusolverDnHandle_t, cusolverEigMode_t, int, int n,     \
                                                           const T*, int, const T*, const T*, int, const T*, int, \
                                                           int* length, gesvdjInfo_t, int batch) {                \
    return *length = n * batch, CUSOLVER_STATUS_SUCCESS;                                                          \
  }                                                                                                               \
  cusolverStatus_t cusolverDn##X##gesvdjBatched(cusolverDnHandle_t handle, cusolverEigMode_t, int m, int n, T* a, \
                                                int lda, T* s, T* u, int ldu, T* v, int ldv, T* work, int lwork,  \
                                                int* info, gesvdjInfo_t params, int batch) {                      \
    return gesvdj(handle, m, n, a, lda, s, u, ldu, v, ldv, work, lwork, info, params, batch);                     \
  }
FAKE_GESVDJ(S, float)
FAKE_GESVDJ(D, double)
cusolverStatus_t cusolverDnDsyevjBatched_bufferSize(cusolverDnHandle_t, cusolverEigMode_t, cublasFillMode_t, int n,
                                                    const double*, int, const double*, int* length, syevjInfo_t,
                                                    int batch) {
  return *length = n * batch, CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnDsyevjBatched(cusolverDnHandle_t, cusolverEigMode_t, cublasFillMode_t uplo, int n, double* a,
                                         int lda, double* w, double*, int length, int* info, syevjInfo_t params,
                                         int batch) {
  if (params == nullptr || uplo != CUBLAS_FILL_MODE_LOWER || length < n * batch) return kSolverInvalid;
  for (int p = 0; p < batch; ++p) eigen(n, a + static_cast<long>(p) * lda * n, lda, w + p * n), info[p] = 0;
  return CUSOLVER_STATUS_SUCCESS;
}
#if FAKE_CUDA_MAJOR == 13
cusolverStatus_t cusolverDnCreateParams(cusolverDnParams_t* params) {
  return *params = new cusolverDnParams, CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnXsyevBatched_bufferSize(cusolverDnHandle_t, cusolverDnParams_t, cusolverEigMode_t,
                                                   cublasFillMode_t, int64_t n, cudaDataType, const void*, int64_t,
                                                   cudaDataType, const void*, cudaDataType, size_t* device,
                                                   size_t* host, int64_t batch) {
  return *device = n * batch * 8, *host = 64, CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnXsyevBatched(cusolverDnHandle_t, cusolverDnParams_t params, cusolverEigMode_t,
                                        cublasFillMode_t uplo, int64_t n, cudaDataType type, void* a, int64_t lda,
                                        cudaDataType, void* w, cudaDataType, void*, size_t device, void* host,
                                        size_t host_bytes, int* info, int64_t batch) {
  if (params == nullptr || type != CUDA_R_64F || uplo != CUBLAS_FILL_MODE_LOWER || host == nullptr || host_bytes < 64 ||
      device < static_cast<size_t>(n * batch * 8)) {
    return kSolverInvalid;
  }
  for (int64_t p = 0; p < batch; ++p) {
    eigen<double>(n, static_cast<double*>(a) + p * lda * n, lda, static_cast<double*>(w) + p * n);
    info[p] = 0;
  }
  return CUSOLVER_STATUS_SUCCESS;
}
#endif
#endif

}  // extern "C"
