"""Packages by name, and the C++ kernels: `kernels/` is installed as `fastppo.kernels`.

The kernels are a plain shared library (no Python, no torch headers) and optional: without a
compiler the package installs all the same, and says at run time what it runs on. They are compiled
with OpenMP and linked without: `fastppo/ops/native_library.py` says why.
"""

from pathlib import Path

from setuptools import Extension, find_packages, setup

CPU = Path("kernels/cpu")

setup(
    packages=[*find_packages(include=["fastppo", "fastppo.*"]), "fastppo.kernels"],
    package_dir={"fastppo.kernels": "kernels"},
    package_data={
        "fastppo": ["py.typed"],
        "fastppo.kernels": ["README.md", "*.py", "cpu/*.cpp", "cpu/*.h"],
    },
    include_package_data=False,
    ext_modules=[
        Extension(
            "fastppo._native",
            sources=sorted(str(path) for path in CPU.glob("*.cpp")),
            depends=sorted(str(path) for path in CPU.glob("*.h")),
            extra_compile_args=["-std=c++17", "-O3", "-fopenmp", "-fno-math-errno"],
            language="c++",
            optional=True,
        )
    ],
)
