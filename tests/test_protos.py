"""The generated stubs are those of the protos."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_stubs_in_use_match_the_protos(tmp_path: Path):
    pytest.importorskip("grpc_tools", reason="needs grpcio-tools")
    spec = importlib.util.spec_from_file_location("generate", ROOT / "protos" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    fresh = {path.name: path.read_text() for path in generate.generate_stubs(tmp_path)}
    in_use = ROOT / generate.PROTO_PACKAGE
    assert set(fresh) == {path.name for path in in_use.iterdir() if path.is_file()}
    stale = [name for name, text in fresh.items() if (in_use / name).read_text() != text]
    assert not stale, f"run `make protos`: {', '.join(stale)} do not match the protos"
