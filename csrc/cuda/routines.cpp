#include "cuda/routines.h"

#include <string>

namespace lowrank {
namespace cuda {
namespace {

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// The two precisions of each routine under one name.
template <class T>
struct Typed;

template <>
struct Typed<float> {
  static constexpr auto gemm = &Libraries::cublasSgemmStridedBatched;
  static constexpr auto trsm = &Libraries::cublasStrsmBatched;
  static constexpr auto geqrf = &Libraries::cublasSgeqrfBatched;
  static constexpr auto gesvdj_size = &Libraries::cusolverDnSgesvdjBatched_bufferSize;
  static constexpr auto gesvdj = &Libraries::cusolverDnSgesvdjBatched;
};

template <>
struct Typed<double> {
  static constexpr auto gemm = &Libraries::cublasDgemmStridedBatched;
  static constexpr auto trsm = &Libraries::cublasDtrsmBatched;
  static constexpr auto geqrf = &Libraries::cublasDgeqrfBatched;
  static constexpr auto gesvdj_size = &Libraries::cusolverDnDgesvdjBatched_bufferSize;
  static constexpr auto gesvdj = &Libraries::cusolverDnDgesvdjBatched;
};

// Calls body(T{}) with T = float or double.
template <class Body>
auto in_precision(bool is_double, Body body) {
  return is_double ? body(double{}) : body(float{});
}

}  // namespace

// While it lives: the calling thread is on the place's device, and the place's handles are this thread's alone.
class Routines::InUse {
 public:
  InUse(Routines& routines, const Place& place, bool needs_cublas)
      : libraries_(*routines.libraries_), device_(place.device) {
    libraries_.cudaGetDevice(&previous_);
    if (previous_ != device_) libraries_.cudaSetDevice(device_);
    try {
      {
        std::lock_guard<std::mutex> lock(routines.contexts_lock_);
        auto& slot = routines.contexts_[{place.device, place.stream}];
        if (!slot) slot = std::make_unique<Context>();
        context_ = slot.get();
      }
      lock_ = std::unique_lock<std::mutex>(context_->in_use);
      if (needs_cublas) {
        prepare_cublas(place);
      } else {
        prepare_cusolver(place);
      }
    } catch (...) {
      restore_device();
      throw;
    }
  }
  ~InUse() { restore_device(); }
  InUse(const InUse&) = delete;
  InUse& operator=(const InUse&) = delete;

  Context* operator->() const { return context_; }

 private:
  void prepare_cublas(const Place& place) {
    if (context_->cublas == nullptr) {
      cublasHandle_t handle = nullptr;
      libraries_.cublasCreate_v2(&handle);
      try {
        libraries_.cublasSetStream_v2(handle, at<CUstream_st>(place.stream));
      } catch (...) {
        libraries_.cublasDestroy_v2(handle);
        throw;
      }
      context_->cublas = handle;
    }
    if (context_->workspace != place.workspace) {
      libraries_.cublasSetWorkspace_v2(context_->cublas, at<void>(place.workspace), place.workspace_bytes);
      context_->workspace = place.workspace;
    }
  }

  void prepare_cusolver(const Place& place) {
    if (context_->cusolver != nullptr) return;
    cusolverDnHandle_t handle = nullptr;
    libraries_.cusolverDnCreate(&handle);
    try {
      libraries_.cusolverDnSetStream(handle, at<CUstream_st>(place.stream));
    } catch (...) {
      libraries_.cusolverDnDestroy(handle);
      throw;
    }
    context_->cusolver = handle;
  }

  void restore_device() noexcept {
    try {
      if (previous_ != device_) libraries_.cudaSetDevice(previous_);
    } catch (const CudaLibraryError&) {
      // The call's own outcome matters more than the thread's idea of the current device.
    }
  }

  Libraries& libraries_;
  int device_;
  int previous_ = 0;
  Context* context_ = nullptr;
  std::unique_lock<std::mutex> lock_;
};

void Routines::gemm(const Place& place, bool is_double, bool transpose_a, bool transpose_b, int m, int n, int k,
                    double alpha, Address a, int lda, long long stride_a, Address b, int ldb, long long stride_b,
                    double beta, Address c, int ldc, long long stride_c, int batch) {
  InUse context(*this, place, true);
  in_precision(is_double, [&](auto zero) {
    using T = decltype(zero);
    const T typed_alpha = static_cast<T>(alpha), typed_beta = static_cast<T>(beta);
    ((*libraries_).*Typed<T>::gemm)(context->cublas, transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N,
                                    transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N, m, n, k, &typed_alpha, at<const T>(a), lda,
                                    stride_a, at<const T>(b), ldb, stride_b, &typed_beta, at<T>(c), ldc, stride_c,
                                    batch);
  });
}

void Routines::trsm(const Place& place, bool is_double, bool right, bool upper, bool transpose, int m, int n, Address a,
                    int lda, Address b, int ldb, int batch) {
  InUse context(*this, place, true);
  in_precision(is_double, [&](auto zero) {
    using T = decltype(zero);
    const T one = 1;
    ((*libraries_).*Typed<T>::trsm)(context->cublas, right ? CUBLAS_SIDE_RIGHT : CUBLAS_SIDE_LEFT,
                                    upper ? CUBLAS_FILL_MODE_UPPER : CUBLAS_FILL_MODE_LOWER,
                                    transpose ? CUBLAS_OP_T : CUBLAS_OP_N, CUBLAS_DIAG_NON_UNIT, m, n, &one,
                                    at<const T* const>(a), lda, at<T* const>(b), ldb, batch);
  });
}

void Routines::geqrf(const Place& place, bool is_double, int m, int n, Address a, int lda, Address tau, int batch) {
  InUse context(*this, place, true);
  int info = 0;  // one, on the host, about the arguments alone
  in_precision(is_double, [&](auto zero) {
    using T = decltype(zero);
    ((*libraries_).*Typed<T>::geqrf)(context->cublas, m, n, at<T* const>(a), lda, at<T* const>(tau), &info, batch);
  });
  if (info != 0) {
    throw CudaLibraryError("cublas<t>geqrfBatched: argument " + std::to_string(-info) + " is invalid (" +
                           std::to_string(m) + " × " + std::to_string(n) + ", batch " + std::to_string(batch) + ")");
  }
}

int Routines::gesvdj(const Place& place, bool is_double, int n, Address a, Address s, Address u, Address v,
                     Address work, int work_length, Address info, int batch) {
  InUse context(*this, place, false);
  if (context->gesvdj == nullptr) libraries_->cusolverDnCreateGesvdjInfo(&context->gesvdj);
  return in_precision(is_double, [&](auto zero) {
    using T = decltype(zero);
    int length = work_length;
    if (work == 0) {
      ((*libraries_).*Typed<T>::gesvdj_size)(context->cusolver, CUSOLVER_EIG_MODE_VECTOR, n, n, at<const T>(a), n,
                                             at<const T>(s), at<const T>(u), n, at<const T>(v), n, &length,
                                             context->gesvdj, batch);
    } else {
      ((*libraries_).*Typed<T>::gesvdj)(context->cusolver, CUSOLVER_EIG_MODE_VECTOR, n, n, at<T>(a), n, at<T>(s),
                                        at<T>(u), n, at<T>(v), n, at<T>(work), length, at<int>(info), context->gesvdj,
                                        batch);
    }
    return length;
  });
}

std::size_t Routines::syev(const Place& place, bool jacobi, int n, Address a, Address w, Address work,
                           std::size_t work_bytes, Address info, int batch) {
  InUse context(*this, place, false);
  constexpr cusolverEigMode_t kVectors = CUSOLVER_EIG_MODE_VECTOR;
  constexpr cublasFillMode_t kLower = CUBLAS_FILL_MODE_LOWER;
  if (jacobi) {
    if (context->syevj == nullptr) libraries_->cusolverDnCreateSyevjInfo(&context->syevj);
    int length = static_cast<int>(work_bytes / sizeof(double));
    if (work == 0) {
      libraries_->cusolverDnDsyevjBatched_bufferSize(context->cusolver, kVectors, kLower, n, at<const double>(a), n,
                                                     at<const double>(w), &length, context->syevj, batch);
      return static_cast<std::size_t>(length) * sizeof(double);
    }
    libraries_->cusolverDnDsyevjBatched(context->cusolver, kVectors, kLower, n, at<double>(a), n, at<double>(w),
                                        at<double>(work), length, at<int>(info), context->syevj, batch);
    return work_bytes;
  }
  if (context->params == nullptr) libraries_->cusolverDnCreateParams(&context->params);
  std::size_t device_bytes = 0, host_bytes = 0;
  libraries_->cusolverDnXsyevBatched_bufferSize(context->cusolver, context->params, kVectors, kLower, n, CUDA_R_64F,
                                                at<void>(a), n, CUDA_R_64F, at<void>(w), CUDA_R_64F, &device_bytes,
                                                &host_bytes, batch);
  if (work == 0) return device_bytes;
  if (context->host_work.size() < host_bytes) context->host_work.resize(host_bytes);
  libraries_->cusolverDnXsyevBatched(context->cusolver, context->params, kVectors, kLower, n, CUDA_R_64F, at<void>(a),
                                     n, CUDA_R_64F, at<void>(w), CUDA_R_64F, at<void>(work), work_bytes,
                                     context->host_work.data(), host_bytes, at<int>(info), batch);
  return work_bytes;
}

int Routines::cublas_handles() {
  std::lock_guard<std::mutex> lock(contexts_lock_);
  int count = 0;
  for (const auto& entry : contexts_) count += entry.second->cublas != nullptr;
  return count;
}

}  // namespace cuda
}  // namespace lowrank
