// Every foreign function that csrc/cuda calls: LOWRANK_SYMBOL(library, name, return type, (parameter types)).
// The one place where prototypes stand; the test suite compares each with the declaration in the vendor's headers.
// Included several times, with different meanings of LOWRANK_SYMBOL: no include guard.

LOWRANK_SYMBOL(kCudart, cudaGetDevice, cudaError_t, (int*))
LOWRANK_SYMBOL(kCudart, cudaSetDevice, cudaError_t, (int))
LOWRANK_SYMBOL(kCudart, cudaRuntimeGetVersion, cudaError_t, (int*))

LOWRANK_SYMBOL(kCublas, cublasCreate_v2, cublasStatus_t, (cublasHandle_t*))
LOWRANK_SYMBOL(kCublas, cublasDestroy_v2, cublasStatus_t, (cublasHandle_t))
LOWRANK_SYMBOL(kCublas, cublasSetStream_v2, cublasStatus_t, (cublasHandle_t, cudaStream_t))
LOWRANK_SYMBOL(kCublas, cublasSetWorkspace_v2, cublasStatus_t, (cublasHandle_t, void*, size_t))
LOWRANK_SYMBOL(kCublas, cublasSgemmStridedBatched, cublasStatus_t,
               (cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int, const float*, const float*, int,
                long long int, const float*, int, long long int, const float*, float*, int, long long int, int))
LOWRANK_SYMBOL(kCublas, cublasDgemmStridedBatched, cublasStatus_t,
               (cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int, const double*, const double*, int,
                long long int, const double*, int, long long int, const double*, double*, int, long long int, int))
LOWRANK_SYMBOL(kCublas, cublasStrsmBatched, cublasStatus_t,
               (cublasHandle_t, cublasSideMode_t, cublasFillMode_t, cublasOperation_t, cublasDiagType_t, int, int,
                const float*, const float* const*, int, float* const*, int, int))
LOWRANK_SYMBOL(kCublas, cublasDtrsmBatched, cublasStatus_t,
               (cublasHandle_t, cublasSideMode_t, cublasFillMode_t, cublasOperation_t, cublasDiagType_t, int, int,
                const double*, const double* const*, int, double* const*, int, int))
LOWRANK_SYMBOL(kCublas, cublasSgeqrfBatched, cublasStatus_t,
               (cublasHandle_t, int, int, float* const*, int, float* const*, int*, int))
LOWRANK_SYMBOL(kCublas, cublasDgeqrfBatched, cublasStatus_t,
               (cublasHandle_t, int, int, double* const*, int, double* const*, int*, int))

LOWRANK_SYMBOL(kCusolver, cusolverGetVersion, cusolverStatus_t, (int*))
LOWRANK_SYMBOL(kCusolver, cusolverDnCreate, cusolverStatus_t, (cusolverDnHandle_t*))
LOWRANK_SYMBOL(kCusolver, cusolverDnDestroy, cusolverStatus_t, (cusolverDnHandle_t))
LOWRANK_SYMBOL(kCusolver, cusolverDnSetStream, cusolverStatus_t, (cusolverDnHandle_t, cudaStream_t))
LOWRANK_SYMBOL(kCusolver, cusolverDnCreateGesvdjInfo, cusolverStatus_t, (gesvdjInfo_t*))
LOWRANK_SYMBOL(kCusolver, cusolverDnSgesvdjBatched_bufferSize, cusolverStatus_t,
               (cusolverDnHandle_t, cusolverEigMode_t, int, int, const float*, int, const float*, const float*, int,
                const float*, int, int*, gesvdjInfo_t, int))
LOWRANK_SYMBOL(kCusolver, cusolverDnDgesvdjBatched_bufferSize, cusolverStatus_t,
               (cusolverDnHandle_t, cusolverEigMode_t, int, int, const double*, int, const double*, const double*, int,
                const double*, int, int*, gesvdjInfo_t, int))
LOWRANK_SYMBOL(kCusolver, cusolverDnSgesvdjBatched, cusolverStatus_t,
               (cusolverDnHandle_t, cusolverEigMode_t, int, int, float*, int, float*, float*, int, float*, int, float*,
                int, int*, gesvdjInfo_t, int))
LOWRANK_SYMBOL(kCusolver, cusolverDnDgesvdjBatched, cusolverStatus_t,
               (cusolverDnHandle_t, cusolverEigMode_t, int, int, double*, int, double*, double*, int, double*, int,
                double*, int, int*, gesvdjInfo_t, int))
LOWRANK_SYMBOL(kCusolver, cusolverDnCreateSyevjInfo, cusolverStatus_t, (syevjInfo_t*))
LOWRANK_SYMBOL(kCusolver, cusolverDnDsyevjBatched_bufferSize, cusolverStatus_t,
               (cusolverDnHandle_t, cusolverEigMode_t, cublasFillMode_t, int, const double*, int, const double*, int*,
                syevjInfo_t, int))
LOWRANK_SYMBOL(kCusolver, cusolverDnDsyevjBatched, cusolverStatus_t,
               (cusolverDnHandle_t, cusolverEigMode_t, cublasFillMode_t, int, double*, int, double*, double*, int, int*,
                syevjInfo_t, int))
LOWRANK_SYMBOL(kCusolver, cusolverDnCreateParams, cusolverStatus_t, (cusolverDnParams_t*))
LOWRANK_SYMBOL(kCusolver, cusolverDnXsyevBatched_bufferSize, cusolverStatus_t,
               (cusolverDnHandle_t, cusolverDnParams_t, cusolverEigMode_t, cublasFillMode_t, int64_t, cudaDataType,
                const void*, int64_t, cudaDataType, const void*, cudaDataType, size_t*, size_t*, int64_t))
LOWRANK_SYMBOL(kCusolver, cusolverDnXsyevBatched, cusolverStatus_t,
               (cusolverDnHandle_t, cusolverDnParams_t, cusolverEigMode_t, cublasFillMode_t, int64_t, cudaDataType,
                void*, int64_t, cudaDataType, void*, cudaDataType, void*, size_t, void*, size_t, int*, int64_t))
