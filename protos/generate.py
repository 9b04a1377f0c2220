"""Generates `nanovllm/v1` from `protos/nanovllm/v1`: messages, services and type stubs.

Run as a script it writes into this repository (`make protos`). The build calls `generate_stubs`.
"""

import shutil
import sys
from importlib import resources
from pathlib import Path

PROTO_PACKAGE = Path("nanovllm") / "v1"


class StubGenerationError(RuntimeError):
    """protoc refused the protos; its own message is on stderr."""


def generate_stubs(output_root: Path) -> list[Path]:
    """Writes the Python package `nanovllm/v1` below `output_root`.

    Returns the generated files. Raises `StubGenerationError` if protoc fails.
    """
    from grpc_tools import protoc

    proto_root = Path(__file__).resolve().parent
    protos = sorted((proto_root / PROTO_PACKAGE).glob("*.proto"))
    package = output_root / PROTO_PACKAGE
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    well_known_types = resources.files("grpc_tools") / "_proto"
    status = protoc.main(
        [
            "protoc",
            f"--proto_path={proto_root}",
            f"--proto_path={well_known_types}",
            f"--python_out={output_root}",
            f"--grpc_python_out={output_root}",
            f"--pyi_out={output_root}",
            *(str(proto) for proto in protos),
        ]
    )
    if status != 0:
        raise StubGenerationError(f"protoc failed with status {status}")
    (package / "__init__.py").write_text('"""Generated from protos/nanovllm/v1; do not edit."""\n')
    return sorted(package.iterdir())


if __name__ == "__main__":
    for path in generate_stubs(Path(__file__).resolve().parent.parent):
        print(path, file=sys.stderr)
