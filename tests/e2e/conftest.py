"""Fixtures for tests over both real processes."""

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from nanovllm import Client, LocalServices
from tests.checkpoints import CHAT_TEMPLATE, make_checkpoint
from tests.e2e.support import (
    MAX_MODEL_LEN,
    MAX_NUM_SEQS,
    Reference,
    running_services,
    wait_until_idle,
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of the tiny random checkpoint of an architecture."""

    @cache
    def make(architecture: str) -> Path:
        directory = tmp_path_factory.mktemp("models") / f"tiny-{architecture}"
        make_checkpoint(directory, architecture, max_position_embeddings=MAX_MODEL_LEN)
        path = directory / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        # A variable that only template_kwargs_json can set.
        settings["chat_template"] = "{{ note }}" + CHAT_TEMPLATE
        path.write_text(json.dumps(settings))
        return directory

    return make


@pytest.fixture(scope="session")
def reference(checkpoint: Callable[[str], Path]) -> Callable[[str], Reference]:
    """The checkpoint of an architecture in transformers."""

    @cache
    def load(architecture: str) -> Reference:
        return Reference(AutoModelForCausalLM.from_pretrained(checkpoint(architecture)).eval())

    return load


@pytest.fixture(scope="session")
def services(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalServices]:
    """Both services for the tiny Qwen3, for every test that leaves them as they are."""
    with running_services(
        checkpoint("qwen3"),
        tmp_path_factory.mktemp("logs"),
        executor=[
            *("--max-num-seqs", str(MAX_NUM_SEQS), "--max-num-batched-tokens", "64"),
            *("--num-kv-blocks", "2048", "--block-size", "16"),
        ],
        scheduler=["--metrics-compat", "vllm"],
        metrics=True,
    ) as running:
        yield running


@pytest.fixture(scope="session")
def shared_client(services: LocalServices) -> Iterator[Client]:
    """One connection for all tests."""
    with Client(services.address) as connected:
        yield connected


@pytest.fixture
def client(shared_client: Client) -> Iterator[Client]:
    """A client of the shared services, which are idle before the test and must be after it."""
    wait_until_idle(shared_client)
    yield shared_client
    wait_until_idle(shared_client)
