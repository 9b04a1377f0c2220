"""The admin service: executors that join, leave and are drained while the scheduler runs."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from nanovllm.admin import AdminClient
from nanovllm.cli import main as nanovllm_command
from nanovllm.errors import ExecutorChangeError, InvalidRequestError
from nanovllm.v1 import inference_pb2 as pb
from tests.scheduler_service.engine_harness import CAPACITY
from tests.scheduler_service.serving import Service, until
from tests.security.callers import ALICE, BOB, start
from tests.security.pki import Pki


async def ask(method: Callable[..., Any], *arguments: str) -> Any:
    """The answer of a blocking client, without blocking the server beside it."""
    return await asyncio.to_thread(method, *arguments)


def running(service: Service) -> list[int]:
    """Sequences that run at each executor."""
    return [each.num_running for each in service.harness.pool.executors()]


async def refusal(method: Callable[..., Any], *arguments: str) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(ExecutorChangeError) as caught:
        await ask(method, *arguments)
    return caught.value.code, str(caught.value)


def test_executors_are_listed_with_their_state_and_their_work(administer):
    async def scenario(service: Service, admin: AdminClient, _: Any):
        other = service.harness.join("10.0.0.5:50052", capacity=None)
        other.connection.on_disconnected("it serves another model")
        service.iterating.clear()
        task = start(service, ALICE)
        await until(lambda: running(service) == [1, 0])
        first, second = await ask(admin.executors)
        assert (first.connected, first.draining, first.problem) == (True, False, "")
        assert (first.summary.address, first.summary.device) == ("unix:/executor", "simulated")
        assert first.num_kv_blocks == CAPACITY.num_blocks
        num_owned = CAPACITY.num_blocks - first.num_free_kv_blocks - first.num_cached_kv_blocks
        assert first.kv_usage_ratio == pytest.approx(num_owned / CAPACITY.num_blocks)
        assert 0 < first.kv_usage_ratio < 1
        assert (second.connected, second.problem) == (False, "it serves another model")
        assert (second.summary.epoch, second.kv_usage_ratio) == (0, 0)
        await ask(admin.drain_executor, "10.0.0.5:50052")
        assert [each.draining for each in await ask(admin.executors)] == [False, True]
        service.iterating.set()
        await task

    administer(scenario)


def test_an_executor_that_joins_gets_requests_once_it_is_connected(administer):
    async def scenario(service: Service, admin: AdminClient, _: Any):
        service.iterating.clear()
        live = start(service, ALICE)
        await until(lambda: running(service) == [1])
        await ask(admin.add_executor, "unix:/other")
        _, other = await ask(admin.executors)
        assert (other.connected, other.problem) == (False, "no executor has connected yet")
        service.harness.adopt("unix:/other").connect()
        # Another tenant's: nothing is cached for it anywhere.
        more = start(service, BOB)
        await until(lambda: running(service) == [1, 1])
        service.iterating.set()
        await asyncio.gather(live, more)
        code, message = await refusal(admin.add_executor, "unix:/other")
        assert (code, message) == (
            grpc.StatusCode.ALREADY_EXISTS,
            "executor unix:/other is there already",
        )

    administer(scenario)


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("", "is no address"),
        ("executor", "is no address"),
        ("http://executor:1", "is no address"),
        ("127.0.0.1:1,127.0.0.1:2", "give one address"),
    ],
)
def test_an_executor_needs_an_address(administer, address: str, problem: str):
    async def scenario(service: Service, admin: AdminClient, _: Any):
        with pytest.raises(InvalidRequestError, match=f"^address: .*{problem}"):
            await ask(admin.add_executor, address)
        assert len(service.harness.pool.executors()) == 1

    administer(scenario)


def test_an_executor_beyond_this_machine_joins_only_if_it_would_be_protected(administer, pki: Pki):
    async def refused(service: Service, admin: AdminClient, _: Any):
        with pytest.raises(InvalidRequestError, match=r"reaches beyond .* --executor-tls-ca"):
            await ask(admin.add_executor, "10.0.0.5:50052")
        assert len(service.harness.pool.executors()) == 1

    async def taken(service: Service, admin: AdminClient, _: Any):
        await ask(admin.add_executor, " 10.0.0.5:50052 ")
        assert service.harness.pool.executors()[1].address == "10.0.0.5:50052"

    administer(refused)
    administer(taken, "--insecure")
    administer(taken, "--executor-tls-ca", str(pki.ca))


def test_a_drained_executor_gets_nothing_new_until_it_is_undrained(administer):
    async def scenario(service: Service, admin: AdminClient, _: Any):
        await start(service, ALICE)
        service.iterating.clear()
        live = start(service, ALICE)
        await until(lambda: running(service) == [1])
        service.harness.join()
        assert await ask(admin.drain_executor, "unix:/executor") == 1
        # Its prefix is cached there, which would draw it if nobody had drained it.
        more = start(service, ALICE)
        await until(lambda: running(service) == [1, 1])
        await ask(admin.undrain_executor, "unix:/executor")
        again = start(service, ALICE)
        await until(lambda: running(service) == [2, 1])
        service.iterating.set()
        for responses in await asyncio.gather(live, more, again):
            assert responses[-1].finish_reason == pb.FINISH_REASON_LENGTH

    administer(scenario)


def test_what_runs_at_an_executor_that_leaves_goes_on_at_the_others(administer):
    async def scenario(service: Service, admin: AdminClient, _: Any):
        undisturbed = await start(service, ALICE, max_tokens=20)
        service.iterating.clear()
        live = start(service, ALICE, max_tokens=20)
        await until(lambda: running(service) == [1])
        for _ in range(5):
            await service.harness.step()
        (request,) = service.harness.engine.live_requests()
        assert request.completions[0].seq.num_output_tokens > 0
        service.harness.join()
        assert await ask(admin.remove_executor, "unix:/executor") == 1
        assert [each.summary.address for each in await ask(admin.executors)] == ["unix:/other"]
        service.iterating.set()
        responses = await live
        assert responses[-1].finish_reason == pb.FINISH_REASON_LENGTH
        assert tokens_of(responses) == tokens_of(undisturbed)

    administer(scenario)


def tokens_of(responses: list[pb.GenerateResponse]) -> list[int]:
    return [token for response in responses for token in response.token_ids]


def test_the_last_executor_that_takes_requests_stays(administer):
    async def scenario(service: Service, admin: AdminClient, _: Any):
        code, message = await refusal(admin.remove_executor, "unix:/executor")
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "add another one first" in message
        service.harness.join()
        await ask(admin.drain_executor, "unix:/other")
        code, _ = await refusal(admin.remove_executor, "unix:/executor")
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert len(service.harness.pool.executors()) == 2

    administer(scenario)


def test_an_executor_that_nobody_knows_is_not_found(administer):
    async def scenario(service: Service, admin: AdminClient, _: Any):
        for method in (admin.remove_executor, admin.drain_executor, admin.undrain_executor):
            code, message = await refusal(method, "unix:/nobody")
            assert code is grpc.StatusCode.NOT_FOUND
            assert message == "there is no executor unix:/nobody; there are unix:/executor"

    administer(scenario)


def test_the_command_lists_and_changes_the_executors(
    administer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    async def command(*arguments: str) -> str:
        address = ["--address", f"unix:{tmp_path}/admin.sock"]
        status = await ask(nanovllm_command, ["admin", *arguments, *address])
        output = capsys.readouterr()
        return output.out.strip() if status == 0 else f"{status}: {output.err.strip()}"

    async def scenario(service: Service, admin: AdminClient, _: Any):
        assert (await command("add-executor", "unix:/o\x1b[2J")).startswith("added; ")
        assert (await command("executors")).splitlines() == [
            "unix:/executor  connected  0 running, 0 waiting  0% of 64 KV blocks  simulated  "
            "epoch 0",
            "'unix:/o\\x1b[2J'  absent  0 running, 0 waiting  no executor has connected yet",
        ]
        assert await command("drain-executor", "unix:/executor") == "draining, 0 sequences running"
        assert "unix:/executor  connected, draining  " in await command("executors")
        first, second = json.loads(await command("executors", "--json"))
        assert (first["summary"]["address"], first["draining"]) == ("unix:/executor", True)
        assert second["problem"] == "no executor has connected yet"
        assert await command("undrain-executor", "unix:/executor") == "getting requests"
        assert await command("remove-executor", "unix:/o\x1b[2J") == (
            "removed, 0 sequences interrupted"
        )
        assert (await command("remove-executor", "unix:/executor")).startswith("1: nanovllm: ")

    administer(scenario)
