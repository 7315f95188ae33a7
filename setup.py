"""Packages by name: `kernels/` is installed as `fastppo.kernels`, never as `kernels`."""

from setuptools import setup

setup(
    packages=["fastppo", "fastppo.ops", "fastppo.kernels"],
    package_dir={"fastppo.kernels": "kernels"},
    package_data={
        "fastppo": ["py.typed"],
        "fastppo.kernels": ["README.md", "*.py", "cpu/*.cpp", "cpu/*.h"],
    },
    include_package_data=False,
)
