"""Who may import whom. The scheduler and the client run where torch is not installed."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint

ROOT = Path(__file__).resolve().parent.parent
# Package to the packages of this repository that it may import.
ALLOWED = {
    "nanovllm": set(),
    "scheduler_service": {"nanovllm"},
    "nanovllm_core": set(),
    "executor_service": {"nanovllm", "nanovllm_core"},
}
WITHOUT_TORCH = ("nanovllm", "scheduler_service")
TORCH_FAMILY = {"torch", "triton", "flash_attn", "flash_attn_interface"}
# Pure: no I/O, no clock, no sockets.
PURE = {
    "scheduler_service/scheduler.py",
    "scheduler_service/block_manager.py",
    "scheduler_service/waiting_queue.py",
    "scheduler_service/sequence.py",
    "scheduler_service/text/detokenizer.py",
    "scheduler_service/completion.py",
    "scheduler_service/queue_wait.py",
    "scheduler_service/link/executor_liveness.py",
    "scheduler_service/link/result_order.py",
    "scheduler_service/link/round_trips.py",
}
IMPURE_MODULES = {"asyncio", "grpc", "logging", "os", "random", "socket", "threading", "time"}


def sources(package: str) -> list[Path]:
    return sorted(
        path for path in (ROOT / package).rglob("*.py") if "__pycache__" not in path.parts
    )


def imports(path: Path) -> Iterator[str]:
    """Top-level packages that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            yield node.module.partition(".")[0]


def modules(package: str) -> list[str]:
    names = [path.relative_to(ROOT).with_suffix("").parts for path in sources(package)]
    return [
        ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        for parts in names
        if parts[-1] != "__main__"
    ]


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_the_design_allows(package: str):
    assert sources(package)
    for path in sources(package):
        ours = set(imports(path)) & ALLOWED.keys() - {package}
        assert ours <= ALLOWED[package], f"{path.relative_to(ROOT)} imports {ours}"


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_no_file_of_scheduler_or_client_names_torch(package: str):
    for path in sources(package):
        assert not set(imports(path)) & TORCH_FAMILY, f"{path.relative_to(ROOT)} imports torch"


def loaded_after(program: str) -> str:
    """Which of torch's family a fresh interpreter has loaded after a program."""
    report = f"\nprint(*sorted({TORCH_FAMILY!r} & sys.modules.keys()))\n"
    result = subprocess.run(
        [sys.executable, "-c", "import importlib, sys\n" + program + report],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_importing_every_module_of_scheduler_or_client_does_not_load_torch(package: str):
    program = f"for name in {modules(package)!r}:\n    importlib.import_module(name)\n"
    assert loaded_after(program) == ""


def test_tokenizing_and_rendering_a_chat_does_not_load_torch(tmp_path: Path):
    program = f"""
from pathlib import Path
from scheduler_service.text.tokenizer import ChatTurn, Tokenizer
tokenizer = Tokenizer(Path({str(make_checkpoint(tmp_path))!r}))
turns = [ChatTurn("user", "Hi")]
text = tokenizer.render_chat(turns, add_generation_prompt=True, template_kwargs_json="")
tokenizer.decode(tokenizer.encode(text))
"""
    assert loaded_after(program) == ""


@pytest.mark.parametrize("name", sorted(PURE))
def test_the_policy_does_no_input_or_output_and_reads_no_clock(name: str):
    assert not set(imports(ROOT / name)) & IMPURE_MODULES


def declared(*extras: str) -> set[str]:
    """Distributions that pyproject.toml asks for, with some extras, by normalised name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in extras for line in optional[extra])]
    return {distribution_name(re.split(r"[^\w.-]", line)[0]) for line in lines}


def distribution_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def providing_distributions() -> Mapping[str, list[str]]:
    return packages_distributions()


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_everything_that_runs_without_torch_imports_is_a_declared_dependency(package: str):
    # Optional parts, which say so when these are missing.
    wanted = declared("bench-openai", "gateway", "tracing") | {"gguf"}
    providers = providing_distributions()
    for path in sources(package):
        for name in set(imports(path)) - sys.stdlib_module_names - ALLOWED.keys():
            found = {distribution_name(provider) for provider in providers.get(name, [])}
            assert found & wanted, f"{path.relative_to(ROOT)} imports {name} of {found}"
