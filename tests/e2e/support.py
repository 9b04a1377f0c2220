"""What the end-to-end tests share: services, waiting, references and metrics pages."""

import random
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor

from nanovllm import Client, Health, LocalServices, SamplingParams, ServerStatus

#: Limit for anything that ought to happen soon, generous because CI machines stall.
LIMIT_S = 30.0
#: Rows of the tiny checkpoints' output matrix.
VOCAB_SIZE = 320
#: Their length; a request that nobody ends runs for many seconds.
MAX_MODEL_LEN = 4096
#: Slots of the services that most tests share.
MAX_NUM_SEQS = 8
CPU = ("--device", "cpu", "--dtype", "float32")


def wait_until(
    condition: Callable[[], bool], what: str, limit_s: float = LIMIT_S, poll_s: float = 0.005
) -> None:
    """Polls an observable state; fails the test if it does not come within `limit_s`."""
    deadline_s = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline_s:
            pytest.fail(f"not within {limit_s:g} s: {what}")
        time.sleep(poll_s)


def wait_until_serving(client: Client) -> None:
    """Waits for the scheduler's connection to its executor."""
    wait_until(lambda: client.health() is Health.SERVING, "the scheduler reports SERVING")


def wait_until_idle(client: Client, limit_s: float = LIMIT_S) -> None:
    """Waits until no request owns anything."""
    wait_until(lambda: owns_nothing(client.server_status()), "all blocks are free again", limit_s)


def owns_nothing(status: ServerStatus) -> bool:
    """Whether there are neither running nor waiting sequences and every block is free or cached."""
    unowned = status.num_free_kv_blocks + status.num_cached_kv_blocks
    return (
        status.num_running == status.num_waiting == 0
        and status.executor_connected
        and unowned == status.num_kv_blocks
    )


@contextmanager
def running_services(
    model: Path | str,
    log_dir: Path,
    *,
    executor: Sequence[str] = (),
    scheduler: Sequence[str] = (),
    metrics: bool = False,
) -> Iterator[LocalServices]:
    """Both services for a model, connected to each other; float32 unless `executor` differs.

    Fails the test if either of them logs a traceback, whatever clients saw of it.
    """
    services = LocalServices(
        str(model),
        executor_args=[*CPU, *executor],
        # These tests fill the queue on purpose; that it is bounded by time has tests of its own.
        scheduler_args=scheduler,
        metrics=metrics,
        log_dir=log_dir,
        startup_timeout_s=120.0,
    )
    with services, Client(services.address) as client:
        wait_until_serving(client)
        yield services
    for log in log_dir.glob("*.log"):
        assert "Traceback" not in (text := log.read_text()), text


def random_prompt(length: int, seed: int = 0) -> list[int]:
    """Token ids that depend on nothing but the arguments."""
    return random.Random(seed).choices(range(VOCAB_SIZE), k=length)


def greedy(max_tokens: int, **fields: Any) -> SamplingParams:
    """Greedy parameters that run for exactly `max_tokens`."""
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **fields)


@dataclass(frozen=True, slots=True)
class Reference:
    """The same checkpoint in transformers."""

    model: Any

    @torch.inference_mode()
    def greedy(self, prompt: list[int], max_tokens: int) -> list[int]:
        """Greedy tokens; refuses prompts whose path hangs on the last bits of float32."""
        inputs = torch.tensor([prompt])
        output = self.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.cat(output.logits).float().topk(2, dim=-1).values
        margin = (best[:, 0] - best[:, 1]).min().item()
        if margin < 1e-4:
            pytest.fail(f"choose another prompt: its closest choice differs by {margin:.1e}")
        tokens: list[int] = output.sequences[0, len(prompt) :].tolist()
        return tokens

    @torch.inference_mode()
    def logprobs(self, token_ids: list[int]) -> Tensor:
        """Log-probabilities after every token, [num_tokens, vocab_size] float32."""
        logits: Tensor = self.model(torch.tensor([token_ids])).logits[0]
        return logits.float().log_softmax(-1)


@dataclass(frozen=True, slots=True)
class CallError:
    """How a raw gRPC call ended."""

    code: grpc.StatusCode
    message: str
    bad_fields: tuple[str, ...]
    retry_after_s: float | None

    @classmethod
    def of(cls, error: grpc.RpcError) -> "CallError":
        """Reads the code and the google.rpc details of the standard trailer."""
        if not isinstance(error, grpc.Call):
            raise TypeError(f"{error!r} did not come from a call")
        fields: list[str] = []
        retry_after_s = None
        status = rpc_status.from_call(error)
        for packed in status.details if status is not None else ():
            bad_request = error_details_pb2.BadRequest()
            retry = error_details_pb2.RetryInfo()
            if packed.Unpack(bad_request):
                fields += [violation.field for violation in bad_request.field_violations]
            elif packed.Unpack(retry):
                retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
        return cls(error.code(), error.details() or "", tuple(fields), retry_after_s)


def metrics_page(url: str | None) -> str:
    """The text of a metrics page."""
    if url is None:
        raise ValueError("the service was started without metrics")
    # Loopback is never reached through a proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=LIMIT_S) as response:
        text: str = response.read().decode()
    return text


class Metrics:
    """One reading of a metrics page."""

    def __init__(self, url: str | None) -> None:
        self._samples = [
            sample
            for family in text_string_to_metric_families(metrics_page(url))
            for sample in family.samples
        ]

    def __contains__(self, name: str) -> bool:
        return any(sample.name == f"nanovllm_{name}" for sample in self._samples)

    def __getitem__(self, name: str) -> float:
        """The sum over all label values; 0 if the sample is absent."""
        return self.value(name)

    def by(self, name: str, label: str) -> dict[str, float]:
        """The values by those of a label; meant for a metric with no other label that varies."""
        return {
            sample.labels[label]: sample.value
            for sample in self._samples
            if sample.name == f"nanovllm_{name}"
        }

    def value(self, name: str, **labels: str) -> float:
        """The sum over all samples with these labels."""
        return sum(
            sample.value
            for sample in self._samples
            if sample.name == f"nanovllm_{name}" and labels.items() <= sample.labels.items()
        )
