"""Compute the package list; everything else is in pyproject.toml.

Three top-level folders are installed as sub-packages of ``tokcc``. setuptools' discovery does not look through such a
mapping, so the packages are found here by their ``__init__.py`` files: a new sub-package cannot be forgotten.
"""

from setuptools import find_packages, setup

FOLDERS = {
    "tokcc": "tokcc",
    "tokcc.passes": "passes",
    "tokcc.kernels": "kernels",
    "tokcc.plugins_trt": "plugins_trt",
}


def packages() -> list[str]:
    found: list[str] = []
    for package, folder in FOLDERS.items():
        found.append(package)
        found.extend(f"{package}.{name}" for name in find_packages(folder))
    return found


setup(packages=packages())
