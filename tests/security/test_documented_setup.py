"""The set-up in docs/security.md works as it stands there."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from executor_service.settings import ExecutorSettings
from nanovllm.service_settings import ServiceSettings, server_tls
from scheduler_service.access.security import Security
from scheduler_service.access.tokens_file import TokensFile
from scheduler_service.settings import SchedulerSettings

DOCUMENT = (Path(__file__).parents[2] / "docs/security.md").read_text(encoding="utf-8")
CERTIFICATES, SERVICES, TOKENS = re.findall(r"^```sh\n(.*?)^```$", DOCUMENT, re.M | re.S)[:3]
SETTINGS: dict[str, type[ServiceSettings]] = {
    "executor_service": ExecutorSettings,
    "scheduler_service": SchedulerSettings,
}
LIMIT_S = 60

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")


def run(script: str, folder: Path) -> str:
    """What a script prints, with nothing but a POSIX shell."""
    result = subprocess.run(
        ["sh", "-euc", script], cwd=folder, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def settings(service: str) -> ServiceSettings:
    """Those that the guide starts a service with."""
    lines = SERVICES.replace("\\\n", " ").splitlines()
    (line,) = [line for line in lines if f"-m {service}" in line]
    return SETTINGS[service].from_arguments(shlex.split(line)[3:])


def test_the_certificates_are_what_the_services_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run(CERTIFICATES, tmp_path)
    for authority, name in [
        ("internal-ca", "executor"),
        ("internal-ca", "scheduler-internal"),
        ("public-ca", "scheduler"),
        ("public-ca", "customer"),
    ]:
        assert run(f"openssl verify -CAfile {authority}.pem {name}.pem", tmp_path).endswith("OK\n")
    monkeypatch.chdir(tmp_path)
    assert server_tls(settings("executor_service")) is not None
    scheduler = settings("scheduler_service")
    assert isinstance(scheduler, SchedulerSettings)
    assert Security.of(scheduler).executor_tls is not None


def test_the_token_is_the_callers(tmp_path: Path):
    commands = "\n".join(TOKENS.splitlines()[:3])
    token = run(f"{commands}\necho $TOKEN", tmp_path).strip()
    assert TokensFile(tmp_path / "tokens").name_of(token) == "alice"
