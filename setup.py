"""Generates the gRPC stubs before the package is built or installed; the rest is pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "protos"))

from generate import PROTO_PACKAGE, generate_stubs  # noqa: E402


class BuildWithStubs(build_py):
    """Writes the stubs into the source tree first, so that they are packaged like any module."""

    def run(self) -> None:
        generate_stubs(ROOT)
        package = ".".join(PROTO_PACKAGE.parts)
        # Packages were looked for before; a fresh checkout has no stubs then.
        if package not in self.packages:
            self.packages.append(package)
        super().run()


setup(cmdclass={"build_py": BuildWithStubs})
