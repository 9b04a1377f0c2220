"""The model runner for GPUs: launches without waiting, collects later.

An iteration replays CUDA graphs: one for its prefill chunks, one for the slots that decode. Those
that need what the graphs do not hold (penalties, biases, log-probabilities) run kernel by kernel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from executor_service.batch_state import BatchState
from executor_service.decode_graphs import DecodeGraphs, sampling_kind
from executor_service.model_runner import ModelRunner, StepLogprobs
from executor_service.prefill_graphs import PrefillGraphs
from executor_service.runner import PendingStep, StepOutput
from executor_service.slots import Chunk, HostSlot, SlotTable
from nanovllm_core.attention import AttentionBackend
from nanovllm_core.fused_model import FusedModel
from nanovllm_core.kv_cache import KVCache


@dataclass(slots=True)
class _Timeline:
    """End of the iteration that was collected last."""

    end: torch.cuda.Event | None = None


@dataclass(frozen=True, slots=True)
class _Graphs:
    prefill: PrefillGraphs
    decode: DecodeGraphs


@dataclass(slots=True)
class _GpuStep:
    """Results on their way to pinned memory."""

    slots: list[int]
    # [2, rows] int32 on the host: tokens and finish flags; more rows than slots are padding.
    results: Tensor
    logprobs: StepLogprobs | None
    from_graph: bool
    start: torch.cuda.Event
    end: torch.cuda.Event
    timeline: _Timeline

    def has_ended(self) -> bool:
        """Whether the device has got there."""
        return self.end.query()

    def collect(self) -> StepOutput:
        """Waits for the device."""
        self.end.synchronize()
        previous, self.timeline.end = self.timeline.end, self.end
        idle_s = 0.0 if previous is None else max(0.0, previous.elapsed_time(self.start) * 1e-3)
        count = len(self.slots)
        token_ids, flags = self.results[:, :count].tolist()
        return StepOutput(
            slots=self.slots,
            token_ids=token_ids,
            finish_flags=flags,
            logprobs=self.logprobs.per_slot() if self.logprobs is not None else [],
            busy_s=self.start.elapsed_time(self.end) * 1e-3,
            idle_s=idle_s,
            from_graph=self.from_graph,
        )


class CudaRunner:
    """Joins model, cache and batch state on a GPU; see `runner.Runner`."""

    # One iteration runs, and two more are queued behind it: taking in results and applying a plan
    # with many admissions can take the host longer than one iteration takes the device.
    pipeline_depth = 2

    def __init__(
        self,
        model: FusedModel,
        cache: KVCache,
        attention: AttentionBackend,
        state: BatchState,
        *,
        use_graphs: bool,
    ) -> None:
        """Captures the graphs, which takes a few seconds, unless told not to."""
        self._eager = ModelRunner(model, cache, attention, state)
        self._vocab_size = state.limits.vocab_size
        self._graphs: _Graphs | None = None
        self._timeline = _Timeline()
        if use_graphs:
            self._graphs = _Graphs(
                PrefillGraphs(model, cache, attention, state),
                DecodeGraphs(model, cache, attention, state),
            )
            self._graphs.prefill.capture()
            self._graphs.decode.capture()

    @torch.inference_mode()
    def launch(self, chunks: list[Chunk], decode_slots: list[int], slots: SlotTable) -> PendingStep:
        """Starts the iteration."""
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        sampled_slots = [chunk.slot for chunk in chunks if chunk.completes] + decode_slots
        owners = [slots[slot] for slot in sampled_slots]
        logprobs = None
        start.record()
        from_graph = self._graphs is not None and all(map(self._fits_graph, owners))
        if self._graphs is not None and from_graph:
            self._graphs.prefill.run(chunks)
            kind = sampling_kind((owner.sampling for owner in owners), self._vocab_size)
            # Attention takes rows in order: the longest first, so that none of them ends last.
            sampled_slots.sort(key=lambda slot: slots[slot].num_tokens, reverse=True)
            results = self._graphs.decode.replay(sampled_slots, kind)
        else:
            step = self._eager.run(chunks, decode_slots, slots)
            sampled_slots = step.slots
            results = step.results()
            on_device = step.logprobs(slots)
            logprobs = on_device.map(_to_host) if on_device is not None else None
        host = _to_host(results)
        end.record()
        return _GpuStep(sampled_slots, host, logprobs, from_graph, start, end, self._timeline)

    @staticmethod
    def _fits_graph(owner: HostSlot) -> bool:
        sampling = owner.sampling
        return (
            sampling.num_logprobs < 0
            and not sampling.has_penalty
            and len(sampling.bias_token_ids) == 0
            and owner.num_tokens >= owner.min_total_tokens
        )


def _to_host(tensor: Tensor) -> Tensor:
    """A copy on its way to pinned memory; there once the device has passed this point."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
