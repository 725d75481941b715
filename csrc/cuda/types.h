// The few types of cuBLAS, cuSOLVER and the CUDA runtime that our calls need, so that no CUDA header is needed to
// build. Names and values are the vendor's (CUDA 12 and 13); tests/test_cuda_host.py compares them with the real
// headers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lowrank {
namespace cuda {

using cublasHandle_t = struct cublasContext*;
using cusolverDnHandle_t = struct cusolverDnContext*;
using cusolverDnParams_t = struct cusolverDnParams*;
using gesvdjInfo_t = struct gesvdjInfo*;
using syevjInfo_t = struct syevjInfo*;
using cudaStream_t = struct CUstream_st*;

enum cublasStatus_t : int { CUBLAS_STATUS_SUCCESS = 0 };
enum cusolverStatus_t : int { CUSOLVER_STATUS_SUCCESS = 0 };
enum cudaError_t : int { cudaSuccess = 0 };

enum cublasOperation_t : int { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 };
enum cublasFillMode_t : int { CUBLAS_FILL_MODE_LOWER = 0, CUBLAS_FILL_MODE_UPPER = 1 };
enum cublasDiagType_t : int { CUBLAS_DIAG_NON_UNIT = 0 };
enum cublasSideMode_t : int { CUBLAS_SIDE_LEFT = 0, CUBLAS_SIDE_RIGHT = 1 };
enum cusolverEigMode_t : int { CUSOLVER_EIG_MODE_VECTOR = 1 };
enum cudaDataType : int { CUDA_R_32F = 0, CUDA_R_64F = 1 };

}  // namespace cuda
}  // namespace lowrank
