import ast
from pathlib import Path

import nanovllm_core

PACKAGE = Path(nanovllm_core.__file__).parent
FORBIDDEN = {"grpc", "google", "nanovllm", "executor_service", "scheduler_service", "pickle"}


def imported_packages(source: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def test_the_model_code_knows_nothing_of_services_and_wires() -> None:
    sources = sorted(PACKAGE.rglob("*.py"))
    assert PACKAGE / "model.py" in sources
    assert {s.name: imported_packages(s) & FORBIDDEN for s in sources} == {
        s.name: set() for s in sources
    }
