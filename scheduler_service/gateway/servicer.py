"""vllm.grpc.engine.VllmEngine: translates, as our own servicer does, and nothing else."""

import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path

import grpc
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2, vllm_engine_pb2_grpc

from scheduler_service.access.caller import caller_of
from scheduler_service.access.tenancy import Tenancy
from scheduler_service.answering import Context, fail, reply, write
from scheduler_service.engine import Engine
from scheduler_service.errors import InvalidFieldError, RequestError
from scheduler_service.gateway.cache_events import CacheEvents
from scheduler_service.gateway.errors import for_gateway
from scheduler_service.gateway.load import LoadReader
from scheduler_service.gateway.responses import StreamedResponses, WholeResponses
from scheduler_service.gateway.tokenizer_archive import TokenizerArchive
from scheduler_service.gateway.translation import translate
from scheduler_service.intake import Intake
from scheduler_service.serving_state import ServingState
from scheduler_service.telemetry.request_observer import RequestObserver

_SERVICE_NAME: str = vllm_engine_pb2.DESCRIPTOR.services_by_name["VllmEngine"].full_name

# Most ids in one Abort, and most seconds that FlushCache waits.
_MAX_ABORTS = 4096
_MAX_FLUSH_WAIT_S = 60.0


class VllmEngineServicer(vllm_engine_pb2_grpc.VllmEngineServicer):
    """The part of vLLM's service that a gateway for text generation needs."""

    def __init__(
        self,
        engine: Engine,
        intake: Intake,
        serving: ServingState,
        load: LoadReader,
        directory: Path,
        *,
        tenancy: Tenancy | None = None,
        write_timeout_s: float = 60.0,
        observer: RequestObserver | None = None,
    ) -> None:
        """`directory` is the model's."""
        self._engine = engine
        self._intake = intake
        self._serving = serving
        self._load = load
        self._directory = directory
        self._tenancy = tenancy or Tenancy()
        self._write_timeout_s = write_timeout_s
        self._observer = observer or RequestObserver()
        self._archive = TokenizerArchive(directory)
        self._cache_events = CacheEvents(engine.pool.fleet.prefixes)
        self._started_s = time.monotonic()

    def add_to(self, server: grpc.aio.Server) -> str:
        """Has a server serve it; returns the service's name."""
        vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(self, server)
        return _SERVICE_NAME

    async def Generate(  # noqa: N802
        self, request: vllm_engine_pb2.GenerateRequest, context: Context
    ) -> None:
        """Streams the answer, or sends it whole at the end.

        gRPC sends the initial metadata with the first message, no earlier: until then a gateway can
        go elsewhere.
        """
        remaining_s = context.time_remaining()
        deadline_s = None if remaining_s is None else time.monotonic() + remaining_s
        with self._observer.observe(request, context, f"{_SERVICE_NAME}/Generate") as call:
            try:
                with self._intake.counting_refusals():
                    ours = translate(request, with_text=call.texts is not None)
                    live = await self._intake.admit(ours, call, deadline_s)
                kind = StreamedResponses if request.stream else WholeResponses
                responses = kind(live, self._engine.model.eos_token_ids)
                async with aclosing(self._engine.deltas(live, deadline_s)) as deltas:
                    async for delta in deltas:
                        for response in responses.of(delta):
                            await write(context, response, self._write_timeout_s)
                        if call.texts is not None:
                            call.texts.add(delta)
            except RequestError as error:
                call.fail(error)
                await fail(context, for_gateway(error))

    async def Abort(  # noqa: N802
        self, request: vllm_engine_pb2.AbortRequest, context: Context
    ) -> vllm_engine_pb2.AbortResponse:
        """Ends requests of the caller; ids of none are ignored."""
        owner = self._tenancy.owner_of(caller_of(context))

        async def abort() -> vllm_engine_pb2.AbortResponse:
            if len(request.request_ids) > _MAX_ABORTS:
                raise InvalidFieldError("request_ids", f"at most {_MAX_ABORTS} ids")
            for request_id in request.request_ids:
                self._engine.abort(request_id, owner)
            return vllm_engine_pb2.AbortResponse()

        return await reply(context, abort)

    async def HealthCheck(  # noqa: N802
        self, request: vllm_engine_pb2.HealthCheckRequest, context: Context
    ) -> vllm_engine_pb2.HealthCheckResponse:
        """Healthy under the same conditions as in grpc.health.v1."""
        if self._serving.is_serving:
            return vllm_engine_pb2.HealthCheckResponse(healthy=True)
        reason = "draining" if self._serving.is_draining else "no executor is connected"
        return vllm_engine_pb2.HealthCheckResponse(healthy=False, message=reason)

    async def GetModelInfo(  # noqa: N802
        self, request: vllm_engine_pb2.GetModelInfoRequest, context: Context
    ) -> vllm_engine_pb2.GetModelInfoResponse:
        """Describes the model."""
        model = self._engine.model
        longest = self._engine.max_model_len
        return vllm_engine_pb2.GetModelInfoResponse(
            # A gateway on this machine reads the tokenizer there; others call GetTokenizer.
            model_path=str(self._directory),
            tokenizer_path=str(self._directory),
            served_model_name=model.name,
            is_generation=True,
            architectures=[model.architecture],
            vocab_size=model.vocab_size,
            max_context_length=longest,
            max_req_input_len=longest - 1,
            eos_token_ids=model.eos_token_ids,
            default_sampling_params_json=json.dumps(asdict(model.defaults)),
        )

    async def GetServerInfo(  # noqa: N802
        self, request: vllm_engine_pb2.GetServerInfoRequest, context: Context
    ) -> vllm_engine_pb2.GetServerInfoResponse:
        """Describes the process and its executors."""
        response = vllm_engine_pb2.GetServerInfoResponse(
            active_requests=len(self._engine.live_requests()),
            is_paused=self._serving.is_draining,
            uptime_seconds=time.monotonic() - self._started_s,
            server_type="vllm-grpc",
            data_parallel_size=1,
        )
        infos = [each.info for each in self._engine.pool.executors() if each.is_connected]
        if infos:
            # A gateway that balances takes the executors for one.
            response.block_size = infos[0].block_size
            response.attention_backend = infos[0].attention_backend
            response.model_dtype = infos[0].dtype
            response.max_num_seqs = sum(info.max_num_seqs for info in infos)
        return response

    async def GetLoads(  # noqa: N802
        self, request: vllm_engine_pb2.GetLoadsRequest, context: Context
    ) -> vllm_engine_pb2.GetLoadsResponse:
        """Describes the load."""
        return self._load.read()

    async def GetTokenizer(  # noqa: N802
        self, request: common_pb2.GetTokenizerRequest, context: Context
    ) -> None:
        """Sends a zip of the tokenizer's files; its hash comes with the last piece."""
        sha256 = await asyncio.to_thread(lambda: self._archive.sha256)
        messages = [common_pb2.GetTokenizerChunk(data=data) for data in self._archive.chunks()]
        messages[-1].sha256 = sha256
        await self._write_all(messages, context)

    async def FlushCache(  # noqa: N802
        self, request: common_pb2.FlushCacheRequest, context: Context
    ) -> common_pb2.FlushCacheResponse:
        """Forgets all cached prefixes, once no request is under way.

        Where callers are tenants it is an administrator's to do: the prefixes are not one caller's.
        """
        if caller_of(context).is_authenticated:
            await context.abort(
                grpc.StatusCode.PERMISSION_DENIED,
                "the cache holds prefixes of other callers too; an administrator flushes it with "
                "`nanovllm admin flush-prefix-cache`",
            )
        try:
            async with asyncio.timeout(min(max(request.timeout_s, 0.0), _MAX_FLUSH_WAIT_S)):
                await self._engine.wait_until_idle()
        except TimeoutError:
            return common_pb2.FlushCacheResponse(
                success=False, message="requests are under way; try again, or with a timeout_s"
            )
        num_freed = self._engine.flush_prefix_cache()
        return common_pb2.FlushCacheResponse(success=True, message=f"{num_freed} blocks freed")

    async def SubscribeKvEvents(  # noqa: N802
        self, request: common_pb2.SubscribeKvEventsRequest, context: Context
    ) -> None:
        """Streams how the prefix cache changes, as far as it is the caller's."""
        salt = self._tenancy.cache_salt(caller_of(context), "")
        with self._cache_events.subscription(salt) as feed:
            async with aclosing(feed.batches(request.start_sequence_number)) as batches:
                async for batch in batches:
                    await self._write_all([batch], context)

    async def Embed(  # noqa: N802
        self, request: vllm_engine_pb2.EmbedRequest, context: Context
    ) -> None:
        """Refused: the models here generate."""
        await _unimplemented(context, "embeddings are not supported; this server generates text")

    async def StartProfile(  # noqa: N802
        self, request: common_pb2.StartProfileRequest, context: Context
    ) -> None:
        """Refused: a caller must not slow down the others."""
        await _unimplemented(context, "use `make profile` on the executor's machine")

    async def StopProfile(  # noqa: N802
        self, request: common_pb2.StopProfileRequest, context: Context
    ) -> None:
        """Refused like StartProfile."""
        await _unimplemented(context, "use `make profile` on the executor's machine")

    async def _write_all(self, messages: Sequence[object], context: Context) -> None:
        try:
            for message in messages:
                await write(context, message, self._write_timeout_s)
        except RequestError as error:
            await fail(context, error)


async def _unimplemented(context: Context, message: str) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, message)
