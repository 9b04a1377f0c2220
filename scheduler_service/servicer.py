"""The public gRPC service: translates messages and errors, and nothing else."""

import time
from collections.abc import AsyncIterable
from contextlib import aclosing

from nanovllm import __version__
from nanovllm.v1 import inference_pb2, inference_pb2_grpc
from scheduler_service.access.caller import caller_of
from scheduler_service.access.tenancy import Tenancy
from scheduler_service.answering import Context, fail, reply, write
from scheduler_service.engine import Engine
from scheduler_service.errors import InvalidFieldError, RequestError
from scheduler_service.intake import Intake
from scheduler_service.many_answers import ManyAnswers
from scheduler_service.responses import generate_response, resume_info
from scheduler_service.telemetry.metrics import SchedulerMetrics
from scheduler_service.telemetry.request_observer import RequestObserver
from scheduler_service.text.prompt_encoder import PromptEncoder
from scheduler_service.validation import (
    Prompt,
    TextPrompt,
    valid_chat,
    valid_detokenize_ids,
)

# Most tokens of a Tokenize or Detokenize call, in lengths of the model: enough to see by how much a
# text is too long, and little enough that others do not wait for it.
_MAX_MODEL_LENGTHS = 4


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """nanovllm.v1.InferenceService."""

    def __init__(
        self,
        engine: Engine,
        encoder: PromptEncoder,
        metrics: SchedulerMetrics,
        *,
        has_chat_template: bool,
        tenancy: Tenancy | None = None,
        write_timeout_s: float = 60.0,
        observer: RequestObserver | None = None,
    ) -> None:
        self._engine = engine
        self._encoder = encoder
        self._has_chat_template = has_chat_template
        self._observer = observer or RequestObserver()
        self._tenancy = tenancy or Tenancy()
        self._intake = Intake(engine, encoder, metrics, self._tenancy)
        self._write_timeout_s = write_timeout_s
        self._started_s = time.monotonic()

    async def Generate(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> None:
        """Streams the deltas of one request."""
        remaining_s = context.time_remaining()
        deadline_s = None if remaining_s is None else time.monotonic() + remaining_s
        with self._observer.observe(request, context) as call:
            try:
                with self._intake.counting_refusals():
                    live = await self._intake.admit(request, call, deadline_s)
                info = resume_info(request, live, self._engine.model.fingerprint)
                async with aclosing(self._engine.deltas(live, deadline_s)) as deltas:
                    async for delta in deltas:
                        response = generate_response(live.request_id, delta)
                        if info is not None:
                            response.resume_info.CopyFrom(info)
                            info = None
                        await write(context, response, self._write_timeout_s)
                        if call.texts is not None:
                            call.texts.add(delta)
            except RequestError as error:
                call.fail(error)
                await fail(context, error)

    async def GenerateMany(  # noqa: N802
        self, requests: AsyncIterable[inference_pb2.GenerateManyRequest], context: Context
    ) -> None:
        """Streams the deltas of many requests."""
        answers = ManyAnswers(
            context, self._engine, self._intake, self._observer, self._write_timeout_s
        )
        try:
            await answers.serve(requests)
        except RequestError as error:
            await fail(context, error)

    async def Tokenize(  # noqa: N802
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        """Token ids of a text or a conversation."""
        return await reply(context, lambda: self._tokenize(request))

    async def _tokenize(
        self, request: inference_pb2.TokenizeRequest
    ) -> inference_pb2.TokenizeResponse:
        kind = request.WhichOneof("prompt")
        prompt: Prompt
        if kind == "text":
            prompt = TextPrompt(request.text)
        elif kind == "chat":
            prompt = valid_chat(request.chat)
        else:
            raise InvalidFieldError("prompt", "set one of text and chat")
        add_special = request.add_special_tokens or not request.HasField("add_special_tokens")
        longest = self._engine.max_model_len
        token_ids: list[int] = []
        if kind != "text" or request.text:
            token_ids = await self._encoder.encode(
                prompt,
                max_tokens=_MAX_MODEL_LENGTHS * longest,
                add_special_tokens=add_special,
            )
        return inference_pb2.TokenizeResponse(token_ids=token_ids, max_model_len=longest)

    async def Detokenize(  # noqa: N802
        self, request: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        """Text of token ids."""
        return await reply(context, lambda: self._detokenize(request))

    async def _detokenize(
        self, request: inference_pb2.DetokenizeRequest
    ) -> inference_pb2.DetokenizeResponse:
        token_ids = valid_detokenize_ids(
            request.token_ids,
            self._engine.model,
            max_ids=_MAX_MODEL_LENGTHS * self._engine.max_model_len,
        )
        skip = request.skip_special_tokens or not request.HasField("skip_special_tokens")
        text = await self._encoder.decode(token_ids, skip_special_tokens=skip)
        return inference_pb2.DetokenizeResponse(text=text)

    async def Abort(  # noqa: N802
        self, request: inference_pb2.AbortRequest, context: Context
    ) -> inference_pb2.AbortResponse:
        """Ends a live request."""
        owner = self._tenancy.owner_of(caller_of(context))
        return await reply(context, lambda: self._abort(request, owner))

    async def _abort(
        self, request: inference_pb2.AbortRequest, owner: str
    ) -> inference_pb2.AbortResponse:
        if not request.request_id:
            raise InvalidFieldError("request_id", "must not be empty")
        aborted = self._engine.abort(request.request_id, owner)
        return inference_pb2.AbortResponse(aborted=aborted)

    async def GetModelInfo(  # noqa: N802
        self, request: inference_pb2.GetModelInfoRequest, context: Context
    ) -> inference_pb2.GetModelInfoResponse:
        """Describes the model."""
        model = self._engine.model
        defaults = model.defaults
        return inference_pb2.GetModelInfoResponse(
            model_name=model.name,
            architecture=model.architecture,
            max_model_len=self._engine.max_model_len,
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
            default_sampling_params=inference_pb2.SamplingParams(
                temperature=defaults.temperature,
                top_p=defaults.top_p,
                top_k=defaults.top_k,
                min_p=defaults.min_p,
                repetition_penalty=defaults.repetition_penalty,
            ),
            has_chat_template=self._has_chat_template,
            fingerprint=model.fingerprint,
        )

    async def GetServerStatus(  # noqa: N802
        self, request: inference_pb2.GetServerStatusRequest, context: Context
    ) -> inference_pb2.GetServerStatusResponse:
        """Describes load and executors."""
        pool = self._engine.pool
        executors = [each for each in pool.executors() if each.is_connected]
        response = inference_pb2.GetServerStatusResponse(
            version=__version__,
            uptime_s=time.monotonic() - self._started_s,
            num_running=pool.load.num_running,
            num_waiting=pool.load.num_waiting,
            executor_state=inference_pb2.EXECUTOR_STATE_DISCONNECTED,
            executors=[each.summary() for each in executors],
        )
        if executors:
            response.executor_state = inference_pb2.EXECUTOR_STATE_CONNECTED
            response.executor.CopyFrom(response.executors[0])
            response.num_kv_blocks = sum(each.num_kv_blocks for each in executors)
            response.num_free_kv_blocks = sum(each.num_free_kv_blocks for each in executors)
            response.num_cached_kv_blocks = sum(each.num_cached_kv_blocks for each in executors)
            response.kv_block_size = executors[0].info.block_size
        return response
