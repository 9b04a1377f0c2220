"""Starting and stopping services as child processes, with stand-ins for the real services."""

import json
import os
import signal
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from nanovllm.model_store import ModelNotFoundError
from nanovllm.service_process import ServiceProcess, ServiceStartError
from nanovllm.services import LocalServices

LIMIT_S = 30.0

#: Behaves as the command line contract of both services asks.
GOOD_SERVICE = """
    import signal, sys, threading
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    arguments = sys.argv[1:]
    print("loading", " ".join(arguments), file=sys.stderr)
    if "--metrics-port=0" in arguments:
        print("metrics: http://127.0.0.1:1234/metrics")
    listen = arguments[arguments.index("--listen") + 1]
    print(f"ready: listening on {listen}")
    stop.wait()
    print("drained", file=sys.stderr)
"""


@pytest.fixture
def module(tmp_path: Path) -> Callable[[str, str], str]:
    """Writes a module that child processes can run by name."""
    folder = tmp_path / "modules"
    folder.mkdir()

    def write(name: str, source: str) -> str:
        (folder / f"{name}.py").write_text(textwrap.dedent(source))
        return name

    return write


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    paths = [str(tmp_path / "modules"), os.getcwd(), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "tiny"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"")
    return directory


class TestServiceProcess:
    def test_address_and_metrics_come_from_stdout(self, module, env):
        name = module("good", GOOD_SERVICE)
        arguments = ["--listen", "127.0.0.1:7", "--metrics-port=0"]
        with ServiceProcess(name, arguments, env=env) as service:
            assert service.wait_until_ready(LIMIT_S) == "127.0.0.1:7"
            assert service.metrics_url == "http://127.0.0.1:1234/metrics"

    def test_stop_lets_the_service_drain_and_exit_zero(self, module, env, tmp_path):
        log = tmp_path / "log"
        name = module("good", GOOD_SERVICE)
        service = ServiceProcess(name, ["--listen", "unix:/x"], env=env, log_path=log)
        service.start()
        service.wait_until_ready(LIMIT_S)
        assert service.stop() == 0
        assert log.read_text().splitlines() == ["loading --listen unix:/x", "drained"]

    def test_service_that_ignores_sigterm_is_killed(self, module, env):
        name = module(
            "stubborn",
            """
            import signal, time
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            print("ready: listening on here:1")
            time.sleep(60)
            """,
        )
        service = ServiceProcess(name, env=env)
        service.start()
        service.wait_until_ready(LIMIT_S)
        assert service.stop(grace_s=0.1) == -signal.SIGKILL

    def test_crash_before_ready_quotes_what_the_service_wrote(self, module, env):
        name = module("broken", "raise SystemExit('--device: no such device: tpu')")
        with (
            ServiceProcess(name, env=env) as service,
            pytest.raises(ServiceStartError, match=r"broken exited with status 1 .*device: tpu"),
        ):
            service.wait_until_ready(LIMIT_S)

    def test_service_that_is_never_ready_runs_into_the_limit(self, module, env):
        name = module("slow", "import time; time.sleep(60)")
        with (
            ServiceProcess(name, env=env) as service,
            pytest.raises(ServiceStartError, match="slow was not ready"),
        ):
            service.wait_until_ready(0.2)

    def test_killed_service_restarts_on_the_same_address(self, module, env):
        name = module("good", GOOD_SERVICE)
        with ServiceProcess(name, ["--listen", "127.0.0.1:7"], env=env) as service:
            service.wait_until_ready(LIMIT_S)
            first_pid = service.pid
            service.kill()
            assert service.wait(LIMIT_S) == -signal.SIGKILL
            assert service.restart(LIMIT_S) == "127.0.0.1:7"
            assert service.pid != first_pid

    def test_address_before_ready_is_refused(self):
        with pytest.raises(RuntimeError, match="wait_until_ready"):
            _ = ServiceProcess("anything").address

    def test_service_ends_when_its_parent_is_killed(self, module, env, tmp_path):
        name = module("good", GOOD_SERVICE)
        log = tmp_path / "child.log"
        parent = module(
            "parent",
            f"""
            import os, signal, sys
            from pathlib import Path
            from nanovllm.service_process import ServiceProcess
            child = ServiceProcess({name!r}, ["--listen", "x:1"])
            child.start()
            child.wait_until_ready(30)
            # The child holds this pipe open; its end is the end of the child.
            print("ready: listening on pid:%d" % child.pid)
            signal.pause()
            """,
        )
        with ServiceProcess(parent, env=env, log_path=log) as service:
            child_pid = int(service.wait_until_ready(LIMIT_S).removeprefix("pid:"))
            child = os.pidfd_open(child_pid)
            try:
                service.kill()
                service.wait(LIMIT_S)
                assert _ended(child)
            finally:
                os.close(child)


class TestLocalServices:
    @pytest.fixture
    def services(self, module, env, model, tmp_path) -> Callable[..., LocalServices]:
        def build(executor: str = GOOD_SERVICE, scheduler: str = GOOD_SERVICE, **options):
            return LocalServices(
                str(model),
                env=env,
                log_dir=tmp_path / "logs",
                executor_module=module("fake_executor", executor),
                scheduler_module=module("fake_scheduler", scheduler),
                **{"startup_timeout_s": LIMIT_S, **options},
            )

        return build

    def test_scheduler_is_told_the_executors_address(self, services, model, tmp_path):
        with services(executor_args=["--device", "cpu"], scheduler_args=["--x", "1"]) as running:
            executor, address = running.executor_address, running.address
            assert executor.startswith("unix:/")
            assert running.executor.metrics_url is None
        logs = tmp_path / "logs"
        assert (logs / "executor.log").read_text().splitlines() == [
            f"loading --model {model} --listen {executor} --device cpu --metrics-port=-1",
            "drained",
        ]
        assert (logs / "scheduler.log").read_text().splitlines() == [
            f"loading --model {model} --executor {executor} --listen {address} --x 1 "
            "--metrics-port=-1",
            "drained",
        ]

    def test_socket_folder_is_private_and_removed(self, services):
        with services() as running:
            folder = Path(running.address.removeprefix("unix:")).parent
            assert folder.stat().st_mode & 0o777 == 0o700
        assert not folder.exists()

    def test_tcp_uses_two_loopback_ports_and_metrics_on_demand(self, services):
        with services(listen="tcp", metrics=True) as running:
            assert running.address.startswith("127.0.0.1:")
            assert running.executor_address.startswith("127.0.0.1:")
            assert running.address != running.executor_address
            assert running.scheduler.metrics_url == "http://127.0.0.1:1234/metrics"

    @pytest.mark.parametrize("broken", ["executor", "scheduler"])
    def test_failure_of_one_service_stops_the_other_at_once(self, services, broken):
        waiting = "import time; time.sleep(60)"
        failing = "raise SystemExit('out of memory')"
        sources = {"executor": waiting, "scheduler": waiting, broken: failing}
        local = services(**sources)
        with pytest.raises(ServiceStartError, match=f"fake_{broken} exited.*out of memory"):
            local.start()
        assert not local.executor.running
        assert not local.scheduler.running

    def test_start_up_limit_names_the_service_that_was_late(self, services):
        local = services(executor="import time; time.sleep(60)", startup_timeout_s=1.5)
        with pytest.raises(ServiceStartError, match="fake_executor was not ready"):
            local.start()
        assert not local.executor.running

    def test_unknown_model_starts_nothing(self, tmp_path):
        local = LocalServices(str(tmp_path / "missing"))
        with pytest.raises(ModelNotFoundError, match="does not exist"):
            local.start()
        with pytest.raises(RuntimeError, match="not started"):
            _ = local.executor


def _ended(pidfd: int) -> bool:
    """Waits for the end of a process that is not our child."""
    import select

    readable, _, _ = select.select([pidfd], [], [], LIMIT_S)
    return bool(readable)


def test_arguments_of_the_child_reach_the_module_unchanged(module, env, tmp_path):
    result = tmp_path / "argv.json"
    name = module("argv", f"import json, sys; json.dump(sys.argv, open({str(result)!r}, 'w'))")
    service = ServiceProcess(name, ["--a b", "c"], env=env)
    service.start()
    assert service.wait(LIMIT_S) == 0
    argv = json.loads(result.read_text())
    assert argv[1:] == ["--a b", "c"]
