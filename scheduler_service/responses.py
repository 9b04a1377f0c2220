"""Messages of the public API about requests that are answered."""

from nanovllm.v1 import inference_pb2
from scheduler_service.completion import Delta
from scheduler_service.errors import RequestError
from scheduler_service.live_request import LiveRequest
from scheduler_service.sequence import FinishReason

_FINISH_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: inference_pb2.FINISH_REASON_ABORT,
    FinishReason.ERROR: inference_pb2.FINISH_REASON_ERROR,
}


def generate_response(request_id: str, delta: Delta) -> inference_pb2.GenerateResponse:
    """A delta as clients get it."""
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


def resume_info(
    request: inference_pb2.GenerateRequest, live: LiveRequest, fingerprint: str
) -> inference_pb2.ResumeInfo | None:
    """What the first response tells a client that may have to resume; None: it does not ask.

    `fingerprint` is that of the model.
    """
    if live.resume is None:
        return None
    seq = live.completions[0].seq
    has_ids = request.HasField("token_ids")
    return inference_pb2.ResumeInfo(
        prompt_token_ids=[] if has_ids else seq.token_ids[: seq.num_prompt_tokens],
        model_fingerprint=fingerprint,
    )


def request_failure(error: RequestError) -> inference_pb2.RequestFailure:
    """An error as clients of GenerateMany get it."""
    return inference_pb2.RequestFailure(
        code=error.code, message=str(error), details=error.details()
    )


def _stop_reason(delta: Delta) -> inference_pb2.StopReason:
    if isinstance(delta.stop_reason, str):
        return inference_pb2.StopReason(stop_string=delta.stop_reason)
    if isinstance(delta.stop_reason, int):
        return inference_pb2.StopReason(token_id=delta.stop_reason)
    return inference_pb2.StopReason()
