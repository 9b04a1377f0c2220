"""Two real replicas of a tiny model behind the real smg."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from openai import AsyncOpenAI, OpenAI
from safetensors.torch import load_file, save_file

from examples.smg import SmgGateway
from nanovllm import Client, LocalServices
from tests.checkpoints import make_checkpoint
from tests.e2e.support import CPU, wait_until_serving

MODEL = "tiny-ascii"
MAX_MODEL_LEN = 4096
BLOCK_SIZE = 16
# "!" to "~" in the order of the tiny tokenizer, which has one token per byte.
_NUM_ASCII_TOKENS = 94


def make_ascii_checkpoint(directory: Path) -> Path:
    """A tiny checkpoint whose greedy output is printable, so that text is comparable."""
    make_checkpoint(directory, tied=False, max_position_embeddings=MAX_MODEL_LEN)
    path = directory / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"][_NUM_ASCII_TOKENS:] = 0
    save_file(weights, path, metadata={"format": "pt"})
    return directory


@dataclass(frozen=True, slots=True)
class Stack:
    """Everything that runs."""

    replicas: Sequence[LocalServices]
    gateway: SmgGateway
    log_path: Path

    def openai(self) -> OpenAI:
        """A client without retries of its own: what fails shall show."""
        return OpenAI(base_url=self.gateway.base_url, api_key="none", max_retries=0, timeout=60)

    def async_openai(self) -> AsyncOpenAI:
        """The same for many requests at a time."""
        return AsyncOpenAI(
            base_url=self.gateway.base_url, api_key="none", max_retries=0, timeout=60
        )


def skip_without_smg() -> None:
    """Skips the test where the gateway is not installed."""
    if find_spec("smg") is None:
        pytest.skip("smg is not installed; it comes with the extra dev")


@contextmanager
def running_replicas(
    model: Path, log_dir: Path, *, count: int = 2, scheduler: Sequence[str] = ()
) -> Iterator[Stack]:
    """Starts replicas and the gateway; stops them."""
    skip_without_smg()
    log_path = log_dir / "smg.log"
    with ExitStack() as stack:
        replicas = [
            LocalServices(
                str(model),
                executor_args=[
                    *CPU,
                    *("--block-size", str(BLOCK_SIZE), "--num-kv-blocks", "4096"),
                    *("--max-num-seqs", "32"),
                ],
                scheduler_args=scheduler,
                listen="tcp",
                metrics=True,
                env={"OMP_NUM_THREADS": "1"},
                log_dir=log_dir / f"replica-{index}",
                startup_timeout_s=120.0,
                stop_grace_s=5.0,
            )
            for index in range(count)
        ]
        for replica in replicas:
            stack.enter_context(replica)
            with Client(replica.address) as client:
                wait_until_serving(client)
        addresses = [replica.address for replica in replicas]
        gateway = SmgGateway(addresses, log_path=log_path, startup_timeout_s=120.0)
        stack.enter_context(gateway)
        yield Stack(replicas, gateway, log_path)
