"""A decoder layer of fused kernels inside a CUDA graph, launched in order and dependently."""

import pytest
import torch

from nanovllm_core.kernels.linear_residual import linear_residual
from nanovllm_core.kernels.paged_decode import paged_decode_attention
from nanovllm_core.kernels.qk_norm_rope_cache import qk_norm_rope_cache
from nanovllm_core.kernels.rms_norm_linear import rms_norm_linear
from nanovllm_core.kernels.silu_mul_linear import silu_mul_linear
from nanovllm_core.kernels.workspace import Workspace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU"),
]

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, PAGE = 1024, 16, 8, 128, 3072, 64
EPS = 1e-6


class Layer:
    """Weights, cache and device state of one layer for `rows` sequences."""

    def __init__(self, rows: int) -> None:
        def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (scale * torch.randn(*shape, device="cuda")).to(torch.bfloat16)

        self.rows = rows
        self.w_qkv = random((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN, scale=HIDDEN**-0.5)
        self.w_o = random(HIDDEN, HEADS * HEAD_DIM, scale=0.02)
        self.w_gate_up = random(2 * FFN, HIDDEN, scale=HIDDEN**-0.5)
        self.w_down = random(HIDDEN, FFN, scale=0.02)
        self.norm = random(HEAD_DIM)
        self.key = random(rows * 8, PAGE, KV_HEADS, HEAD_DIM)
        self.value = random(rows * 8, PAGE, KV_HEADS, HEAD_DIM)
        blocks = torch.randperm(rows * 8, device="cuda")
        self.tables = blocks.to(torch.int32).view(rows, 8)
        angles = torch.rand(512, HEAD_DIM // 2, device="cuda")
        self.cos, self.sin = angles.cos(), angles.sin()
        self.positions = torch.full((rows,), 300, device="cuda")
        self.hidden = random(rows, HIDDEN)
        self.workspace = Workspace.allocate(1 << 22, 1 << 12, torch.device("cuda"))

    def step(self, dependent: bool) -> None:
        blocks = self.tables.gather(1, self.positions[:, None] // PAGE).squeeze(1).long()
        slots = blocks * PAGE + self.positions % PAGE
        lens = (self.positions + 1).to(torch.int32)
        qkv = rms_norm_linear(self.hidden, self.w_qkv, EPS, dependent=dependent)
        query = qk_norm_rope_cache(
            qkv,
            self.norm,
            self.norm,
            EPS,
            self.cos,
            self.sin,
            self.positions,
            slots,
            self.key,
            self.value,
            HEADS,
            dependent=dependent,
        )
        attended = paged_decode_attention(
            query,
            self.key,
            self.value,
            self.tables,
            lens,
            HEAD_DIM**-0.5,
            self.workspace,
            dependent=dependent,
        ).view(self.rows, -1)
        linear_residual(attended, self.w_o, self.hidden, self.workspace, dependent=dependent)
        activated = silu_mul_linear(self.hidden, self.w_gate_up, eps=EPS, dependent=dependent)
        linear_residual(activated, self.w_down, self.hidden, self.workspace, dependent=dependent)
        self.positions += 1


def final_state(rows: int, dependent: bool, graph: bool, steps: int) -> list[torch.Tensor]:
    torch.manual_seed(1)
    layer = Layer(rows)
    start = [layer.hidden, layer.key, layer.value, layer.positions]
    saved = [tensor.clone() for tensor in start]
    # Compile outside the capture, then put everything back.
    layer.step(dependent)
    for tensor, copy in zip(start, saved, strict=True):
        tensor.copy_(copy)
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            layer.step(dependent)
        for _ in range(steps):
            captured.replay()
    else:
        for _ in range(steps):
            layer.step(dependent)
    torch.cuda.synchronize()
    assert layer.hidden.isfinite().all()
    return start


@pytest.mark.parametrize("rows", [1, 8, 24, 64])
def test_graph_replays_and_dependent_launches_change_no_bit(rows):
    eager = final_state(rows, dependent=False, graph=False, steps=50)
    for dependent in (False, True):
        replayed = final_state(rows, dependent=dependent, graph=True, steps=50)
        for one, other in zip(eager, replayed, strict=True):
            assert torch.equal(one, other)
