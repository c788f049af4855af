"""Compiles the kernels; everything else about the package is in pyproject.toml.

They are a plain shared library for ctypes, without Python's C API. Without a C compiler the
installation goes on, and edgekit runs their numpy references.
"""

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# No -ffast-math, no fused multiply-add: predictions are the same on every machine.
FLAGS = {"msvc": ["/O2", "/std:c11", "/fp:precise"]}
# Python's own -fwrapv keeps loops over int from vectorizing: decoding took twice as long.
UNIX_FLAGS = ["-std=gnu11", "-O3", "-fno-wrapv", "-ffp-contract=off", "-fvisibility=hidden"]


class BuildLibrary(build_ext):
    """Builds a shared library that is no Python module."""

    def build_extension(self, ext: Extension) -> None:
        """Compile with the flags of the compiler at hand."""
        ext.extra_compile_args = FLAGS.get(self.compiler.compiler_type, UNIX_FLAGS)
        super().build_extension(ext)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Name no `PyInit_` function: there is none."""
        return []


setup(
    ext_modules=[
        Extension(
            "edgekit.kernels._nested",
            sources=[
                f"kernels/{name}.c"
                for name in (
                    "bitstack",
                    "blocks",
                    "level",
                    "listener",
                    "nested",
                    "nested_float",
                    "packing",
                    "slices",
                    "wide",
                    "wide_codes",
                    "wide_float",
                )
            ],
            depends=[
                f"kernels/{name}.h"
                for name in (
                    "native",
                    "blocks",
                    "dealing",
                    "shuffle",
                    "units",
                    "wide",
                    "wide_blocks",
                )
            ],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary},
)
