"""Builds ``csrc`` into ``lowrank_kernels.backends.native._csrc``. Everything else is in pyproject.toml.

The extension knows nothing of torch's C++ ABI (it works on addresses), so one build serves every torch, and the
build needs a C++ compiler and pybind11 alone: no torch, no CUDA toolkit. Without a compiler the package installs
all the same, and ``lowrank_kernels.explain()`` says what is missing.
"""

import os
import sys
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

WINDOWS = sys.platform == "win32"
OPENMP = ["/openmp"] if WINDOWS else ([] if sys.platform == "darwin" else ["-fopenmp"])
OPTIMIZE = ["/O2"] if WINDOWS else ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fvisibility=hidden"]

extension = Pybind11Extension(
    "lowrank_kernels.backends.native._csrc",
    sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp") + glob("csrc/cuda/*.cpp")),
    depends=sorted(glob("csrc/**/*.h", recursive=True)),
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=OPTIMIZE + OPENMP,
    extra_link_args=[] if WINDOWS else OPENMP + (["-ldl"] if sys.platform.startswith("linux") else []),
    # A machine without a compiler gets the package without the native backend instead of an error.
    optional=os.environ.get("LOWRANK_KERNELS_REQUIRE_NATIVE") != "1",
)

ParallelCompile("LOWRANK_KERNELS_BUILD_JOBS", default=0).install()
setup(ext_modules=[extension], cmdclass={"build_ext": build_ext})
