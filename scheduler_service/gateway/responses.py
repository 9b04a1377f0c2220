"""From the engine's deltas to vLLM's responses."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from smg_grpc_proto.generated import vllm_engine_pb2

from scheduler_service.completion import Delta
from scheduler_service.live_request import LiveRequest
from scheduler_service.sequence import FinishReason, TokenLogprobs

Response: TypeAlias = vllm_engine_pb2.GenerateResponse


class StreamedResponses:
    """A chunk for every delta with tokens, and a `complete` behind the last one of each index."""

    def __init__(self, live: LiveRequest, eos_token_ids: Sequence[int]) -> None:
        self._seqs = {completion.index: completion.seq for completion in live.completions}
        self._eos_token_ids = eos_token_ids
        self._num_sent = dict.fromkeys(self._seqs, 0)

    def of(self, delta: Delta) -> list[Response]:
        """What to send for a delta; the ids of a `complete` were in the chunks before it."""
        responses = []
        if delta.token_ids:
            seq = self._seqs[delta.index]
            self._num_sent[delta.index] += len(delta.token_ids)
            chunk = vllm_engine_pb2.GenerateStreamChunk(
                index=delta.index,
                token_ids=delta.token_ids,
                prompt_tokens=seq.num_prompt_tokens,
                completion_tokens=self._num_sent[delta.index],
                cached_tokens=seq.num_cached_tokens,
                output_logprobs=_logprobs(delta.token_ids, delta.logprobs),
            )
            responses.append(Response(chunk=chunk))
        if delta.finish_reason is not None:
            complete = _complete(delta, delta.finish_reason, self._eos_token_ids)
            responses.append(Response(complete=complete))
        return responses


@dataclass(slots=True)
class _Output:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class WholeResponses:
    """Nothing before the end of the request: one `complete` for each index, with everything.

    The first message of a stream ends the gateway's liberty to ask another server.
    """

    def __init__(self, live: LiveRequest, eos_token_ids: Sequence[int]) -> None:
        self._eos_token_ids = eos_token_ids
        self._outputs = {completion.index: _Output() for completion in live.completions}
        self._ended: list[Response] = []

    def of(self, delta: Delta) -> list[Response]:
        """What to send for a delta."""
        output = self._outputs[delta.index]
        output.token_ids += delta.token_ids
        output.logprobs += delta.logprobs
        if delta.finish_reason is None:
            return []
        del self._outputs[delta.index]
        complete = _complete(delta, delta.finish_reason, self._eos_token_ids)
        complete.output_ids.extend(output.token_ids)
        if output.logprobs:
            complete.output_logprobs.CopyFrom(_logprobs(output.token_ids, output.logprobs))
        self._ended.append(Response(complete=complete))
        return [] if self._outputs else self._ended


def _complete(
    delta: Delta, reason: FinishReason, eos_token_ids: Sequence[int]
) -> vllm_engine_pb2.GenerateComplete:
    complete = vllm_engine_pb2.GenerateComplete(
        index=delta.index,
        finish_reason=reason.value,
        prompt_tokens=delta.num_prompt_tokens,
        completion_tokens=delta.num_output_tokens,
        cached_tokens=delta.num_cached_tokens,
    )
    if isinstance(delta.stop_reason, str):
        complete.matched_stop_str = delta.stop_reason
    elif delta.stop_reason is not None and delta.stop_reason not in eos_token_ids:
        complete.matched_token_id = delta.stop_reason
    return complete


def _logprobs(
    token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
) -> vllm_engine_pb2.OutputLogProbs | None:
    if not logprobs:
        return None
    return vllm_engine_pb2.OutputLogProbs(
        token_logprobs=[each.chosen for each in logprobs],
        token_ids=token_ids,
        top_logprobs=[
            vllm_engine_pb2.TopLogProbs(values=each.top_logprobs, token_ids=each.top_token_ids)
            for each in logprobs
        ],
    )
