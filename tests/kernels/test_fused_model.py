"""The fused model and the decode iteration of the CUDA graphs, against the plain model."""

import numpy as np
import pytest
import torch

from executor_service.batch_state import FINISH_LENGTH, FINISH_NONE, FINISH_NOT_RUN, BatchState
from executor_service.decode_graphs import DecodeGraphs, SamplingKind
from executor_service.model_runner import ModelRunner
from executor_service.plan_reader import AdmitOrder, ExecutorLimits, PlanOrder, SlotSampling
from executor_service.slots import SlotTable
from nanovllm_core.attention import create_backend
from nanovllm_core.config import ModelConfig
from nanovllm_core.fused_model import FusedModel
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
        order = AdmitOrder(
            slot=slot,
            token_ids=np.array(tokens, dtype=np.int32),
            block_ids=np.array(blocks, dtype=np.int32),
            num_cached_tokens=0,
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
        plan = PlanOrder(self.slots.applied_step_id + 1, [], [order], [], [(slot, len(tokens))])
        chunks = self.slots.apply(plan)
        self.state.admit([order])
        self.token = self.runner.run(chunks, [], self.slots).results()[0].item()
        self.slots.complete_prefill(slot)

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


def test_many_rows_take_the_same_path_as_few(checkpoint, device, monkeypatch):
    """The path of large batches, forced onto a small one."""
    plain = Engine(checkpoint, device, fused=False)
    fused = Engine(checkpoint, device, fused=True)
    monkeypatch.setattr(fused.model, "_max_fused_rows", 0)
    for slot, (tokens, blocks) in PROMPTS.items():
        plain.admit(slot, tokens, blocks)
        fused.admit(slot, tokens, blocks)
        assert fused.token == plain.token
