"""Settings of the executor process: command line, then NANOVLLM_EXECUTOR_*, then defaults."""

from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from nanovllm.service_settings import Address, ServiceSettings


class ExecutorSettings(ServiceSettings):
    """A gRPC executor that runs one model for one scheduler."""

    model_config = SettingsConfigDict(
        env_prefix="NANOVLLM_EXECUTOR_", cli_prog_name="executor_service"
    )

    listen: Address = Field("127.0.0.1:50052", description="Address to serve on; port 0 picks one.")
    metrics_port: int = Field(
        9402, ge=-1, le=65535, description="Port of /metrics; 0 picks one, -1 turns it off."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where to run; auto takes a GPU if there is one."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of weights and KV cache; auto takes the checkpoint's."
    )
    attention_backend: Literal["auto", "flash_attn", "flash_attn_3", "triton", "torch"] = Field(
        "auto", description="Attention implementation."
    )
    block_size: int | None = Field(
        None, ge=1, le=1024, description="Tokens per KV block; default: the backend's choice."
    )
    num_kv_blocks: int | None = Field(
        None,
        ge=1,
        description="KV blocks; default: on a GPU as many as kv_memory_fraction allows, on a CPU "
        "1 GiB of them.",
    )
    kv_memory_fraction: float = Field(
        0.9, gt=0, le=1, description="Share of a GPU's memory for weights and KV cache together."
    )
    max_num_seqs: int = Field(256, ge=1, le=8192, description="Most sequences in one batch.")
    max_num_batched_tokens: int | None = Field(
        None,
        ge=1,
        description="Most tokens in one iteration; default: 8192 on a GPU, 512 on a CPU.",
    )
    max_model_len: int | None = Field(
        None, ge=2, description="Longest sequence in tokens; default: the model's."
    )
    enforce_eager: bool = Field(False, description="Do not use CUDA graphs.")
    num_threads: int | None = Field(
        None, ge=1, description="CPU threads of the model; default: PyTorch's choice."
    )
