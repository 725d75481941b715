"""The cuSOLVER/cuBLAS path, as far as a machine without a GPU can check it, and on a GPU when there is one.

* Our prototypes and constants against the vendor's headers, our symbol names against the vendor's libraries (the
  ``nvidia-*`` wheels; skipped with the reason where they are not installed).
* The loader's answers when libraries or symbols are missing.
* The algorithms over a PyTorch stand-in of the batched routines, and over host-memory imitations of libcudart, libcublas
  and libcusolver (``fake_cuda.cpp``) which the real loader opens and the real host code calls.
* On CUDA: against the reference.
"""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _numerics import orthogonality
from cuda_standin import TorchPrimitives

from lowrank_kernels.backends.extension import csrc
from lowrank_kernels.backends.reference import qr as reference_qr
from lowrank_kernels.backends.reference import svd_product as reference_svd
from lowrank_kernels.backends.registry import launch_count

cuda_libraries = pytest.importorskip(
    "lowrank_kernels.backends.native.cuda_libraries", reason="the native backend is not built", exc_type=ImportError
)

from lowrank_kernels.backends.native import cuda_choices, cuda_lists, cuda_primitives, cuda_qr, cuda_svd_product, cuda_tsqr  # noqa: E402

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
COMPILER = next((found for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (found := shutil.which(name))), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (CXX, c++, g++, clang++)")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="no CUDA device")
FILES = {
    13: {"cudart": "libcudart.so.13", "cublas": "libcublas.so.13", "cusolver": "libcusolver.so.12"},
    12: {"cudart": "libcudart.so.12", "cublas": "libcublas.so.12", "cusolver": "libcusolver.so.11"},
}


# --- The vendor's headers and libraries ------------------------------------------------------------------------------------


def vendor_file(major: int, name: str) -> Path:
    """A library of the wheels of CUDA ``major``, or skip."""
    for folder in cuda_libraries.library_folders():
        path = Path(folder) / FILES[major][name]
        if path.is_file():
            return path
    suffix = "" if major == 13 else f"-cu{major}"
    pytest.skip(
        f"{FILES[major][name]} is in no nvidia wheel: install nvidia-cusolver{suffix} nvidia-cublas{suffix} nvidia-cuda-runtime{suffix}, "
        f"or name the lib folders of such wheels in {cuda_libraries.FOLDERS_VARIABLE}"
    )


#: The one header that the runtime wheel leaves to another wheel; it only defines decorations. Searched last.
HOST_DEFINES = """
#define __host__
#define __device__
#define __global__
#define __builtin_align__(n) __attribute__((aligned(n)))
#define __align__(n) __attribute__((aligned(n)))
#define CUDARTAPI
#define CUDARTAPI_CDECL
#define __cudart_builtin__
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __location__(a)
#define __forceinline__ inline
#define __inline_hint__
"""

PROTOTYPES = """
#include <cstdint>
#include <type_traits>
// The half types' headers need yet another wheel (nvidia-cuda-cccl); their names are all that the prototypes need.
#define __CUDA_FP16_H__
#define __CUDA_BF16_H__
struct __half;
struct __nv_bfloat16;
#include <cuda_runtime_api.h>
#include <cublas_v2.h>
#include <cusolverDn.h>
#include "cuda/types.h"

#define LOWRANK_SYMBOL(library, name, status, arguments) \\
  static_assert(std::is_same_v<decltype(::name), status arguments>, "prototype of " #name);
#include "cuda/symbols.h"

#define SAME(name) static_assert(static_cast<int>(::name) == static_cast<int>(lowrank::cuda::name), "value of " #name);
SAME(CUBLAS_STATUS_SUCCESS) SAME(CUSOLVER_STATUS_SUCCESS) SAME(cudaSuccess)
SAME(CUBLAS_OP_N) SAME(CUBLAS_OP_T)
SAME(CUBLAS_FILL_MODE_LOWER) SAME(CUBLAS_FILL_MODE_UPPER) SAME(CUBLAS_DIAG_NON_UNIT)
SAME(CUBLAS_SIDE_LEFT) SAME(CUBLAS_SIDE_RIGHT) SAME(CUSOLVER_EIG_MODE_VECTOR) SAME(CUDA_R_32F) SAME(CUDA_R_64F)

// An enumeration travels like its underlying integer, an opaque pointer like any other.
#define AS_WIDE(name) static_assert(sizeof(::name) == sizeof(lowrank::cuda::name), "size of " #name);
AS_WIDE(cublasStatus_t) AS_WIDE(cusolverStatus_t) AS_WIDE(cudaError_t) AS_WIDE(cublasOperation_t)
AS_WIDE(cublasFillMode_t) AS_WIDE(cublasDiagType_t) AS_WIDE(cublasSideMode_t) AS_WIDE(cusolverEigMode_t) AS_WIDE(cudaDataType)
#define IS_POINTER(name) static_assert(std::is_pointer_v<::name> && std::is_pointer_v<lowrank::cuda::name>, "kind of " #name);
IS_POINTER(cublasHandle_t) IS_POINTER(cusolverDnHandle_t) IS_POINTER(cusolverDnParams_t) IS_POINTER(gesvdjInfo_t)
IS_POINTER(syevjInfo_t) IS_POINTER(cudaStream_t)

// The names that error messages give to status codes.
static_assert(cudaErrorMemoryAllocation == 2 && cudaErrorInitializationError == 3 && cudaErrorInsufficientDriver == 35 &&
              cudaErrorNoDevice == 100 && cudaErrorInvalidDevice == 101);
static_assert(CUBLAS_STATUS_NOT_INITIALIZED == 1 && CUBLAS_STATUS_ALLOC_FAILED == 3 && CUBLAS_STATUS_INVALID_VALUE == 7 &&
              CUBLAS_STATUS_ARCH_MISMATCH == 8 && CUBLAS_STATUS_MAPPING_ERROR == 11 && CUBLAS_STATUS_EXECUTION_FAILED == 13 &&
              CUBLAS_STATUS_INTERNAL_ERROR == 14 && CUBLAS_STATUS_NOT_SUPPORTED == 15 && CUBLAS_STATUS_LICENSE_ERROR == 16);
static_assert(CUSOLVER_STATUS_NOT_INITIALIZED == 1 && CUSOLVER_STATUS_ALLOC_FAILED == 2 && CUSOLVER_STATUS_INVALID_VALUE == 3 &&
              CUSOLVER_STATUS_ARCH_MISMATCH == 4 && CUSOLVER_STATUS_MAPPING_ERROR == 5 && CUSOLVER_STATUS_EXECUTION_FAILED == 6 &&
              CUSOLVER_STATUS_INTERNAL_ERROR == 7 && CUSOLVER_STATUS_MATRIX_TYPE_NOT_SUPPORTED == 8 &&
              CUSOLVER_STATUS_NOT_SUPPORTED == 9 && CUSOLVER_STATUS_ZERO_PIVOT == 10 && CUSOLVER_STATUS_INVALID_LICENSE == 11 &&
              CUSOLVER_STATUS_INVALID_WORKSPACE == 31);
"""


def compile_prototypes(folder: Path, major: int, source: str) -> subprocess.CompletedProcess[str]:
    """Compile ``source`` against the headers that lie beside the wheels' libraries."""
    includes = {vendor_file(major, name).parent.parent / "include" for name in FILES[major]}
    (folder / "last" / "crt").mkdir(parents=True, exist_ok=True)
    (folder / "last" / "crt" / "host_defines.h").write_text(HOST_DEFINES)
    (folder / "prototypes.cpp").write_text(source)
    command = [COMPILER, "-std=c++17", "-fsyntax-only", "-w", f"-I{CSRC}", *(f"-isystem{path}" for path in sorted(includes))]
    command += ["-idirafter", folder / "last", folder / "prototypes.cpp"]
    return subprocess.run(command, capture_output=True, text=True)


@needs_compiler
@pytest.mark.parametrize("major", [13, 12])
def test_prototypes_are_the_vendors(tmp_path: Path, major: int) -> None:
    result = compile_prototypes(tmp_path, major, PROTOTYPES)
    assert result.returncode == 0, result.stderr[:4000]
    # The check can fail: one wrong parameter is found, and named.
    wrong = PROTOTYPES.replace('#include "cuda/symbols.h"', "LOWRANK_SYMBOL(x, cublasDestroy_v2, cublasStatus_t, (int))")
    result = compile_prototypes(tmp_path, major, wrong)
    assert result.returncode != 0 and "prototype of cublasDestroy_v2" in result.stderr


@pytest.mark.parametrize("major", [13, 12])
def test_symbols_are_in_the_vendors_libraries(major: int) -> None:
    names = csrc.CudaRoutines([major], [], False, False).symbol_names()
    assert len(names) == len(set(names)) > 20
    for library, prefixes in (("cudart", ("cudaG", "cudaS", "cudaR")), ("cublas", ("cublas",)), ("cusolver", ("cusolver",))):
        with vendor_file(major, library).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as image:
            absent = [name for name in names if name.startswith(prefixes) and image.find(b"\0" + name.encode() + b"\0") < 0]
        assert not absent


@pytest.mark.parametrize("major", [13, 12])
def test_the_loader_resolves_every_symbol_of_the_real_libraries(major: int) -> None:
    for name in FILES[major]:
        vendor_file(major, name)
    folders = cuda_libraries.library_folders()
    status = csrc.CudaRoutines([major], folders, False, False).status()
    for name, library in status["libraries"].items():
        if library["error"]:
            assert library["soname"] in library["error"]
            pytest.skip(f"{name} does not open here (its own dependencies are other wheels): {library['error']}")
        assert library["origin"] == "folder" and library["path"].endswith(FILES[major][name])
    assert status["missing_symbols"] == [] and status["cuda_major"] == major
    assert status["cuda_runtime_version"] // 1000 == major and status["cusolver_version"] > 11000


def test_every_symbol_asked_for_is_in_the_table() -> None:
    names = set(csrc.CudaRoutines([13], [], False, False).symbol_names())
    asked = [cuda_qr.SYMBOLS, cuda_svd_product.SOLVER_SYMBOLS, cuda_svd_product.JACOBI_SYMBOLS]
    asked += [cuda_svd_product.XSYEV_SYMBOLS, cuda_svd_product.SYEVJ_SYMBOLS]
    assert set().union(*asked) <= names


# --- The loader ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders with imitations of the libraries of CUDA 13 and 12."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    folders = {}
    for major, files in FILES.items():
        folders[major] = tmp_path_factory.mktemp(f"cuda{major}")
        for name, soname in files.items():
            command = [COMPILER, "-std=c++17", "-O2", "-w", "-shared", "-fPIC", f"-I{CSRC}", f"-DFAKE_{name.upper()}"]
            command += [f"-DFAKE_CUDA_MAJOR={major}", TESTS / "fake_cuda.cpp", "-o", folders[major] / soname]
            subprocess.run(command, check=True, capture_output=True)
    return folders


def open_fakes(*folders: Path, majors: tuple[int, ...] = (13, 12)):
    return csrc.CudaRoutines(list(majors), [str(folder) for folder in folders], False, False)


def test_nothing_found_says_what_was_tried(tmp_path: Path) -> None:
    routines = open_fakes(tmp_path)
    status = routines.status()
    assert status["cuda_major"] == 0 and set(status["missing_symbols"]) == set(routines.symbol_names())
    error = status["libraries"]["cusolver"]["error"]
    assert "libcusolver.so.12 was not found" in error and "libcusolver.so.11 was not found" in error and "not in any of 1 folders" in error
    place = csrc.CudaPlace(0, 0, 0, 0)
    with pytest.raises(cuda_libraries.CudaLibraryError, match=r"cudaGetDevice is missing: libcudart\.so\.13 was not found"):
        routines.geqrf(place, False, 4, 2, 0, 4, 0, 0)


def test_a_library_that_does_not_open_says_why(tmp_path: Path) -> None:
    (tmp_path / "libcublas.so.13").write_bytes(b"not a library")
    error = open_fakes(tmp_path, majors=(13,)).status()["libraries"]["cublas"]["error"]
    assert "libcublas.so.13 was not found" in error and "libcublas.so.13: file too short" in error


def test_unknown_cuda_version_is_an_error() -> None:
    with pytest.raises(cuda_libraries.CudaLibraryError, match="no known sonames for CUDA 7"):
        open_fakes(majors=(7,))


def test_versions_do_not_mix(fakes: dict[int, Path], tmp_path: Path) -> None:
    status = open_fakes(fakes[13], fakes[12]).status()
    assert status["cuda_major"] == 13 and status["missing_symbols"] == []
    assert {library["origin"] for library in status["libraries"].values()} == {"folder"}
    # A lone libcublas of 13 beside a whole CUDA 12: version 13 is chosen, and what it lacks is said, not borrowed from 12.
    shutil.copy(fakes[13] / "libcublas.so.13", tmp_path)
    status = open_fakes(tmp_path, fakes[12]).status()
    assert status["cuda_major"] == 13 and not status["libraries"]["cusolver"]["path"]
    assert "cusolverDnCreate" in status["missing_symbols"] and "cublasCreate_v2" not in status["missing_symbols"]


@needs_compiler
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sonames are an ELF matter")
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch brings its own CUDA libraries into every process")
def test_the_copy_in_the_process_decides(tmp_path: Path) -> None:
    """Another CUDA version in a folder must not win over the one that is loaded; the rest is found beside the loaded one."""
    for name in ("cudart", "cublas"):
        command = [COMPILER, "-std=c++17", "-w", "-shared", "-fPIC", f"-I{CSRC}", f"-DFAKE_{name.upper()}", "-DFAKE_CUDA_MAJOR=12"]
        command += [f"-Wl,-soname,{FILES[12][name]}", TESTS / "fake_cuda.cpp", "-o", tmp_path / FILES[12][name]]
        subprocess.run(command, check=True, capture_output=True)
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / FILES[12]["cublas"], tmp_path / "other" / FILES[13]["cublas"])
    # In a process of its own: a false libcudart under its true soname would serve whoever asks for it later.
    script = (
        "import ctypes, sys; from lowrank_kernels.backends.native import cuda_libraries as c\n"
        "ctypes.CDLL(sys.argv[1])\n"
        "status = c.csrc.CudaRoutines([13, 12], [sys.argv[2]], True, False).status()\n"
        "print(status['cuda_major'], *(x['origin'] for x in status['libraries'].values()), sep='|')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])}
    arguments = [sys.executable, "-c", script, str(tmp_path / FILES[12]["cudart"]), str(tmp_path / "other")]
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.strip() == "12|already loaded|folder|"


def test_a_symbol_that_an_older_library_lacks_is_named_and_the_rest_works(fakes: dict[int, Path]) -> None:
    routines = open_fakes(fakes[12])
    status = routines.status()
    assert status["cuda_major"] == 12
    assert set(status["missing_symbols"]) == set(cuda_svd_product.XSYEV_SYMBOLS)
    assert not cuda_primitives.has_xsyev(status) and cuda_primitives.has_xsyev(open_fakes(fakes[13]).status())
    matrix = torch.eye(2, dtype=torch.float64)
    place = csrc.CudaPlace(0, 0, 0, 0)
    message = r"cusolverDnCreateParams is missing: libcusolver\.so\.11 .* was opened"
    with pytest.raises(cuda_libraries.CudaLibraryError, match=message):
        routines.syev(place, False, 2, matrix.data_ptr(), 0, 0, 0, 0, 1)


def test_a_failing_call_names_symbol_status_and_library(fakes: dict[int, Path]) -> None:
    routines = open_fakes(fakes[13])
    with pytest.raises(cuda_libraries.CudaLibraryError, match=r"cublasSgeqrfBatched returned CUBLAS_STATUS_INVALID_VALUE \(7\), libcublas"):
        routines.geqrf(csrc.CudaPlace(0, 0, 0, 0), False, 4, 2, 0, 3, 0, 1)
    with pytest.raises(cuda_libraries.CudaLibraryError, match=r"cudaSetDevice returned cudaErrorInvalidDevice \(101\)"):
        routines.geqrf(csrc.CudaPlace(2, 0, 0, 0), False, 4, 2, 0, 4, 0, 0)


def test_handles_are_kept_per_device_and_stream_and_threads_take_turns(fakes: dict[int, Path]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    routines = open_fakes(fakes[13])

    def work(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        a, b, out = (torch.randn(5, 6, 6, generator=generator) for _ in range(3))
        primitives = cuda_primitives.CudaPrimitives(routines, seed % 2, 64 * (seed % 3), None)
        primitives.matmul(a, b, out)
        return (out - a @ b).abs().max().item()

    with ThreadPoolExecutor(8) as pool:
        errors = list(pool.map(work, range(60)))
    assert max(errors) < 1e-5
    assert routines.cublas_handles() == 6


def test_report_is_readable_without_libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status = open_fakes(tmp_path, majors=(13,)).status()
    monkeypatch.setattr(cuda_libraries, "cuda_status", lambda: status)
    lines = cuda_libraries.report()
    assert len(lines) == 3 and all("was not found" in line for line in lines)
    cuda_libraries.problem.cache_clear()
    assert "libcublas.so.13 was not found" in cuda_libraries.problem("cublasCreate_v2")
    cuda_libraries.problem.cache_clear()


def test_report_names_missing_symbols_of_found_libraries(monkeypatch: pytest.MonkeyPatch, fakes: dict[int, Path]) -> None:
    status = open_fakes(fakes[12]).status()
    monkeypatch.setattr(cuda_libraries, "cuda_status", lambda: status)
    text = "\n".join(cuda_libraries.report())
    assert "cuda_runtime_version: 12000" in text and "missing symbols: cusolverDnCreateParams" in text
    cuda_libraries.problem.cache_clear()
    assert cuda_libraries.problem(*cuda_qr.SYMBOLS) is None
    assert "cusolverDnXsyevBatched" in cuda_libraries.problem(*cuda_svd_product.XSYEV_SYMBOLS)
    cuda_libraries.problem.cache_clear()


def test_folders_come_from_the_variable_and_from_both_layouts_of_the_wheels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    expected = []
    for part in ("cu13", "cublas"):
        (tmp_path / "nvidia" / part / "lib").mkdir(parents=True)
        expected.append(str(tmp_path / "nvidia" / part / "lib"))
    script = "from lowrank_kernels.backends.native.cuda_libraries import library_folders; print('\\n'.join(library_folders()))"
    environment = {**os.environ, cuda_libraries.FOLDERS_VARIABLE: f"/first{os.pathsep}/second"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(TESTS.parent), environment.get("PYTHONPATH", "")])
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    found = result.stdout.split()
    assert found[:2] == ["/first", "/second"] and set(expected) <= set(found)


@pytest.mark.parametrize("operation", ["qr", "svd"])
def test_verify_refuses_what_is_not_on_cuda(operation: str) -> None:
    x = torch.zeros(4, 2)
    if operation == "qr":
        ok, reason = cuda_qr.verify([x], None, [x], torch.zeros(1, 2, 2))
    else:
        ok, reason = cuda_svd_product.verify([x], [x], [x], torch.zeros(1, 2), [x])
    assert not ok and "on cpu" in reason


# --- The algorithms, over a stand-in and over the imitated libraries -------------------------------------------------------


@pytest.fixture(params=["torch", "cuda13", "cuda12"])
def primitives(request: pytest.FixtureRequest):
    """The stand-in, and the real host code on top of the imitated libraries of two CUDA versions."""
    if request.param == "torch":
        return TorchPrimitives()
    folder = request.getfixturevalue("fakes")[int(request.param[-2:])]
    workspace = torch.empty(64, dtype=torch.uint8)
    return cuda_primitives.CudaPrimitives(open_fakes(folder), 0, 0, workspace)


HEIGHTS = (384, 150, 384, 700, 129)
RANKS = (1, 4, 8, 16, 33, 64)


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def make(heights: tuple[int, ...], rank: int, dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    """Random factors, contiguous, as transposes (``A.mT``), and as slices of something wider, in turn."""
    found = []
    for index, height in enumerate(heights):
        height = max(height, rank)
        shape = ((height, rank), (rank, height), (height, 2 * rank))[index % 3]
        x = torch.randn(shape, dtype=torch.float64, device=device).to(dtype)
        found.append((x, x.mT, x[:, ::2])[index % 3])
    return found


def nan_like(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.full_like(x, torch.nan) for x in tensors]


def run_qr(primitives, xs, previous=None):
    rank = xs[0].shape[1]
    wide = torch.float64 if xs[0].dtype == torch.float64 else torch.float32
    qs = nan_like(xs)
    rs = torch.full((len(xs), rank, rank), torch.nan, dtype=wide, device=xs[0].device)
    cuda_qr.compute_qr(primitives, xs, previous, qs, rs)
    return qs, rs


def check_qr(xs, previous, qs, rs) -> None:
    dtype, rank = xs[0].dtype, xs[0].shape[1]
    limit = 1e-5 if dtype != torch.float64 else 1e-13
    if dtype in (torch.bfloat16, torch.float16):
        limit = 2 * eps(dtype)  # Q itself is stored in it
    for index, (x, q, r) in enumerate(zip(xs, qs, rs, strict=True)):
        assert orthogonality(q) <= limit
        assert torch.equal(r, r.triu())
        # The residual of each column against that column's own length: scaling must not cost relative accuracy.
        # (Columns are brought to a largest entry of 1 before, so that no norm here over- or underflows.)
        peak = x.double().abs().amax(dim=0)
        peak = torch.where(peak > 0, peak, 1)
        wide = x.double() / peak
        length = wide.norm(dim=0)
        residual = (q.double() @ (r.double() / peak) - wide).norm(dim=0)
        assert (residual <= 20 * rank * eps(dtype) * length).all(), (index, residual / length)
        signs = r.diagonal() if previous is None else (q.double() * previous[index].double()).sum(dim=0)
        # A column that is zero (or depends on the others) may have an R_jj of rounding size only.
        assert (signs >= 0).all()


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_qr_of_ragged_lists(primitives, rank: int, dtype: torch.dtype) -> None:
    xs = make(HEIGHTS, rank, dtype)
    qs, rs = run_qr(primitives, xs)
    check_qr(xs, None, qs, rs)
    previous = [(q * torch.where(torch.rand(rank) < 0.5, -1.0, 1.0).to(dtype)).to(dtype) for q in qs]
    aligned, rs = run_qr(primitives, xs, previous)
    check_qr(xs, previous, aligned, rs)
    expected = nan_like(xs)
    reference_qr.grouped_qr(xs, previous, expected, torch.empty_like(rs))
    for q, e in zip(aligned, expected, strict=True):
        condition = torch.linalg.cond(xs[0].double()).item()
        assert (q - e).abs().max().item() <= 100 * max(condition, 10) * eps(dtype)


def spoil(x: torch.Tensor, case: str) -> torch.Tensor:
    """One hard input (rank deficient, ill-conditioned, of extreme scale) out of a random one, r ≥ 4."""
    rank = x.shape[1]
    if case == "zero":
        return torch.zeros_like(x)
    if case == "zero columns":
        x[:, 1] = 0
        x[:, rank - 1] = 0
    elif case == "equal columns":
        x[:, rank - 1] = x[:, 0]
        x[:, 2] = x[:, 0]
    elif case == "rank one":
        x[:] = x[:, :1] * torch.randn(1, rank, dtype=x.dtype)
    elif case == "kappa 1e6":
        u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
        x[:] = (u * torch.logspace(0, -6, rank, dtype=torch.float64) @ vh).to(x.dtype)
    elif case == "squares overflow":
        x *= torch.finfo(x.dtype).max / 1024  # the lengths of the columns, hence R, stay in range
    elif case == "squares underflow":
        x *= torch.finfo(x.dtype).tiny * 1024
    elif case == "graded columns":
        x *= torch.logspace(-30, 30, rank, base=10, dtype=torch.float64).to(x.dtype)
    elif case == "unit vectors":
        x[:] = torch.eye(*x.shape, dtype=x.dtype).flip(0)
    return x


CASES = ("zero", "zero columns", "equal columns", "rank one", "kappa 1e6", "squares overflow", "squares underflow",
         "graded columns", "unit vectors")  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [4, 24])
def test_qr_is_robust(primitives, case: str, dtype: torch.dtype, rank: int) -> None:
    xs = [spoil(x.contiguous(), case) if index != 1 else x for index, x in enumerate(make(HEIGHTS, rank, dtype))]
    qs, rs = run_qr(primitives, xs)
    check_qr(xs, None, qs, rs)
    again, rs_again = run_qr(primitives, xs)
    assert all(map(torch.equal, qs, again)) and torch.equal(rs, rs_again)  # the completion is deterministic
    aligned, rs = run_qr(primitives, xs, [-q for q in qs])
    assert all(torch.equal(q, -p) for q, p in zip(aligned, qs, strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_qr_keeps_nan_to_itself(primitives, bad: float) -> None:
    xs = [x.contiguous() for x in make(HEIGHTS, 8, torch.float32)]
    clean_q, clean_r = run_qr(primitives, xs)
    xs[2][5, 3] = bad  # shares its shape and blocks' batch with xs[0]
    qs, rs = run_qr(primitives, xs, clean_q)
    for index, q in enumerate(qs):
        if index == 2:
            assert q.isnan().all() and rs[index].isnan().all()
        else:
            assert torch.equal(q, clean_q[index]) and torch.equal(rs[index], clean_r[index])


def test_qr_may_write_over_the_previous_qs(primitives) -> None:
    xs = make(HEIGHTS, 8, torch.float32)
    previous = [-q for q in run_qr(primitives, xs)[0]]
    expected, rs = run_qr(primitives, xs, previous)
    rs_in_place = torch.full_like(rs, torch.nan)
    cuda_qr.compute_qr(primitives, xs, previous, previous, rs_in_place)
    assert all(map(torch.equal, previous, expected)) and torch.equal(rs, rs_in_place)


@pytest.mark.parametrize("operation", ["qr", "svd"])
def test_launches_do_not_grow_with_the_layers(fakes: dict[int, Path], operation: str) -> None:
    primitives = cuda_primitives.CudaPrimitives(open_fakes(fakes[13]), 0, 0, None)
    counts = []
    for layers in (6, 60):
        xs = make((64, 200, 200) * (layers // 3), 8, torch.float32)
        before = launch_count()
        if operation == "qr":
            run_qr(primitives, xs)
        else:
            run_svd(primitives, xs, xs, 4)
        counts.append(launch_count() - before)
    assert counts[0] == counts[1] > 0


def run_svd(primitives, lefts, rights, rank):
    wide = torch.float64 if lefts[0].dtype == torch.float64 else torch.float32
    us = [torch.full((x.shape[0], rank), torch.nan, dtype=x.dtype, device=x.device) for x in lefts]
    vs = [torch.full((x.shape[0], rank), torch.nan, dtype=x.dtype, device=x.device) for x in rights]
    ss = torch.full((len(lefts), rank), torch.nan, dtype=wide, device=lefts[0].device)
    cuda_svd_product.compute_svd_product(primitives, lefts, rights, us, ss, vs)
    return us, ss, vs


def check_svd(lefts, rights, us, ss, vs) -> None:
    dtype, rank, k = lefts[0].dtype, ss.shape[1], lefts[0].shape[1]
    tolerance = (1e-13 if dtype == torch.float64 else 1e-5) if dtype in (torch.float64, torch.float32) else 2 * eps(dtype)
    for left, right, u, s, v in zip(lefts, rights, us, ss, vs, strict=True):
        product = left.double() @ right.double().mT
        exact = torch.linalg.svdvals(product)
        largest = exact[0].item()
        assert orthogonality(u) <= tolerance and orthogonality(v) <= tolerance
        assert (s.diff() <= 0).all() and (s >= 0).all()
        # Backward error is relative to ‖left‖‖right‖, as for any method that works on the factors.
        scale = (torch.linalg.matrix_norm(left.double(), 2) * torch.linalg.matrix_norm(right.double(), 2)).item()
        assert (s.double() - exact[:rank]).abs().max().item() <= 20 * k * eps(ss.dtype) * scale
        # Optimality: what the triples leave over is what the exact truncation leaves over.
        left_over = torch.linalg.matrix_norm(product - (u.double() * s.double()) @ v.double().mT, 2).item()
        best = exact[rank].item() if rank < len(exact) else 0.0
        assert left_over <= best + 20 * k * max(eps(ss.dtype), eps(dtype)) * max(scale, largest)


@pytest.mark.parametrize("k,rank", [(1, 1), (4, 4), (16, 8), (32, 32), (33, 16), (48, 48)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_svd_of_products(primitives, k: int, rank: int, dtype: torch.dtype) -> None:
    lefts, rights = make((150, 64, 200), k, dtype), make((64, 200, 90), k, dtype)
    check_svd(lefts, rights, *run_svd(primitives, lefts, rights, rank))


@pytest.mark.parametrize("case", ["zero", "zero columns", "equal columns", "rank one", "kappa 1e6", "huge", "tiny"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("k", [8, 40])
def test_svd_is_robust(primitives, case: str, dtype: torch.dtype, k: int) -> None:
    lefts, rights = make((150, 64, 200), k, dtype), make((64, 200, 90), k, dtype)
    if case == "huge":  # squares of the factors overflow, the product does not
        big = torch.finfo(dtype).max ** 0.75
        lefts, rights = [x * big for x in lefts], [x / big for x in rights]
    elif case == "tiny":
        small = torch.finfo(dtype).tiny ** 0.75
        lefts, rights = [x * small for x in lefts], [x / small for x in rights]
    else:
        lefts = [spoil(x.contiguous(), case) for x in lefts]
    check_svd(lefts, rights, *run_svd(primitives, lefts, rights, k))


@pytest.mark.parametrize("k", [8, 40])
def test_svd_keeps_nan_to_itself(primitives, k: int) -> None:
    lefts, rights = make((150, 64, 150), k, torch.float32), make((64, 200, 64), k, torch.float32)
    clean = run_svd(primitives, lefts, rights, 4)
    rights[0] = rights[0].clone()
    rights[0][3, 1] = torch.inf
    us, ss, vs = run_svd(primitives, lefts, rights, 4)
    for index in range(3):
        for found, expected in ((us[index], clean[0][index]), (ss[index], clean[1][index]), (vs[index], clean[2][index])):
            assert found.isnan().all() if index == 0 else torch.equal(found, expected)


def test_an_iteration_that_does_not_converge_gives_nan_in_its_own_pair_only() -> None:
    class Stubborn(TorchPrimitives):
        def svd(self, cores):
            uh, s, vh = super().svd(cores)
            s[1] = torch.nan
            return uh, s, vh

    lefts, rights = make((60, 60, 60), 4, torch.float32), make((50, 50, 50), 4, torch.float32)
    us, ss, vs = run_svd(Stubborn(), lefts, rights, 2)
    for index, outputs in enumerate(zip(us, ss, vs, strict=True)):
        assert all(x.isnan().all() == (index == 1) and x.isnan().any() == (index == 1) for x in outputs)


def test_the_tree_leaves_its_padding_empty() -> None:
    """Rows of padding must stay zero in Q, or cutting them off would cost orthogonality."""
    for height, rank in ((65, 8), (130, 8), (513, 4), (8, 8), (64, 8)):
        x = torch.randn(2, rank, height, dtype=torch.float64)
        x[0, 2] = 0
        rows = cuda_choices.block_rows(rank)
        levels, _ = cuda_tsqr.factor(TorchPrimitives(), [x], rank, rows)
        q_t = cuda_tsqr.apply_q(TorchPrimitives(), levels, cuda_tsqr.identity(2, rank, x))[0]
        assert q_t.shape[2] >= height and (q_t[:, :, height:] == 0).all()


def test_buckets_and_list_order() -> None:
    xs = [torch.randn(5, 2), torch.randn(2, 7).mT, torch.randn(7, 2), torch.randn(5, 2)]
    groups = cuda_lists.buckets(xs)
    assert [bucket.indices for bucket in groups] == [[0, 3], [1], [2]]
    values = torch.cat([torch.full((len(bucket.indices),), float(index)) for index, bucket in enumerate(groups)])
    assert cuda_lists.to_list_order(values, groups).tolist() == [0.0, 1.0, 2.0, 0.0]
    split = cuda_lists.to_bucket_order(torch.arange(4.0), groups)
    assert [part.tolist() for part in split] == [[0.0, 3.0], [1.0], [2.0]]


@pytest.mark.parametrize("rank", [1, 8, 16, 17, 64, 128, 200])
def test_blocks_shrink_the_tree(rank: int) -> None:
    assert cuda_choices.block_rows(rank) >= 2 * rank


# --- On a GPU --------------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("rank", [*RANKS, 128])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gpu_qr(rank: int, dtype: torch.dtype) -> None:
    xs = make((384, 1536, 384, 4096, 129), rank, dtype, "cuda")
    xs[2] = torch.zeros_like(xs[2])
    rs = torch.full((5, rank, rank), torch.nan, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device="cuda")
    previous = nan_like(xs)
    reference_qr.grouped_qr(xs, None, previous, torch.empty_like(rs))
    previous = [-q for q in previous]
    for aligned_with in (None, previous):
        qs = nan_like(xs)
        ok, reason = cuda_qr.verify(xs, aligned_with, qs, rs)
        assert ok, reason
        cuda_qr.grouped_qr(xs, aligned_with, qs, rs)
        check_qr(xs, aligned_with, qs, rs)


@needs_gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gpu_qr_is_robust(case: str, dtype: torch.dtype) -> None:
    xs = [spoil(x.contiguous(), case).cuda() for x in make(HEIGHTS, 24, dtype)]
    qs, rs = run_qr(cuda_primitives.primitives_for(xs[0].device), xs)
    check_qr(xs, None, qs, rs)


@needs_gpu
@pytest.mark.parametrize("k,rank", [(4, 4), (16, 8), (32, 32), (33, 16), (128, 64)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank_one", [False, True])
def test_gpu_svd(k: int, rank: int, dtype: torch.dtype, rank_one: bool) -> None:
    lefts, rights = make((384, 1536, 384), k, dtype, "cuda"), make((1536, 384, 768), k, dtype, "cuda")
    if rank_one:
        lefts = [(x[:, :1] * torch.randn(1, k, dtype=dtype, device="cuda")).contiguous() for x in lefts]
    us, vs = ([torch.full((x.shape[0], rank), torch.nan, dtype=dtype, device="cuda") for x in side] for side in (lefts, rights))
    ss = torch.full((3, rank), torch.nan, dtype=dtype, device="cuda")
    ok, reason = cuda_svd_product.verify(lefts, rights, us, ss, vs)
    assert ok, reason
    cuda_svd_product.grouped_svd_product(lefts, rights, us, ss, vs)
    check_svd(lefts, rights, us, ss, vs)
    expected = torch.empty_like(ss)
    reference_svd.grouped_svd_product(lefts, rights, nan_like(us), expected, nan_like(vs))
    torch.testing.assert_close(ss, expected, rtol=1e-4 if dtype == torch.float32 else 1e-11, atol=(ss.max() * eps(dtype) * 100).item())


@needs_gpu
def test_gpu_qr_does_not_wait_for_the_device_and_follows_the_stream() -> None:
    xs = make((384, 1536, 384), 8, torch.float32, "cuda")
    qs, rs = nan_like(xs), torch.empty(3, 8, 8, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        cuda_qr.grouped_qr(xs, None, qs, rs)  # handles are made
        stream.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            cuda_qr.grouped_qr(xs, None, qs, rs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    check_qr(xs, None, qs, rs)
