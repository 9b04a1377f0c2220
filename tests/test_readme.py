"""README.md and docs/architecture.md: examples run, tables match the code, names exist."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from executor_service.settings import ExecutorSettings
from nanovllm import LocalServices
from nanovllm.service_settings import ServiceSettings
from scheduler_service import validation
from scheduler_service.settings import SchedulerSettings
from tests.checkpoints import make_checkpoint
from tests.e2e.support import metrics_page

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
METRICS = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PACKAGES = ("nanovllm", "scheduler_service", "executor_service", "nanovllm_core")
SETTINGS: dict[str, type[ServiceSettings]] = {
    "executor_service": ExecutorSettings,
    "scheduler_service": SchedulerSettings,
}
#: What the examples write, and the tests replace by services of their own.
ADDRESS = "127.0.0.1:50051"
MODEL = "smollm2-135m-instruct"
#: Limit of one example; generous because CI machines stall.
LIMIT_S = 120.0


def code_blocks(language: str) -> list[str]:
    """The README's fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def shell_commands() -> list[str]:
    """The README's shell commands, with continued lines joined."""
    lines = "".join(code_blocks("sh")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def table(document: str, heading: str) -> list[list[str]]:
    """Cells of the first table behind a heading, without its two header rows."""
    section = re.split(r"^#+ ", document.split(f"# {heading}\n", 1)[1], flags=re.MULTILINE)[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def program(command: str) -> str:
    """The word that says who runs a command, without variables in front of it."""
    return next(word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in the place of the embedded one."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    return make_checkpoint(directory, "qwen3", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def services(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServices]:
    """Both services on loopback ports."""
    with LocalServices(
        str(checkpoint),
        executor_args=["--device", "cpu", "--num-kv-blocks", "1024"],
        listen="tcp",
        metrics=True,
        env={"OMP_NUM_THREADS": "1"},
        log_dir=tmp_path_factory.mktemp("logs"),
    ) as running:
        yield running


@pytest.fixture(scope="module")
def environment(
    services: LocalServices, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """The environment of a user who installed the package and uses these services."""
    folder = tmp_path_factory.mktemp("bin")
    script = folder / "nanovllm"
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m nanovllm "$@"\n')
    script.chmod(0o755)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "NANOVLLM_ADDRESS": services.address,
        "NANOVLLM_CACHE": str(tmp_path_factory.mktemp("cache")),
    }


class TestExamples:
    def test_there_are_examples_of_every_kind(self) -> None:
        commands = shell_commands()
        assert len(code_blocks("python")) >= 4
        assert {"make", "pip", "python", "nanovllm", "echo", "buf"} == set(map(program, commands))
        for command in ("generate", "chat", "bench", "info", "models"):
            assert any(f"nanovllm {command}" in line for line in commands), command

    @pytest.mark.parametrize("source", code_blocks("python"))
    def test_python_example_runs(
        self,
        source: str,
        services: LocalServices,
        checkpoint: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setenv("NANOVLLM_EXECUTOR_NUM_KV_BLOCKS", "1024")
        source = source.replace(ADDRESS, services.address).replace(MODEL, str(checkpoint))
        exec(compile(source, "README.md", "exec"), {"__name__": "__main__"})  # noqa: S102
        assert capsys.readouterr().out.strip()

    @pytest.mark.parametrize(
        "command", [c for c in shell_commands() if program(c) in ("nanovllm", "echo", "buf")]
    )
    def test_client_command_runs(
        self,
        command: str,
        services: LocalServices,
        checkpoint: Path,
        environment: dict[str, str],
        tmp_path: Path,
    ) -> None:
        if program(command) == "buf" and shutil.which("buf", path=environment["PATH"]) is None:
            pytest.skip("buf is not installed; it comes with the extra dev")
        command = command.replace(ADDRESS, services.address).replace(MODEL, str(checkpoint))
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip()

    @pytest.mark.parametrize("command", [c for c in shell_commands() if program(c) == "python"])
    def test_service_command_line_is_accepted(
        self, command: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        words = shlex.split(command)
        start = words.index("python")
        for word in words[:start]:
            monkeypatch.setenv(*word.split("=", 1))
        assert words[start + 1] == "-m"
        settings_class = SETTINGS[words[start + 2]]
        settings = settings_class.from_arguments(words[start + 3 :])
        # Every word had an effect: nothing is at its default but what was left out.
        given = {word for word in words[start + 3 :] if word.startswith("--")}
        given |= {word.split("=")[0] for word in words[:start]}
        assert len(settings.model_fields_set) == len(given)

    @pytest.mark.parametrize("command", [c for c in shell_commands() if program(c) == "make"])
    def test_make_target_exists(self, command: str) -> None:
        target = shlex.split(command)[1]
        assert re.search(rf"^{target}:.*## ", MAKEFILE, re.MULTILINE)
        for variable in re.findall(r"\b([A-Z]+)=", command):
            assert f"\n{variable} ?=" in MAKEFILE

    @pytest.mark.parametrize("command", [c for c in shell_commands() if program(c) == "pip"])
    def test_extra_exists(self, command: str) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for extras in re.findall(r"\[(.*?)\]", command):
            assert set(extras.split(",")) <= set(project["optional-dependencies"])


def expected_metrics(url: str | None) -> list[list[str]]:
    """Rows of a metrics table, from a metrics page."""
    families = text_string_to_metric_families(metrics_page(url))
    return sorted(
        [
            f"`{family.name}{'_total' if family.type == 'counter' else ''}`",
            family.type,
            family.documentation,
        ]
        for family in families
    )


def as_table(rows: list[list[str]]) -> str:
    """The rows as they should stand in the document."""
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows)


class TestTables:
    def test_settings_that_are_needed_first_are_those_of_the_services(self) -> None:
        services = {"both": set(SETTINGS.values())}
        services |= {name.removesuffix("_service"): {each} for name, each in SETTINGS.items()}
        service = ""
        for row in table(README, "Settings"):
            service = row[0] or service
            for option in re.findall(r"--([\w-]+)", row[1]):
                for settings_class in services[service]:
                    assert option.replace("-", "_") in settings_class.model_fields, option

    @pytest.mark.parametrize("name", ["executor", "scheduler"])
    def test_metrics_are_those_of_the_service(self, name: str, services: LocalServices) -> None:
        expected = expected_metrics(getattr(services, name).metrics_url)
        rows = table(METRICS, f"Metrics of `{name}_service`") + table(METRICS, "Metrics of both")
        assert sorted([row[0], row[1], row[-1]] for row in rows) == expected, as_table(expected)

    def test_development_commands_are_those_of_the_makefile(self) -> None:
        targets = re.findall(r"^([a-z-]+):.*## (.*)$", MAKEFILE, re.MULTILINE)
        expected = sorted([f"`make {target}`", meaning] for target, meaning in targets)
        assert table(README, "Development") == expected, as_table(expected)

    @pytest.mark.parametrize("service", SETTINGS)
    def test_every_file_of_a_service_is_listed(self, service: str) -> None:
        folder = ROOT / service
        present = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}
        present = {name for name in present if not Path(name).name.startswith("__")}
        listed = [row[1].strip("`") for row in table(ARCHITECTURE, f"Files of `{service}`")]
        assert sorted(listed) == sorted(present)

    def test_limits_are_those_of_the_validation(self) -> None:
        constants = {n: v for n, v in vars(validation).items() if n.startswith("MAX_")}
        rows = {row[0].strip("`"): int(row[1].replace(",", "")) for row in limits_table()}
        assert rows == constants

    def test_defaults_in_the_text_are_those_of_the_scheduler(self) -> None:
        stated = re.findall(r"`(\w+)`\s\(([\d.,]+)(?: s)?\)", ARCHITECTURE)
        assert len(stated) >= 6
        for name, value in stated:
            default = SchedulerSettings.model_fields[name].default
            assert float(value.replace(",", "")) == default, name


def limits_table() -> list[list[str]]:
    """The table of request limits."""
    return table(ARCHITECTURE, "Limits")


def slug(title: str) -> str:
    """The anchor that code hosts give a heading."""
    return re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")


def product_files() -> list[Path]:
    """Source files that documents may name."""
    folders = (*PACKAGES, "protos", "benchmarks", "deploy", "examples", "tests")
    return [
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".proto")
    ]


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "docs/architecture.md",
        "docs/benchmarking.md",
        "docs/clients.md",
        "docs/metrics.md",
        "docs/operations.md",
        "docs/performance.md",
        "docs/reliability.md",
        "docs/security.md",
        "docs/settings.md",
    ],
)
class TestReferences:
    def test_links_lead_to_files_and_headings(self, name: str) -> None:
        document = (ROOT / name).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)]+)\)", document):
            path, _, anchor = target.partition("#")
            if path.startswith("https://"):
                continue
            file = (ROOT / name).parent / path if path else ROOT / name
            assert file.exists(), target
            if anchor:
                titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in map(slug, titles), target

    def test_named_files_exist(self, name: str) -> None:
        document = (ROOT / name).read_text(encoding="utf-8")
        paths = [path.relative_to(ROOT).as_posix() for path in product_files()]
        for named in re.findall(r"`([\w/]+\.(?:py|proto))`", document):
            assert any(f"/{path}".endswith(f"/{named}") for path in paths), named
        for folder in re.findall(r"`([\w/]+/)`", document):
            assert (ROOT / folder).is_dir(), folder

    def test_named_attributes_exist(self, name: str) -> None:
        document = (ROOT / name).read_text(encoding="utf-8")
        sources = [path.read_text(encoding="utf-8") for path in product_files()]
        for owner, attribute in re.findall(r"`([A-Z]\w+)\.(\w+)(?:\(\))?`", document):
            definition = re.compile(rf"^(?:class|message|service|enum) {owner}\b", re.MULTILINE)
            assert any(
                definition.search(source) and re.search(rf"\b{attribute}\b", source)
                for source in sources
            ), f"{owner}.{attribute}"
