"""The one fact pyproject.toml does not hold: where the import package fastsiam.kernels lies."""

from setuptools import setup

setup(package_dir={"fastsiam": "fastsiam", "fastsiam.kernels": "kernels"})
