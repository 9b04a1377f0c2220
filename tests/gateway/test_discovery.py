"""The real smg, started as the Kubernetes manifests start it, finds replicas through an API server.

Pods are loopback addresses: every replica listens on the same port of one of its own.
"""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError, AsyncOpenAI, OpenAI

from nanovllm import Client, LocalServices, SamplingParams
from tests.deploy.manifests import objects
from tests.e2e.support import CPU, LIMIT_S, Metrics, wait_until, wait_until_serving
from tests.gateway.pods_api import PodsApi
from tests.gateway.replicas import BLOCK_SIZE, MODEL, make_ascii_checkpoint, skip_without_smg
from tests.gateway.smg_process import SmgProcess, free_ports, running_smg

pytestmark = pytest.mark.slow

NAMESPACE = "production"
API_KEY = "k" * 32
CONTROL_PLANE_KEY = "c" * 32
HOSTS = ("127.0.0.1", "127.0.0.2")
#: Tokens of streams that last for seconds.
LONG = 2000


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[LocalServices]]:
    """One replica for each host, all of them at the same port."""
    skip_without_smg()
    folder = tmp_path_factory.mktemp("replicas")
    model = make_ascii_checkpoint(folder / MODEL)
    (port,) = free_ports(1, HOSTS)
    with ExitStack() as stack:
        services = [
            stack.enter_context(
                LocalServices(
                    str(model),
                    executor_args=[
                        *CPU,
                        *("--block-size", str(BLOCK_SIZE), "--num-kv-blocks", "2048"),
                    ],
                    scheduler_args=["--listen", f"{host}:{port}"],
                    listen="tcp",
                    metrics=True,
                    env={"OMP_NUM_THREADS": "1"},
                    log_dir=folder / host,
                    startup_timeout_s=120.0,
                    stop_grace_s=5.0,
                )
            )
            for host in HOSTS
        ]
        for service in services:
            with Client(service.address) as client:
                wait_until_serving(client)
        yield services


def gateway_container() -> dict[str, Any]:
    template = objects("gateway")["Deployment", "nanovllm-gateway"]["spec"]["template"]
    (container,) = template["spec"]["containers"]
    assert isinstance(container, dict)
    return container


def arguments(port: int) -> list[str]:
    """Those of the manifest, with what only a cluster has filled in."""
    values = {
        "$(NAMESPACE)": NAMESPACE,
        "$(API_KEY)": API_KEY,
        "$(CONTROL_PLANE_KEY)": CONTROL_PLANE_KEY,
    }
    words: list[str] = gateway_container()["args"][1:]
    for name, value in values.items():
        words = [word.replace(name, value) for word in words]
    return [*words, "--service-discovery-port", str(port)]


def labels() -> dict[str, str]:
    """Those of the replicas' pods."""
    template = objects("gateway")["StatefulSet", "nanovllm"]["spec"]["template"]
    found: dict[str, str] = template["metadata"]["labels"]
    return found


@contextmanager
def cluster(replicas: list[LocalServices], folder: Path) -> Iterator[tuple[PodsApi, SmgProcess]]:
    """An API server without pods, with the manifest's Role, and a gateway that asks it."""
    port = int(replicas[0].address.rpartition(":")[2])
    rules = objects("gateway")["Role", "nanovllm-gateway"]["rules"]
    with PodsApi(NAMESPACE, rules) as api:
        kubeconfig = folder / "kubeconfig"
        api.write_kubeconfig(kubeconfig)
        environment = {"KUBECONFIG": str(kubeconfig)}
        with running_smg(arguments(port), folder / "smg.log", environment) as smg:
            wait_until(lambda: smg.get("/liveness", smg.probe_port).status == 200, "smg lives")
            yield api, smg


def wait_until_healthy(smg: SmgProcess, count: int) -> None:
    wait_until(lambda: smg.num_healthy_workers == count, f"{count} replicas", poll_s=0.05)


def num_live(replica: LocalServices) -> int:
    with Client(replica.address) as client:
        status = client.server_status()
    return status.num_running + status.num_waiting


def num_begun(replica: LocalServices) -> float:
    """Requests that have got their first token there."""
    return Metrics(replica.scheduler.metrics_url)["time_to_first_token_seconds_count"]


def test_ready_pods_become_replicas_with_the_rights_and_probes_of_the_manifests(
    replicas: list[LocalServices], tmp_path: Path
) -> None:
    first, second = HOSTS
    with cluster(replicas, tmp_path) as (api, smg):
        readiness = gateway_container()["readinessProbe"]["httpGet"]["path"]
        assert smg.get(readiness, smg.probe_port).status == 503
        api.set_pod("other", second, {"app.kubernetes.io/name": "other"}, ready=True)
        api.set_pod("nanovllm-1", second, labels(), ready=False)
        api.set_pod("nanovllm-0", first, labels(), ready=True)
        wait_until_healthy(smg, 1)
        assert smg.get(readiness, smg.probe_port).status == 200
        api.set_pod("nanovllm-1", second, labels(), ready=True)
        wait_until_healthy(smg, 2)
        with (
            Client(replicas[0].address) as scheduler,
            OpenAI(base_url=smg.base_url, api_key=API_KEY, max_retries=0, timeout=60) as client,
        ):
            expected = scheduler.generate("The sea", SamplingParams(temperature=0, max_tokens=20))
            answer = client.completions.create(
                model=MODEL, prompt="The sea", max_tokens=20, temperature=0
            )
        assert answer.choices[0].text == expected.text
        assert api.refused == []
        assert api.used == {"list", "watch"}
        assert "smg_discovery_workers_discovered" in smg.get("/metrics", smg.metrics_port).text


def test_a_pod_that_ends_gets_no_new_requests_and_finishes_those_it_has(
    replicas: list[LocalServices], tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"model": MODEL, "temperature": 0, "extra_body": {"ignore_eos": True}}

    async def stream(client: AsyncOpenAI, number: int, has_begun: asyncio.Event) -> int:
        num_tokens = 0
        prompt = chr(97 + number) * 40
        events = await client.completions.create(
            **fields, prompt=prompt, max_tokens=LONG, stream=True
        )
        async for event in events:
            num_tokens += sum(len(choice.text) for choice in event.choices)
            has_begun.set()
        return num_tokens

    async def main(api: PodsApi, smg: SmgProcess) -> None:
        async with AsyncOpenAI(
            base_url=smg.base_url, api_key=API_KEY, max_retries=0, timeout=60
        ) as client:
            begun = [asyncio.Event() for _ in range(4)]
            streams = [
                asyncio.create_task(stream(client, number, event))
                for number, event in enumerate(begun)
            ]
            async with asyncio.timeout(LIMIT_S):
                await asyncio.gather(*(event.wait() for event in begun))
            ending = max(range(2), key=lambda index: num_live(replicas[index]))
            assert num_live(replicas[ending]) > 0
            pod = f"nanovllm-{ending}"
            api.set_pod(pod, HOSTS[ending], labels(), ready=True, ending=True)
            await asyncio.to_thread(wait_until_healthy, smg, 1)
            before = [num_begun(replica) for replica in replicas]
            for number in range(6):
                await client.completions.create(**fields, prompt=f"{number}", max_tokens=4)
            after = [num_begun(replica) for replica in replicas]
            assert after[ending] == before[ending]
            assert after[1 - ending] == before[1 - ending] + 6
            assert await asyncio.gather(*streams) == [LONG] * 4

    with cluster(replicas, tmp_path) as (api, smg):
        for number, host in enumerate(HOSTS):
            api.set_pod(f"nanovllm-{number}", host, labels(), ready=True)
        wait_until_healthy(smg, 2)
        asyncio.run(main(api, smg))


def test_the_api_and_the_control_plane_have_keys_of_their_own(
    replicas: list[LocalServices], tmp_path: Path
) -> None:
    with cluster(replicas, tmp_path) as (api, smg):
        api.set_pod("nanovllm-0", HOSTS[0], labels(), ready=True)
        wait_until_healthy(smg, 1)

        def complete(key: str) -> int:
            with OpenAI(base_url=smg.base_url, api_key=key, max_retries=0, timeout=60) as client:
                try:
                    client.completions.create(model=MODEL, prompt="The sea", max_tokens=4)
                except APIStatusError as error:
                    return error.status_code
                return 200

        assert complete(API_KEY) == 200
        assert complete("wrong") == 401
        # Who may use the model may not take replicas away.
        assert smg.get("/workers").status == 401
        assert smg.get("/workers", key=API_KEY).status in {401, 403}
        assert HOSTS[0] in smg.get("/workers", key=CONTROL_PLANE_KEY).text
