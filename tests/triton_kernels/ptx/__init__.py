"""An emulator of PTX, so that what Triton compiles for a GPU runs where there is none.

``python -m pytest -p ptx.plugin tests/triton_kernels/test_triton_linalg.py`` (TRITON_INTERPRET=0, tests/triton_kernels on PYTHONPATH)
runs any tests of Triton's kernels in it; ``test_triton_ptx.py`` chooses some.

``parse``         the text of one kernel → instructions
``memory``        bytes that threads share; out-of-bounds and misaligned accesses and races are errors
``cta``           the threads of one program: registers, divergence, barriers
``instructions``  a function for each opcode
``plugin``        Triton's launches → the emulator

Modelled: each thread's registers and branches; ``bar.sync``; the specialization by arguments and all layouts that Triton chooses; copies by
``cp.async``, whose destination holds NaN until they are waited for; shared memory, which holds NaN at first; the fragments of ``ldmatrix``,
``stmatrix``, ``mma`` and ``wgmma``; conflicts between warps without a barrier between them, and between programs of one launch.

Not modelled: time; an order of memory accesses within a warp other than the program's; the proxies' fences and how long ``wgmma`` reads
its operands; the exact rounding of approximate instructions, of fp64's ``fma`` (80 bits, then 64) and of sums in matrix instructions; what
ptxas does with the text. Writing the value that is there already is no race: threads that hold the same element may all store it; within
one warp such values may differ, as by a last bit where lanes fuse a product into a sum each for itself.
"""
