"""C++ kernels of plugins for CPUs, compiled on first use, and headers for them.

:class:`CompiledKernels` builds, locks, chooses the instruction set and registers operators. The headers in ``include``
(``#include <arctic/...>``) have products of rows and encoded weights for AVX-512, AVX2 and any other processor; what a
plugin adds is how its codes become numbers:

- ``kernels.h``: encoded weights, formats, and the table of functions of an instruction set;
- ``portable.h`` and ``avx512.h``: decoding and products, as templates of a format;
- ``operators.h``: arguments, threads, experts, and the choice of a table.
"""

from arctic_plugins.kernels.library import INSTRUCTION_SETS, BuildError, CompiledKernels, obstacle

__all__ = ["INSTRUCTION_SETS", "BuildError", "CompiledKernels", "obstacle"]
