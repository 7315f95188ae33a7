"""Packages by name, and the C++ kernels: `kernels/` is installed as `fastppo.kernels`.

The kernels are a plain shared library (no Python, no torch headers) and optional: without a
compiler the package installs all the same, and says at run time what it runs on. They are compiled
with OpenMP and linked without: `fastppo/ops/native_library.py` says why. Clang's OpenMP is another
than the one that torch brings on Linux: with Clang the kernels run on one thread.

The library knows nothing of Python, so one wheel serves every Python of a platform: py3-none-...
`make dist` names the platform after the glibc that the library needs, and checks that.
"""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CPU = Path("kernels/cpu")


def is_clang(command):
    """Whether a compiler's command is Clang's, under whatever name."""
    try:
        shown = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return "clang" in shown.stdout


class PlainLibrary(build_ext):
    """Names the library `_native.so`, without the version of a Python; compiles on all cores."""

    def build_extension(self, ext):
        command = getattr(self.compiler, "compiler_so_cxx", None) or self.compiler.compiler_so
        if is_clang(command[:1]):
            ext.extra_compile_args.remove("-fopenmp")
        compile_in_turn = self.compiler.compile

        def compile_on_all_cores(sources, **options):
            jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
            with ThreadPoolExecutor(jobs) as pool:
                made = pool.map(lambda source: compile_in_turn([source], **options), sources)
                return [each for objects in made for each in objects]

        self.compiler.compile = compile_on_all_cores
        super().build_extension(ext)

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".so"


class AnyPython(bdist_wheel):
    """The tag of a wheel for every Python 3; for every platform, if nothing was compiled."""

    def get_tag(self):
        built = Path(self.get_finalized_command("build").build_lib, "fastppo", "_native.so")
        return "py3", "none", super().get_tag()[2] if built.is_file() else "any"


setup(
    packages=[*find_packages(include=["fastppo", "fastppo.*"]), "fastppo.kernels"],
    package_dir={"fastppo.kernels": "kernels"},
    package_data={
        "fastppo": ["py.typed"],
        "fastppo.kernels": ["README.md", "*.py", "cpu/*.cpp", "cpu/*.h"],
    },
    include_package_data=False,
    cmdclass={"build_ext": PlainLibrary, "bdist_wheel": AnyPython},
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
