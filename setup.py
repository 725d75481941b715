"""Builds ``csrc`` into ``lowrank_kernels.backends.native._csrc``. Everything else is in pyproject.toml.

The extension knows nothing of torch's C++ ABI (it reads tensors through DLPack, or is given addresses), so one build
serves every torch, and the build needs a C++ compiler and pybind11 alone: no torch, no CUDA toolkit. Without a
compiler the package installs all the same, prints what was lost, and ``lowrank_kernels.explain()`` says it again;
LOWRANK_KERNELS_REQUIRE_NATIVE=1 makes any failure fatal.
"""

import os
import sys
import tempfile
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CompileError, ExecError, LinkError

WINDOWS = sys.platform == "win32"
REQUIRED = os.environ.get("LOWRANK_KERNELS_REQUIRE_NATIVE") == "1"
LOST = """
lowrank_kernels: the native part (csrc) was NOT built: {cause}
  What is lost: the compiled CPU kernels and the path to cuSOLVER/cuBLAS. Their operations run on the reference backend
  (plain PyTorch), slower and with the same results; Triton is not affected.
  To get them: install a C++17 compiler (g++ 11 or newer, clang++ 14 or newer) and install this package again;
  LOWRANK_KERNELS_REQUIRE_NATIVE=1 turns this notice into an error.
"""


class BuildNative(build_ext):
    """Uses OpenMP where this compiler has it, and says clearly what is lost when the native part does not build."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        openmp = self._openmp_flags()
        ext.extra_compile_args = [*ext.extra_compile_args, *openmp]
        ext.extra_link_args = [*ext.extra_link_args, *([] if WINDOWS else openmp)]
        try:
            super().build_extension(ext)
        except Exception as error:
            if not ext.optional:
                raise
            # Printed, because pip and the build front ends filter warnings; the base class skips the extension then.
            print(LOST.format(cause=error), file=sys.stderr, flush=True)
            raise CompileError(str(error)) from error
        if not openmp:
            print("lowrank_kernels: this compiler has no OpenMP; the CPU kernels will use one thread", file=sys.stderr, flush=True)

    def _openmp_flags(self) -> list[str]:
        """What switches OpenMP on; nothing where a test program does not compile and link with it."""
        if WINDOWS:
            return ["/openmp"]
        flags = ["-fopenmp"]
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "test.cpp"
            source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=flags)
                self.compiler.link_executable(objects, "test", output_dir=folder, extra_postargs=flags, target_lang="c++")
            except (CompileError, LinkError, ExecError):
                return []
        return flags


extension = Pybind11Extension(
    "lowrank_kernels.backends.native._csrc",
    sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp") + glob("csrc/cuda/*.cpp")),
    depends=sorted(glob("csrc/**/*.h", recursive=True)),
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=["/O2"] if WINDOWS else ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"],
    extra_link_args=["-ldl"] if sys.platform.startswith("linux") else [],
    optional=not REQUIRED,
)

ParallelCompile("LOWRANK_KERNELS_BUILD_JOBS", default=0).install()
setup(ext_modules=[extension], cmdclass={"build_ext": BuildNative})
