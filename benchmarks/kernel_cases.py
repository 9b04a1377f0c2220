"""What the kernel benchmark times: every fused kernel at Qwen3-0.6B's shapes, with its operands."""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks.kernel_timing import Case, Launch
from nanovllm_core import random as counter_random
from nanovllm_core.kernels import launch
from nanovllm_core.kernels.add_rms_norm import add_rms_norm
from nanovllm_core.kernels.filter_threshold import filter_thresholds
from nanovllm_core.kernels.launch import PrefillConfig
from nanovllm_core.kernels.linear_residual import linear_residual
from nanovllm_core.kernels.lm_head_sample import lm_head_sample
from nanovllm_core.kernels.paged_decode import paged_decode_attention
from nanovllm_core.kernels.paged_prefill import (
    list_tiles,
    paged_prefill_attention,
    tokens_per_tile,
)
from nanovllm_core.kernels.qk_norm_rope_cache import qk_norm_rope_cache
from nanovllm_core.kernels.qkv_decode import qkv_decode_attention
from nanovllm_core.kernels.rms_norm_linear import rms_norm_linear
from nanovllm_core.kernels.sampling import sample_tokens
from nanovllm_core.kernels.silu_and_mul import silu_and_mul
from nanovllm_core.kernels.silu_mul_linear import silu_mul_linear
from nanovllm_core.kernels.workspace import Workspace
from nanovllm_core.logit_filters import keep_threshold

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, LAYERS = 1024, 16, 8, 128, 3072, 151_936, 28
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM
EPS = 1e-6
SCALE = HEAD_DIM**-0.5


def bf16(*shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, device="cuda")).to(torch.bfloat16)


def linear_candidates(rows: int, columns_per_output: int = 1, split: bool = False) -> list[Any]:
    found: list[Any] = list(launch.GEMV_CANDIDATES) if rows <= launch.MAX_GEMV_ROWS else []
    if rows <= launch.MAX_RESIDENT_ROWS:
        found += launch.RESIDENT_CANDIDATES
    if rows > 1:
        found += launch.tile_candidates(rows, columns_per_output=columns_per_output, split=split)
    return found


def linear_bytes(rows: int, k_size: int, n_out: int, n_weight: int) -> int:
    return 2 * (n_weight * k_size + rows * (k_size + n_out))


def qkv_case(rows: int) -> Case:
    ones = torch.ones(HIDDEN, device="cuda", dtype=torch.bfloat16)
    return Case(
        kernel="qkv",
        shape=f"rows={rows} K={HIDDEN} N={QKV}",
        num_bytes=linear_bytes(rows, HIDDEN, QKV, QKV),
        flops=2 * rows * HIDDEN * QKV,
        operands=lambda: (bf16(rows, HIDDEN), bf16(QKV, HIDDEN, scale=HIDDEN**-0.5)),
        fused=lambda s, config: partial(rms_norm_linear, s[0], s[1], EPS, config=config),
        unfused=lambda s: lambda: F.linear(F.rms_norm(s[0], (HIDDEN,), ones, EPS), s[1]),
        candidates=linear_candidates(rows),
    )


def gate_up_case(rows: int) -> Case:
    ones = torch.ones(HIDDEN, device="cuda", dtype=torch.bfloat16)

    def unfused(s: Any) -> Launch:
        def run() -> Tensor:
            gate, up = F.linear(F.rms_norm(s[0], (HIDDEN,), ones, EPS), s[1]).chunk(2, dim=-1)
            return F.silu(gate) * up

        return run

    return Case(
        kernel="gate_up",
        shape=f"rows={rows} K={HIDDEN} N=2x{FFN}",
        num_bytes=linear_bytes(rows, HIDDEN, FFN, 2 * FFN),
        flops=4 * rows * HIDDEN * FFN,
        operands=lambda: (bf16(rows, HIDDEN), bf16(2 * FFN, HIDDEN, scale=HIDDEN**-0.5)),
        fused=lambda s, config: partial(silu_mul_linear, s[0], s[1], eps=EPS, config=config),
        unfused=unfused,
        candidates=linear_candidates(rows, columns_per_output=2),
    )


def residual_case(kernel: str, rows: int, k_size: int, workspace: Workspace) -> Case:
    def fused(s: Any, config: Any) -> Launch:
        def run() -> Tensor:
            linear_residual(s[0], s[1], s[2], workspace, config=config)
            return s[2]

        return run

    return Case(
        kernel=kernel,
        shape=f"rows={rows} K={k_size} N={HIDDEN}",
        num_bytes=linear_bytes(rows, k_size, 2 * HIDDEN, HIDDEN),
        flops=2 * rows * k_size * HIDDEN,
        operands=lambda: (
            bf16(rows, k_size),
            bf16(HIDDEN, k_size, scale=k_size**-0.5),
            bf16(rows, HIDDEN),
        ),
        fused=fused,
        unfused=lambda s: lambda: s[2].addmm_(s[0], s[1].T),
        candidates=linear_candidates(rows, split=True),
        compare=False,
    )


def add_norm_case(rows: int) -> Case:
    ones = torch.ones(HIDDEN, device="cuda", dtype=torch.bfloat16)
    return Case(
        kernel="add_rms_norm",
        shape=f"rows={rows} hidden={HIDDEN}",
        num_bytes=8 * rows * HIDDEN,
        operands=lambda: (bf16(rows, HIDDEN), bf16(rows, HIDDEN)),
        fused=lambda s, _: partial(add_rms_norm, s[0], s[1], ones, EPS),
        unfused=lambda s: lambda: F.rms_norm(s[1].add_(s[0]), (HIDDEN,), ones, EPS),
        compare=False,
    )


def silu_case(rows: int) -> Case:
    def unfused(gate_up: Tensor) -> Launch:
        return lambda: F.silu(gate_up[:, :FFN]) * gate_up[:, FFN:]

    return Case(
        kernel="silu_and_mul",
        shape=f"rows={rows} I={FFN}",
        num_bytes=6 * rows * FFN,
        operands=lambda: bf16(rows, 2 * FFN),
        fused=lambda s, _: partial(silu_and_mul, s),
        unfused=unfused,
    )


def qk_case(rows: int) -> Case:
    norm = torch.ones(HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    angles = torch.rand(4096, HEAD_DIM // 2, device="cuda")
    cos, sin = angles.cos(), angles.sin()
    positions = torch.randint(0, 4096, (rows,), device="cuda")

    def operands() -> Any:
        num_blocks = -(-2 * rows // 16)
        slots = torch.randperm(num_blocks * 16, device="cuda")[:rows]
        cache = [bf16(num_blocks, 16, KV_HEADS, HEAD_DIM) for _ in range(2)]
        return bf16(rows, QKV), slots, *cache

    def unfused(s: Any) -> Launch:
        qkv, slots, key_cache, value_cache = s

        def rotated(heads: Tensor) -> Tensor:
            low, high = F.rms_norm(heads, (HEAD_DIM,), norm, EPS).float().chunk(2, dim=-1)
            c, n = cos[positions][:, None], sin[positions][:, None]
            return torch.cat([low * c - high * n, high * c + low * n], dim=-1).to(heads.dtype)

        def run() -> Tensor:
            heads = qkv.view(rows, -1, HEAD_DIM)
            q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
            key_cache.flatten(0, 1)[slots] = rotated(k)
            value_cache.flatten(0, 1)[slots] = v
            return rotated(q)

        return run

    return Case(
        kernel="qk_norm_rope_cache",
        shape=f"tokens={rows}",
        num_bytes=rows * (4 * QKV + 4 * HEAD_DIM),
        operands=operands,
        fused=lambda s, _: (
            lambda: qk_norm_rope_cache(
                s[0], norm, norm, EPS, cos, sin, positions, s[1], s[2], s[3], HEADS
            )
        ),
        unfused=unfused,
    )


def paged_operands(seqs: int, context: int, page: int, queries: int) -> Any:
    pages = -(-context // page)
    cache = [bf16(seqs * pages, page, KV_HEADS, HEAD_DIM) for _ in range(2)]
    tables = torch.randperm(seqs * pages, device="cuda").to(torch.int32).view(seqs, pages)
    lens = torch.full((seqs,), context, dtype=torch.int32, device="cuda")
    return bf16(queries, HEADS, HEAD_DIM), *cache, tables, lens


def decode_case(seqs: int, context: int, page: int, workspace: Workspace) -> Case:
    def unfused(s: Any) -> Launch:
        from flash_attn import flash_attn_with_kvcache

        query, key, value, tables, lens = s
        return lambda: flash_attn_with_kvcache(
            query[:, None],
            key,
            value,
            cache_seqlens=lens,
            block_table=tables,
            softmax_scale=SCALE,
            causal=True,
        ).squeeze(1)

    # The flash-attn kernels page in multiples of 256 tokens.
    has_peer = page % 256 == 0 and importlib.util.find_spec("flash_attn") is not None
    return Case(
        kernel="paged_decode",
        shape=f"seqs={seqs} context={context} page={page}",
        num_bytes=4 * KV_HEADS * HEAD_DIM * seqs * context,
        flops=4 * HEADS * HEAD_DIM * seqs * context,
        operands=partial(paged_operands, seqs, context, page, seqs),
        fused=lambda s, config: (
            lambda: paged_decode_attention(
                s[0],
                s[1],
                s[2],
                s[3],
                s[4],
                SCALE,
                workspace,
                config=config,
            )
        ),
        unfused=unfused if has_peer else None,
        candidates=launch.PAGED_DECODE_CANDIDATES,
    )


def prefill_case(seqs: int, chunk: int, context: int, page: int) -> Case:
    starts = torch.arange(0, (seqs + 1) * chunk, chunk, dtype=torch.int32, device="cuda")
    key_starts = torch.arange(0, (seqs + 1) * context, context, dtype=torch.int32, device="cuda")

    def unfused(s: Any) -> Launch:
        from flash_attn import flash_attn_varlen_func

        query, key, value, tables, _ = s
        return lambda: flash_attn_varlen_func(
            query,
            key,
            value,
            starts,
            key_starts,
            chunk,
            context,
            softmax_scale=SCALE,
            causal=True,
            block_table=tables,
        )

    @cache
    def tiles(config: PrefillConfig) -> Tensor:
        listed = list_tiles(
            [chunk] * seqs, [context] * seqs, tokens_per_tile(HEADS, KV_HEADS, config)
        )
        return torch.from_numpy(listed).to("cuda")

    has_peer = page % 256 == 0 and importlib.util.find_spec("flash_attn") is not None
    visible = seqs * chunk * (context - chunk + (chunk + 1) / 2)
    return Case(
        kernel="paged_prefill",
        shape=f"seqs={seqs} chunk={chunk} context={context} page={page}",
        num_bytes=4 * KV_HEADS * HEAD_DIM * seqs * context + 4 * HEADS * HEAD_DIM * seqs * chunk,
        flops=int(4 * HEADS * HEAD_DIM * visible),
        operands=partial(paged_operands, seqs, context, page, seqs * chunk),
        fused=lambda s, config: (
            lambda: paged_prefill_attention(
                s[0],
                s[1],
                s[2],
                s[3],
                starts,
                s[4],
                tiles(config or launch.PAGED_PREFILL),
                SCALE,
                config=config or launch.PAGED_PREFILL,
            )
        ),
        unfused=unfused if has_peer else None,
        candidates=launch.PAGED_PREFILL_CANDIDATES,
    )


def row_keys(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    temperature = torch.full((rows,), 0.6, device="cuda")
    seeds = torch.arange(rows, device="cuda")
    return temperature, seeds, seeds + 100


def torch_draw(logits: Tensor, keys: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    noise = counter_random.exponential_noise(keys[1], keys[2], logits.shape[1])
    return (logits / keys[0][:, None] - noise.log_()).argmax(dim=-1)


def sample_case(rows: int) -> Case:
    keys = row_keys(rows)
    return Case(
        kernel="sample_tokens",
        shape=f"rows={rows} V={VOCAB}",
        num_bytes=4 * rows * VOCAB,
        operands=lambda: 3 * torch.randn(rows, VOCAB, device="cuda"),
        fused=lambda s, _: partial(sample_tokens, s, *keys),
        unfused=lambda s: partial(torch_draw, s, keys),
    )


def filter_case(rows: int, top_k: int) -> Case:
    temperature = row_keys(rows)[0]
    k = torch.full((rows,), top_k, dtype=torch.int32, device="cuda")
    p = torch.full((rows,), 0.95, device="cuda")
    m = torch.zeros(rows, device="cuda")

    def unfused(s: Tensor) -> Launch:
        def run() -> Tensor:
            best = s.amax(dim=-1, keepdim=True)
            scaled = (s - best) / temperature[:, None]
            found = keep_threshold(scaled, k, p, m, max_top_k=top_k)
            return found * temperature + best.squeeze(1)

        return run

    return Case(
        kernel="filter_thresholds",
        shape=f"rows={rows} V={VOCAB} top_k={top_k} top_p=0.95",
        num_bytes=4 * rows * VOCAB,
        operands=lambda: 3 * torch.randn(rows, VOCAB, device="cuda"),
        fused=lambda s, _: partial(filter_thresholds, s, temperature, k, p, m, max_top_k=top_k),
        unfused=unfused,
    )


def lm_head_case(rows: int) -> Case:
    keys = row_keys(rows)
    ones = torch.ones(HIDDEN, device="cuda", dtype=torch.bfloat16)

    def unfused(s: Any) -> Launch:
        return lambda: torch_draw(
            F.linear(F.rms_norm(s[0], (HIDDEN,), ones, EPS), s[1]).float(), keys
        )

    return Case(
        kernel="lm_head_sample",
        shape=f"rows={rows} V={VOCAB} K={HIDDEN}",
        num_bytes=2 * VOCAB * HIDDEN,
        flops=2 * rows * VOCAB * HIDDEN,
        operands=lambda: (bf16(rows, HIDDEN), bf16(VOCAB, HIDDEN, scale=0.1)),
        fused=lambda s, config: (
            lambda: lm_head_sample(s[0], s[1], *keys, norm_weight=ones, eps=EPS, config=config)
        ),
        unfused=unfused,
        candidates=launch.LM_HEAD_CANDIDATES,
        compare=False,
    )


def layers_case(rows: int, context: int, workspace: Workspace, dependent: bool) -> Case:
    """All decoder layers of one decode step, as for few rows; bytes of weights and cache."""
    page = 64
    pages = -(-context // page)
    norm = torch.ones(HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    angles = torch.rand(4096, HEAD_DIM // 2, device="cuda")
    cos, sin = angles.cos(), angles.sin()
    positions = torch.full((rows,), context - 1, device="cuda")
    tables = torch.randperm(rows * pages, device="cuda").to(torch.int32).view(rows, pages)
    slots = tables[:, -1].long() * page + (context - 1) % page
    lens = torch.full((rows,), context, dtype=torch.int32, device="cuda")

    def operands() -> Any:
        return bf16(rows, HIDDEN), [
            (
                bf16(QKV, HIDDEN, scale=HIDDEN**-0.5),
                bf16(HIDDEN, HEADS * HEAD_DIM, scale=0.01),
                bf16(2 * FFN, HIDDEN, scale=HIDDEN**-0.5),
                bf16(HIDDEN, FFN, scale=0.01),
                bf16(rows * pages, page, KV_HEADS, HEAD_DIM),
                bf16(rows * pages, page, KV_HEADS, HEAD_DIM),
            )
            for _ in range(LAYERS)
        ]

    def fused(s: Any, _: Any) -> Launch:
        hidden, layers = s

        def run() -> Tensor:
            for index, (w_qkv, w_o, w_gate_up, w_down, key, value) in enumerate(layers):
                qkv = rms_norm_linear(
                    hidden, w_qkv, EPS, dependent=dependent, starts_chain=index == 0
                )
                attended = qkv_decode_attention(
                    qkv,
                    norm,
                    norm,
                    EPS,
                    cos,
                    sin,
                    positions,
                    slots,
                    key,
                    value,
                    tables,
                    lens,
                    HEADS,
                    SCALE,
                    workspace,
                    dependent=dependent,
                )
                linear_residual(
                    attended.view(rows, -1), w_o, hidden, workspace, dependent=dependent
                )
                activated = silu_mul_linear(hidden, w_gate_up, eps=EPS, dependent=dependent)
                linear_residual(activated, w_down, hidden, workspace, dependent=dependent)
            return hidden

        return run

    weights = QKV * HIDDEN + HIDDEN * HEADS * HEAD_DIM + 3 * FFN * HIDDEN
    cache = 2 * KV_HEADS * HEAD_DIM * rows * context
    return Case(
        kernel="layers",
        shape=f"rows={rows} context={context} {'dependent' if dependent else 'ordinary'}",
        num_bytes=2 * LAYERS * (weights + cache),
        operands=operands,
        fused=fused,
        compare=False,
    )


def all_cases(rows_list: Sequence[int], workspace: Workspace) -> Iterator[Callable[[], Case]]:
    for rows in rows_list:
        yield partial(qkv_case, rows)
        yield partial(gate_up_case, rows)
        yield partial(residual_case, "o_residual", rows, HEADS * HEAD_DIM, workspace)
        yield partial(residual_case, "down_residual", rows, FFN, workspace)
        yield partial(add_norm_case, rows)
        yield partial(silu_case, rows)
        yield partial(qk_case, rows)
        if rows <= 256:
            yield partial(sample_case, rows)
            yield partial(filter_case, rows, 20)
            yield partial(filter_case, rows, 0)
        if rows <= launch.MAX_LM_HEAD_ROWS:
            yield partial(lm_head_case, rows)
    for seqs, context in ((1, 512), (8, 1024), (64, 1024), (256, 840), (256, 2048)):
        for page in (16, 64, 256):
            yield partial(decode_case, seqs, context, page, workspace)
    for seqs, chunk, context in ((16, 1024, 1024), (4, 512, 2048)):
        for page in (64, 256):
            yield partial(prefill_case, seqs, chunk, context, page)
    for rows in (1, 8, 64):
        for dependent in (False, True):
            yield partial(layers_case, rows, 512, workspace, dependent)
