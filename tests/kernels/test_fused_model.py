"""The fused model and the decode iteration of the CUDA graphs, against the plain model."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from executor_service.batch_state import FINISH_LENGTH, FINISH_NONE, FINISH_NOT_RUN, BatchState
from executor_service.decode_graphs import DecodeGraphs, SamplingKind
from executor_service.model_runner import ModelRunner
from executor_service.plan_reader import AdmitOrder, ExecutorLimits, PlanOrder, SlotSampling
from executor_service.prefill_graphs import PrefillGraphs, token_sizes
from executor_service.slots import Chunk, SlotTable
from nanovllm_core import fused_model
from nanovllm_core.attention import create_backend
from nanovllm_core.config import ModelConfig
from nanovllm_core.fused_model import FusedModel
from nanovllm_core.kernels.rms_norm_linear import rms_norm_linear
from nanovllm_core.kv_cache import KVCache
from nanovllm_core.loader import load_model
from tests.checkpoints import make_checkpoint

BLOCK_SIZE = 16


NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="too slow in Triton's interpreter"),
]


@pytest.fixture(
    scope="module",
    params=["qwen3", *(pytest.param(name, marks=NEEDS_GPU) for name in ("llama", "qwen2"))],
)
def checkpoint(request, tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param, num_layers=1)


class Engine:
    """One model on one device, driven by hand."""

    def __init__(self, directory, device, *, fused: bool, max_num_seqs: int = 4) -> None:
        self.config = ModelConfig.from_directory(directory)
        self.limits = ExecutorLimits(
            vocab_size=self.config.vocab_size,
            num_blocks=16,
            block_size=BLOCK_SIZE,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=256,
            max_model_len=64,
        )
        model = load_model(directory, self.config, torch.float32, device, pack=not fused)
        self.model = FusedModel(model) if fused else model
        self.attention = create_backend("triton" if fused else "torch", self.config, device)
        self.cache = KVCache(self.config, 16, BLOCK_SIZE, torch.float32, device)
        self.state = BatchState(self.limits, device)
        self.slots = SlotTable(self.limits)
        self.runner = ModelRunner(self.model, self.cache, self.attention, self.state)

    def admit(self, slot: int, tokens: list[int], blocks: list[int], limit: int = 60) -> None:
        """Admits a sequence and computes its prompt."""
        (chunk,) = self.occupy(slot, tokens, blocks, limit)
        self.token = self.runner.run([chunk], [], self.slots).results()[0].item()
        self.slots.complete_prefill(slot)

    def occupy(
        self,
        slot: int,
        tokens: list[int],
        blocks: list[int],
        limit: int = 60,
        chunks: tuple[int, ...] = (),
        num_cached: int = 0,
    ) -> list[Chunk]:
        """Admits a sequence; returns its prompt in chunks of these lengths, as a whole by default.

        Each chunk is of a plan of its own.
        """
        order = AdmitOrder(
            slot=slot,
            token_ids=np.array(tokens, dtype=np.int32),
            block_ids=np.array(blocks, dtype=np.int32),
            num_cached_tokens=num_cached,
            num_prompt_tokens=len(tokens),
            max_total_tokens=limit,
            min_total_tokens=0,
            stop_token_ids=np.array([], dtype=np.int32),
            sampling=SlotSampling(
                seed=7,
                temperature=0.0,
                top_k=0,
                top_p=1.0,
                min_p=0.0,
                presence_penalty=0.0,
                frequency_penalty=0.0,
                repetition_penalty=1.0,
                bias_token_ids=np.array([], dtype=np.int32),
                bias_values=np.array([], dtype=np.float32),
                num_logprobs=-1,
            ),
        )
        self.state.admit([order])
        admits, taken = [order], []
        for length in chunks or (len(tokens) - num_cached,):
            step_id = self.slots.applied_step_id + 1
            taken += self.slots.apply(PlanOrder(step_id, [], admits, [], [(slot, length)]))
            admits = []
        return taken

    def known(self, slot: int) -> list[int]:
        count = int(self.state.ints("num_tokens")[slot])
        return self.state.token_ids[slot, :count].tolist()


PROMPTS = {0: (list(range(3, 25)), [5, 9, 2]), 2: ([7, 1, 200], [0, 11])}


def test_decode_iterations_append_the_tokens_of_the_plain_model(checkpoint, device):
    plain = Engine(checkpoint, device, fused=False)
    fused = Engine(checkpoint, device, fused=True)
    graphs = DecodeGraphs(fused.model, fused.cache, fused.attention, fused.state)
    for slot, (tokens, blocks) in PROMPTS.items():
        plain.admit(slot, tokens, blocks)
        fused.admit(slot, tokens, blocks)
    slots = list(PROMPTS)
    graphs.name_slots(slots)
    for step in range(3):
        plain.runner.run([], slots, plain.slots)
        for slot in slots:
            plain.slots.advance(slot)
        graphs.iterate(2, list(SamplingKind)[step])
    for slot in slots:
        assert fused.known(slot) == plain.known(slot)


def test_chunks_of_a_graph_fill_the_cache_and_leave_the_last_token_to_decoding(checkpoint, device):
    plain = Engine(checkpoint, device, fused=False)
    fused = Engine(checkpoint, device, fused=True)
    prefill = PrefillGraphs(fused.model, fused.cache, fused.attention, fused.state)
    decode = DecodeGraphs(fused.model, fused.cache, fused.attention, fused.state)
    long, short, single = list(range(3, 43)), [7, 1, 200], [9]
    for slot, (tokens, blocks) in {
        0: (long, [5, 9, 2, 7]),
        2: (short, [0, 11]),
        3: (single, [4]),
    }.items():
        plain.admit(slot, tokens, blocks)
    first, last = fused.occupy(0, long, [5, 9, 2, 7], chunks=(24, 16))
    others = fused.occupy(2, short, [0, 11]) + fused.occupy(3, single, [4])

    # A part of one prompt with all but the last tokens of two others, and then its rest.
    prefill.iterate(prefill.stage([first, *others]))
    assert fused.state.ints("num_computed")[:4].tolist() == [24, 0, 2, 0]
    assert fused.state.ints("active")[:4].tolist() == [0, 0, 1, 1]
    prefill.iterate(prefill.stage([last]))
    assert fused.state.ints("num_computed")[0].item() == 39
    decode.name_slots([0, 2, 3])
    for step in range(2):
        decode.iterate(4, SamplingKind.PLAIN)
        if step:
            plain.runner.run([], [0, 2, 3], plain.slots)
    for slot in (0, 2, 3):
        assert fused.known(slot) == plain.known(slot)


def test_a_chunk_may_build_on_a_block_that_another_of_the_same_plan_fills(tmp_path, device):
    # Two layers: keys and values of the first depend on no attention.
    checkpoint = make_checkpoint(tmp_path, "qwen3", num_layers=2)
    plain = Engine(checkpoint, device, fused=False)
    fused = Engine(checkpoint, device, fused=True)
    prefill = PrefillGraphs(fused.model, fused.cache, fused.attention, fused.state)
    decode = DecodeGraphs(fused.model, fused.cache, fused.attention, fused.state)
    whole = list(range(3, 3 + BLOCK_SIZE))
    longer = [*whole, 90, 91, 92]
    plain.admit(0, whole, [5, 9])
    plain.admit(1, longer, [2, 7])
    for cache in (fused.cache.key, fused.cache.value):
        cache.fill_(float("nan"))  # what is read before it is written shows
    chunks = fused.occupy(0, whole, [5, 9])
    chunks += fused.occupy(1, longer, [5, 7], num_cached=BLOCK_SIZE)
    prefill.iterate(prefill.stage(chunks))
    decode.name_slots([0, 1])
    for step in range(2):
        decode.iterate(2, SamplingKind.PLAIN)
        if step:
            plain.runner.run([], [0, 1], plain.slots)
    assert fused.known(0) == plain.known(0)
    assert fused.known(1) == plain.known(1)
    assert fused.state.ints("num_computed")[:2].tolist() == [BLOCK_SIZE + 1, len(longer) + 1]


def test_chunks_of_nothing_but_last_tokens_need_no_graph(checkpoint, device):
    engine = Engine(checkpoint, device, fused=True)
    prefill = PrefillGraphs(engine.model, engine.cache, engine.attention, engine.state)
    assert prefill.stage(engine.occupy(1, [9], [4])) == 0
    assert engine.state.ints("active")[1].item() == 1


def test_sizes_of_prefills_grow_by_at_most_a_half_and_end_at_the_limit():
    sizes = token_sizes(8192)
    assert sizes[:4] == [16, 24, 32, 48]
    assert sizes[-2:] == [6144, 8192]
    assert all(2 * small < 3 * large <= 4.5 * small for small, large in pairwise(sizes))
    assert token_sizes(700)[-2:] == [512, 700]
    assert token_sizes(5) == [5]


def test_rows_out_of_blocks_or_of_length_or_padding_do_not_run(checkpoint, device):
    engine = Engine(checkpoint, device, fused=True)
    graphs = DecodeGraphs(engine.model, engine.cache, engine.attention, engine.state)
    engine.admit(0, list(range(15)), [3])
    engine.admit(1, [4, 5], [6], limit=4)
    graphs.name_slots([0, 1])
    flags = []
    for _ in range(2):
        graphs.iterate(4, SamplingKind.PLAIN)
        flags.append(graphs.results(4)[1].tolist())
    assert flags[0] == [FINISH_NONE, FINISH_LENGTH, FINISH_NOT_RUN, FINISH_NOT_RUN]
    assert flags[1] == [FINISH_NOT_RUN] * 4
    assert len(engine.known(0)) == 17
    engine.state.grant([0], [1], [np.array([8], dtype=np.int32)])
    graphs.iterate(4, SamplingKind.PLAIN)
    assert graphs.results(4)[1, 0].item() == FINISH_NONE
    assert len(engine.known(0)) == 18


@pytest.mark.parametrize("norms", ["in the model's way", "of their own"])
def test_many_rows_take_the_same_path_as_few(checkpoint, device, norms, monkeypatch):
    """The path of large batches, forced onto a small one."""
    plain = Engine(checkpoint, device, fused=False)
    fused = Engine(checkpoint, device, fused=True)
    monkeypatch.setattr(fused.model, "_max_fused_rows", 0)
    if norms == "of their own":
        monkeypatch.setattr(fused.model, "_scales_late", False)
    for slot, (tokens, blocks) in PROMPTS.items():
        plain.admit(slot, tokens, blocks)
        fused.admit(slot, tokens, blocks)
        assert fused.token == plain.token


def test_the_first_layer_is_launched_after_what_it_may_read_early(tmp_path, device, monkeypatch):
    """Attention reads lengths and block tables before its wait, see `kernels/device.py`."""
    engine = Engine(make_checkpoint(tmp_path, "qwen3", num_layers=2), device, fused=True)
    starts = []

    def recording(*args, **kwargs):
        starts.append(kwargs["starts_chain"])
        return rms_norm_linear(*args, **kwargs)

    monkeypatch.setattr(fused_model, "rms_norm_linear", recording)
    engine.admit(0, [3, 4, 5], [3])
    assert starts == [True, False]
