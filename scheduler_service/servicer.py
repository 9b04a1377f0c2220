"""The public gRPC service: translates messages and errors, and nothing else."""

import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeAlias, TypeVar

import grpc

from nanovllm.v1 import inference_pb2, inference_pb2_grpc
from scheduler_service.completion import Delta
from scheduler_service.engine import Engine, LiveRequest
from scheduler_service.errors import InvalidFieldError, RequestError, to_status
from scheduler_service.executor_link import ExecutorLink
from scheduler_service.metrics import SchedulerMetrics
from scheduler_service.prompt_encoder import PromptEncoder
from scheduler_service.sequence import FinishReason
from scheduler_service.validation import (
    Prompt,
    TextPrompt,
    valid_chat,
    valid_detokenize_ids,
    validate_generate,
)

logger = logging.getLogger(__name__)

_FINISH_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: inference_pb2.FINISH_REASON_ABORT,
    FinishReason.ERROR: inference_pb2.FINISH_REASON_ERROR,
}

# Most tokens of a Tokenize or Detokenize call, in lengths of the model: enough to see by how much a
# text is too long, and little enough that others do not wait for it.
_MAX_MODEL_LENGTHS = 4

Context: TypeAlias = grpc.aio.ServicerContext
T = TypeVar("T")


def _version() -> str:
    try:
        return version("nanovllm-grpc")
    except PackageNotFoundError:
        return "unknown"


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """nanovllm.v1.InferenceService."""

    def __init__(
        self,
        engine: Engine,
        encoder: PromptEncoder,
        link: ExecutorLink,
        metrics: SchedulerMetrics,
        *,
        has_chat_template: bool,
    ) -> None:
        self._engine = engine
        self._encoder = encoder
        self._link = link
        self._metrics = metrics
        self._has_chat_template = has_chat_template
        self._started_s = time.monotonic()

    async def Generate(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> None:
        """Streams the deltas of one request."""
        remaining_s = context.time_remaining()
        deadline_s = None if remaining_s is None else time.monotonic() + remaining_s
        try:
            try:
                live = await self._admit(request)
            except RequestError as error:
                self._metrics.count_rejection(error.label)
                raise
            async with aclosing(self._engine.deltas(live, deadline_s)) as deltas:
                async for delta in deltas:
                    await context.write(_response(live.request_id, delta))
        except RequestError as error:
            await _fail(context, error)

    async def _admit(self, request: inference_pb2.GenerateRequest) -> LiveRequest:
        spec = validate_generate(request, self._engine.model)
        with self._engine.reserve(spec) as reservation:
            token_ids = await reservation.unless_aborted(
                self._encoder.encode(spec.prompt, max_tokens=self._engine.max_model_len - 1)
            )
            return self._engine.submit(reservation, token_ids)

    async def Tokenize(  # noqa: N802
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        """Token ids of a text or a conversation."""
        return await _reply(context, lambda: self._tokenize(request))

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
        return await _reply(context, lambda: self._detokenize(request))

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
        return await _reply(context, lambda: self._abort(request))

    async def _abort(self, request: inference_pb2.AbortRequest) -> inference_pb2.AbortResponse:
        if not request.request_id:
            raise InvalidFieldError("request_id", "must not be empty")
        return inference_pb2.AbortResponse(aborted=self._engine.abort(request.request_id))

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
        """Describes load and executor."""
        scheduler = self._engine.scheduler
        response = inference_pb2.GetServerStatusResponse(
            version=_version(),
            uptime_s=time.monotonic() - self._started_s,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            executor_state=inference_pb2.EXECUTOR_STATE_DISCONNECTED,
        )
        info, blocks = self._link.info, scheduler.blocks
        if info is not None and blocks is not None:
            response.executor_state = inference_pb2.EXECUTOR_STATE_CONNECTED
            response.num_kv_blocks = blocks.num_blocks
            response.num_free_kv_blocks = blocks.num_free
            response.num_cached_kv_blocks = blocks.num_cached
            response.kv_block_size = blocks.block_size
            response.executor.CopyFrom(
                inference_pb2.ExecutorSummary(
                    address=self._link.address,
                    epoch=info.epoch,
                    device=info.device,
                    dtype=info.dtype,
                    attention_backend=info.attention_backend,
                    max_num_seqs=info.max_num_seqs,
                    max_num_batched_tokens=info.max_num_batched_tokens,
                )
            )
        return response


async def _reply(context: Context, answer: Callable[[], Awaitable[T]]) -> T:
    """Answers a unary call, or ends it with the status of a RequestError."""
    try:
        return await answer()
    except RequestError as error:
        await _fail(context, error)
        raise  # not reached unless nobody waits for the answer any more


async def _fail(context: Context, error: RequestError) -> None:
    """Ends a call with the status of an error."""
    try:
        await context.abort_with_status(to_status(error))
    except grpc.aio.InternalError:
        # The call ended by itself at this moment: its deadline passed here and there at once.
        logger.debug("a call was over before it could be told: %s", error)


def _response(request_id: str, delta: Delta) -> inference_pb2.GenerateResponse:
    response = inference_pb2.GenerateResponse(
        request_id=request_id, index=delta.index, text=delta.text, token_ids=delta.token_ids
    )
    for logprobs in delta.logprobs:
        response.logprobs.add(
            logprob=logprobs.chosen,
            top_token_ids=logprobs.top_token_ids,
            top_logprobs=logprobs.top_logprobs,
        )
    if delta.finish_reason is not None:
        response.finish_reason = _FINISH_REASONS[delta.finish_reason]
        if delta.finish_reason is FinishReason.STOP:
            response.stop_reason.CopyFrom(_stop_reason(delta))
        response.usage.prompt_tokens = delta.num_prompt_tokens
        response.usage.completion_tokens = delta.num_output_tokens
        response.usage.cached_tokens = delta.num_cached_tokens
    return response


def _stop_reason(delta: Delta) -> Any:
    if isinstance(delta.stop_reason, str):
        return inference_pb2.StopReason(stop_string=delta.stop_reason)
    if isinstance(delta.stop_reason, int):
        return inference_pb2.StopReason(token_id=delta.stop_reason)
    return inference_pb2.StopReason()
