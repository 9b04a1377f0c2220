"""From settings to a loaded model with its cache: everything that happens before `ready`."""

import importlib.util
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from executor_service.batch_state import BatchState
from executor_service.model_runner import Model, ModelRunner
from executor_service.plan_reader import ExecutorLimits
from executor_service.runner import Runner
from executor_service.settings import ExecutorSettings
from nanovllm.service_settings import StartupError
from nanovllm_core.attention import AttentionBackend, BackendError, create_backend
from nanovllm_core.batch import ForwardBatch
from nanovllm_core.checkpoint import CheckpointError
from nanovllm_core.config import ModelConfig, ModelConfigError
from nanovllm_core.kv_cache import KVCache
from nanovllm_core.loader import load_model
from nanovllm_core.model import CausalLM

logger = logging.getLogger(__name__)

_CPU_BLOCK_SIZE = 16
# On a CPU an iteration of this many tokens stays below about a second for small models.
_CPU_BATCHED_TOKENS = 512
_GPU_BATCHED_TOKENS = 8192
# Without a GPU nothing says how much memory is ours; this holds 46,600 tokens of SmolLM2-135M in
# bfloat16. Pages are only taken once they are used.
_CPU_KV_BYTES = 2**30


# Room for what the decode graphs allocate: the logits of the largest batch, mostly.
_DECODE_GRAPH_BYTES = 2**30
# Prefix hits are whole blocks; larger ones would make them coarse.
_GPU_BLOCK_SIZE = 64


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """What the model and its cache take of a GPU, in bytes."""

    device: torch.device
    weight_bytes: int
    kv_cache_bytes: int

    def reserved_bytes(self) -> int:
        """What PyTorch has reserved in all; from any thread."""
        return torch.cuda.memory_reserved(self.device)


@dataclass(frozen=True, slots=True)
class Engine:
    """A model that is ready to run."""

    runner: Runner
    state: BatchState
    limits: ExecutorLimits
    device_name: str
    dtype_name: str
    attention_backend: str
    model_load_s: float
    # None on a CPU.
    gpu_memory: GpuMemory | None


def create_engine(directory: Path, settings: ExecutorSettings) -> Engine:
    """Loads the model and allocates the cache. Raises StartupError."""
    try:
        # OpenMP keeps helper threads for every thread that ever ran a parallel region, until that
        # thread ends. Once they are more than the cores, libgomp's helpers sleep between regions
        # instead of spinning, and the worker pays a wake-up in every region: a decode step of
        # SmolLM2-135M in bfloat16 took 45 ms instead of 26 on 2 cores. So a thread of its own loads
        # the model, and takes its helpers with it.
        with ThreadPoolExecutor(1, thread_name_prefix="load") as loader:
            return loader.submit(_create_engine, directory, settings).result()
    except (ModelConfigError, CheckpointError) as error:
        raise StartupError(f"--model {settings.model}: {error}") from error
    except BackendError as error:
        raise StartupError(f"--attention-backend: {error}") from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise StartupError(
            f"model and KV cache do not fit into memory ({str(error).splitlines()[0]}); lower "
            "--num-kv-blocks, --max-num-seqs or --kv-memory-fraction"
        ) from error


def _create_engine(directory: Path, settings: ExecutorSettings) -> Engine:
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    config = ModelConfig.from_directory(directory)
    device = _choose_device(settings.device)
    dtype = _choose_dtype(settings.dtype, config)
    max_model_len = settings.max_model_len or config.max_position_embeddings
    if max_model_len > config.max_position_embeddings:
        raise StartupError(
            f"--max-model-len {max_model_len} exceeds the model's {config.max_position_embeddings}"
        )
    default_batched = _GPU_BATCHED_TOKENS if device.type == "cuda" else _CPU_BATCHED_TOKENS
    max_num_batched_tokens = settings.max_num_batched_tokens or max(
        default_batched, 2 * settings.max_num_seqs
    )
    if max_num_batched_tokens <= settings.max_num_seqs:
        raise StartupError(
            f"--max-num-batched-tokens {max_num_batched_tokens} must exceed --max-num-seqs "
            f"{settings.max_num_seqs}, or prefill would never get a turn"
        )
    attention = create_backend(_choose_backend(settings, device, dtype), config, device)
    block_size = settings.block_size or (
        _GPU_BLOCK_SIZE if device.type == "cuda" else _CPU_BLOCK_SIZE
    )
    if attention.name != "torch" and (block_size < 16 or block_size & (block_size - 1)):
        raise StartupError(f"--block-size {block_size}: a GPU needs a power of two from 16")
    load_start_s = time.monotonic()
    loaded = _load_with_progress(directory, config, dtype, device)
    model_load_s = time.monotonic() - load_start_s
    model = loaded if attention.name == "torch" else _fuse(loaded)
    weight_bytes = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    graph_bytes = 0
    if device.type == "cuda":
        activation_bytes = _warm_up(
            model, attention, config, max_num_batched_tokens, block_size, dtype, device
        )
        if not settings.enforce_eager:
            # The prefill graphs have memory of their own, as much as the warm-up's activations.
            graph_bytes = activation_bytes + _DECODE_GRAPH_BYTES
    num_blocks = settings.num_kv_blocks or _fit_blocks(
        config, block_size, dtype, device, settings, max_model_len, graph_bytes
    )
    limits = ExecutorLimits(
        vocab_size=config.vocab_size,
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
    )
    cache = KVCache(config, num_blocks, block_size, dtype, device)
    state = BatchState(limits, device)
    return Engine(
        runner=_create_runner(model, cache, attention, state, settings),
        state=state,
        limits=limits,
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        dtype_name=str(dtype).removeprefix("torch."),
        attention_backend=attention.name,
        model_load_s=model_load_s,
        gpu_memory=GpuMemory(device, weight_bytes, cache.key.nbytes + cache.value.nbytes)
        if device.type == "cuda"
        else None,
    )


def _choose_device(name: str) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise StartupError("--device cuda: PyTorch finds no CUDA device; use --device cpu")
    return torch.device("cuda" if name != "cpu" and has_cuda else "cpu")


def _choose_dtype(name: str, config: ModelConfig) -> torch.dtype:
    name = config.torch_dtype if name == "auto" else name
    dtype = getattr(torch, name, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise StartupError(f"--dtype {name}: use float32, bfloat16 or float16")
    return dtype


def _choose_backend(settings: ExecutorSettings, device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cuda":
        if settings.attention_backend not in ("auto", "torch"):
            raise StartupError(
                f"--attention-backend {settings.attention_backend} needs a GPU; a CPU runs torch"
            )
        return "torch"
    if settings.attention_backend != "auto":
        return settings.attention_backend
    has_flash_attn = importlib.util.find_spec("flash_attn") is not None
    return "flash_attn" if has_flash_attn and dtype != torch.float32 else "triton"


def _fuse(model: CausalLM) -> Model:
    # Imports triton, which a CPU installation need not have.
    from nanovllm_core.fused_model import FusedModel

    return FusedModel(model)


def _create_runner(
    model: Model,
    cache: KVCache,
    attention: AttentionBackend,
    state: BatchState,
    settings: ExecutorSettings,
) -> Runner:
    if state.device.type != "cuda" or attention.name == "torch":
        return ModelRunner(model, cache, attention, state)
    from executor_service.cuda_runner import CudaRunner
    from nanovllm_core.fused_model import FusedModel

    if not isinstance(model, FusedModel):
        raise TypeError(f"a GPU runs a FusedModel, not a {type(model).__name__}")
    return CudaRunner(model, cache, attention, state, use_graphs=not settings.enforce_eager)


@torch.inference_mode()
def _warm_up(
    model: Model,
    attention: AttentionBackend,
    config: ModelConfig,
    num_tokens: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Runs the largest prefill once: compiles kernels, and leaves its peak memory in the allocator.

    What is free afterwards can go to graphs and the KV cache. Returns the bytes that activations of
    `num_tokens` take at their peak.
    """
    chunk = min(num_tokens, config.max_position_embeddings)
    num_blocks = -(-chunk // block_size)
    cache = KVCache(config, num_blocks, block_size, dtype, device)
    torch.cuda.reset_peak_memory_stats(device)
    held_bytes = torch.cuda.memory_allocated(device)
    positions = torch.arange(chunk, device=device)
    batch = ForwardBatch(
        token_ids=torch.zeros_like(positions),
        positions=positions,
        slot_mapping=positions,
        block_tables=torch.arange(num_blocks, dtype=torch.int32, device=device)[None],
        context_lens=torch.tensor([chunk], dtype=torch.int32, device=device),
        prefill_lens=[chunk],
        prefill_context_lens=[chunk],
        max_decode_context_len=0,
        logits_rows=positions[-1:],
    )
    model.logits(model(batch, cache, attention)[batch.logits_rows])
    torch.cuda.synchronize(device)
    # Sequences may be shorter than what one iteration takes.
    return (torch.cuda.max_memory_allocated(device) - held_bytes) * num_tokens // chunk


def _load_with_progress(
    directory: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> CausalLM:
    with tqdm(desc=f"loading {directory.name}", unit="B", unit_scale=True, disable=None) as bar:

        def show(done_bytes: int, total_bytes: int) -> None:
            bar.total = total_bytes
            bar.update(done_bytes - bar.n)

        return load_model(directory, config, dtype, device, on_progress=show)


def _fit_blocks(
    config: ModelConfig,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    settings: ExecutorSettings,
    max_model_len: int,
    graph_bytes: int,
) -> int:
    """Number of KV blocks that fit into memory, at most what all slots can use."""
    block_bytes = KVCache.bytes_per_block(config, block_size, dtype)
    blocks_per_seq = -(-max_model_len // block_size)
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        budget = free_bytes - int(total_bytes * (1 - settings.kv_memory_fraction)) - graph_bytes
        remedy = "lower --max-model-len, raise --kv-memory-fraction, or set --num-kv-blocks"
    else:
        # Pages that are never written cost nothing, so one long sequence may have its room.
        half_of_memory = _memory_bytes() // 2
        one_sequence = (blocks_per_seq + 1) * block_bytes
        budget = min(max(_CPU_KV_BYTES, one_sequence), half_of_memory)
        remedy = "lower --max-model-len or set --num-kv-blocks"
    # One block stays free: the cache has a further one that padding writes to.
    num_blocks = min(budget // block_bytes - 1, settings.max_num_seqs * blocks_per_seq)
    if num_blocks < blocks_per_seq:
        raise StartupError(
            f"the KV cache gets {max(budget, 0) / 2**30:.2f} GiB, which holds no sequence of "
            f"{max_model_len} tokens ({blocks_per_seq * block_bytes / 2**30:.2f} GiB); {remedy}"
        )
    return num_blocks


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
