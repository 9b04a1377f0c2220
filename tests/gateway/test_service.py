"""What vLLM's service says of model, load, health, tokenizer and prefix cache, and to whom."""

import asyncio
import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import grpc
import pytest
from smg_grpc_proto.generated import common_pb2
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from scheduler_service.server import gateway_is_wanted
from scheduler_service.settings import SchedulerSettings
from tests.gateway.conftest import Serve
from tests.gateway.serving import Gateway, request
from tests.gateway.test_cache_feed import Index
from tests.scheduler_service.serving import LIMIT_S, failure, read_all, until
from tests.security.callers import ALICE, BOB, bearer, with_tokens


def test_health_follows_the_serving_state_and_says_why(serve: Serve) -> None:
    async def scenario(gateway: Gateway) -> None:
        assert (await gateway.stub.HealthCheck(pb.HealthCheckRequest())).healthy
        gateway.serving.is_serving = False
        answer = await gateway.stub.HealthCheck(pb.HealthCheckRequest())
        assert (answer.healthy, answer.message) == (False, "no executor is connected")
        gateway.serving.is_draining = True
        assert (await gateway.stub.HealthCheck(pb.HealthCheckRequest())).message == "draining"

    serve(scenario)


def test_the_model_is_described_with_the_length_that_the_executor_takes(
    serve: Serve, checkpoint: Path
) -> None:
    async def scenario(gateway: Gateway) -> None:
        info = await gateway.stub.GetModelInfo(pb.GetModelInfoRequest())
        assert info.served_model_name == "tiny"
        assert info.tokenizer_path == str(checkpoint)
        assert info.max_context_length == 128
        assert info.is_generation
        assert list(info.eos_token_ids) == [258]
        assert json.loads(info.default_sampling_params_json)["top_p"] == 1.0

    serve(scenario)


def test_the_load_is_that_of_the_scheduler(serve: Serve) -> None:
    async def scenario(gateway: Gateway) -> None:
        call = asyncio.create_task(read_all(gateway.stub.Generate(request(n=3, max_tokens=100))))
        await until(lambda: gateway.harness.pool.load.num_running == 3)
        (load,) = (await gateway.stub.GetLoads(pb.GetLoadsRequest())).loads
        assert (load.num_running_reqs, load.num_waiting_reqs, load.num_total_reqs) == (3, 0, 3)
        assert load.max_running_requests == 8
        assert load.max_total_num_tokens == 256
        assert 0 < load.token_usage < 1
        info = await gateway.stub.GetServerInfo(pb.GetServerInfoRequest())
        assert info.active_requests == 1
        await call

    serve(scenario)


def test_the_tokenizer_comes_whole_with_its_hash_on_the_last_chunk(
    serve: Serve, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scheduler_service.gateway.tokenizer_archive._CHUNK_BYTES", 1000)

    async def scenario(gateway: Gateway) -> None:
        chunks = await read_all(gateway.stub.GetTokenizer(common_pb2.GetTokenizerRequest()))
        assert len(chunks) > 1
        content = b"".join(chunk.data for chunk in chunks)
        assert [chunk.sha256 for chunk in chunks[:-1]] == [""] * (len(chunks) - 1)
        assert chunks[-1].sha256 == hashlib.sha256(content).hexdigest()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= {
                *archive.namelist()
            }
            assert not any("safetensors" in name for name in archive.namelist())
            assert archive.read("tokenizer.json") == (checkpoint / "tokenizer.json").read_bytes()

    serve(scenario)


def test_a_flush_is_refused_while_requests_are_under_way(serve: Serve) -> None:
    async def scenario(gateway: Gateway) -> None:
        message = request()
        message.tokenized.input_ids[:] = [1] * 20
        await read_all(gateway.stub.Generate(message))
        message.sampling_params.max_tokens = 100
        call = asyncio.create_task(read_all(gateway.stub.Generate(message)))
        await until(lambda: gateway.harness.pool.load.num_running == 1)
        flush = common_pb2.FlushCacheRequest()
        assert not (await gateway.stub.FlushCache(flush)).success
        flush.timeout_s = LIMIT_S
        assert (await gateway.stub.FlushCache(flush)).success
        assert not gateway.harness.engine.live_requests()
        await call
        blocks = gateway.harness.scheduler.blocks
        assert blocks is not None
        assert blocks.num_cached == 0

    serve(scenario)


def test_a_tenant_cannot_flush_what_others_have_cached(serve: Serve, tmp_path: Path) -> None:
    async def scenario(gateway: Gateway) -> None:
        message = request()
        message.tokenized.input_ids[:] = [1] * 20
        await read_all(gateway.stub.Generate(message, metadata=bearer(ALICE)))
        await gateway.harness.engine.wait_until_idle()
        flush = common_pb2.FlushCacheRequest(timeout_s=LIMIT_S)
        error = await failure(gateway.stub.FlushCache(flush, metadata=bearer(BOB)))
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        blocks = gateway.harness.scheduler.blocks
        assert blocks is not None
        assert blocks.num_cached > 0

    serve(scenario, security=with_tokens(tmp_path))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("Embed", pb.EmbedRequest()),
        ("StartProfile", common_pb2.StartProfileRequest()),
        ("StopProfile", common_pb2.StopProfileRequest()),
    ],
)
def test_what_is_missing_is_unimplemented_and_says_what_to_do(
    serve: Serve, method: str, message: Any
) -> None:
    async def scenario(gateway: Gateway) -> None:
        error = await failure(getattr(gateway.stub, method)(message))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
        assert error.details()

    serve(scenario)


async def follow(gateway: Gateway, index: Index, token: str | None = None) -> None:
    metadata = bearer(token) if token else None
    call = gateway.stub.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest(), metadata=metadata)
    async for batch in call:
        index.take(batch)


def test_events_mirror_the_prefix_cache_through_evictions_and_a_new_executor(serve: Serve) -> None:
    async def scenario(gateway: Gateway) -> None:
        index = Index()
        following = asyncio.create_task(follow(gateway, index))
        await until(lambda: index.last_number is not None)
        harness = gateway.harness
        # Token ids that this executor never generates.
        for number in range(10, 16):
            message = request(max_tokens=20)
            message.tokenized.input_ids[:] = [number] * 60
            await read_all(gateway.stub.Generate(message))
        blocks = harness.scheduler.blocks
        assert blocks is not None
        # 64 blocks hold three of these requests, so some were evicted.
        await until(lambda: len(index.tokens) == len(blocks._block_of_hash))
        assert 0 < len(index.tokens) <= 64
        assert all(len(token_ids) == 4 for token_ids in index.tokens.values())
        assert any(token_ids == [15] * 4 for token_ids in index.tokens.values())
        assert [10] * 4 not in index.tokens.values()
        harness.lose_executor()
        await until(lambda: not index.tokens)
        harness.connect()
        await read_all(gateway.stub.Generate(message))
        await until(lambda: any(token_ids == [15] * 4 for token_ids in index.tokens.values()))
        following.cancel()

    serve(scenario)


def test_nobody_listens_before_there_is_a_subscriber(serve: Serve) -> None:
    async def scenario(gateway: Gateway) -> None:
        assert gateway.harness.scheduler._prefix_listener is None
        index = Index()
        following = asyncio.create_task(follow(gateway, index))
        await until(lambda: index.last_number is not None)
        assert gateway.harness.scheduler._prefix_listener is not None
        following.cancel()

    serve(scenario)


def test_a_tenant_hears_of_its_own_blocks_only(serve: Serve, tmp_path: Path) -> None:
    async def scenario(gateway: Gateway) -> None:
        alice, bob = Index(), Index()
        tasks = [
            asyncio.create_task(follow(gateway, alice, ALICE)),
            asyncio.create_task(follow(gateway, bob, BOB)),
        ]
        await until(lambda: alice.last_number is not None and bob.last_number is not None)
        message = request()
        message.tokenized.input_ids[:] = [1] * 20
        await read_all(gateway.stub.Generate(message, metadata=bearer(ALICE)))
        await until(lambda: [1] * 4 in alice.tokens.values())
        assert not bob.tokens
        for task in tasks:
            task.cancel()

    serve(scenario, security=with_tokens(tmp_path))


def test_calls_without_a_token_are_refused(serve: Serve, tmp_path: Path) -> None:
    async def scenario(gateway: Gateway) -> None:
        error = await failure(gateway.stub.Generate(request()))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED

    serve(scenario, security=with_tokens(tmp_path))


def test_a_tenant_cannot_abort_what_is_not_its_own(serve: Serve, tmp_path: Path) -> None:
    async def scenario(gateway: Gateway) -> None:
        message = request(request_id="same", max_tokens=100)
        call = asyncio.create_task(read_all(gateway.stub.Generate(message, metadata=bearer(ALICE))))
        engine = gateway.harness.engine
        await until(lambda: bool(engine.live_requests()))
        abort = pb.AbortRequest(request_ids=["same"])
        await gateway.stub.Abort(abort, metadata=bearer(BOB))
        assert engine.live_requests()
        await gateway.stub.Abort(abort, metadata=bearer(ALICE))
        assert (await call)[-1].complete.finish_reason == "abort"

    serve(scenario, security=with_tokens(tmp_path), connect=False)


@pytest.mark.parametrize(("arguments", "wanted"), [([], True), (["--no-gateway"], False)])
def test_gateways_are_served_unless_somebody_says_no(arguments: list[str], wanted: bool) -> None:
    assert gateway_is_wanted(SchedulerSettings.from_arguments(arguments)) is wanted


def test_without_the_stubs_only_an_explicit_wish_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("scheduler_service.server.find_spec", lambda name: None)
    assert not gateway_is_wanted(SchedulerSettings.from_arguments([]))
    with pytest.raises(RuntimeError, match=r"nanovllm-grpc\[gateway\]"):
        gateway_is_wanted(SchedulerSettings.from_arguments(["--gateway"]))
