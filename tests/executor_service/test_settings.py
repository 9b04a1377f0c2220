"""Command line and environment of the executor."""

import pytest

from executor_service.settings import ExecutorSettings
from nanovllm.service_settings import StartupError


def test_arguments_outrank_the_environment_and_that_outranks_defaults(monkeypatch):
    monkeypatch.setenv("NANOVLLM_EXECUTOR_MAX_NUM_SEQS", "7")
    monkeypatch.setenv("NANOVLLM_EXECUTOR_DTYPE", "float16")
    settings = ExecutorSettings.from_arguments(["--dtype", "float32", "--enforce-eager"])
    assert (settings.max_num_seqs, settings.dtype, settings.enforce_eager) == (7, "float32", True)
    assert settings.listen == "127.0.0.1:50052"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--max-num-seqs", "0"], "--max-num-seqs"),
        (["--dtype", "int8"], "--dtype"),
        (["--kv-memory-fraction", "1.5"], "--kv-memory-fraction"),
        (["--block-size", "many"], "--block-size"),
        (["--metrics-port", "65536"], "--metrics-port"),
    ],
)
def test_a_bad_value_is_refused_with_its_option(arguments: list[str], named: str):
    with pytest.raises(StartupError, match=named) as caught:
        ExecutorSettings.from_arguments(arguments)
    assert arguments[1] in str(caught.value)


def test_an_unknown_option_is_refused():
    with pytest.raises(StartupError, match="no-such-option"):
        ExecutorSettings.from_arguments(["--no-such-option", "1"])
