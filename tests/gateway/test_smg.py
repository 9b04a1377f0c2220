"""The real gateway and OpenAI's own client, in front of two real replicas."""

import asyncio
from collections.abc import Iterator

import pytest
from openai import BadRequestError, OpenAI

from benchmarks.gateway_soak import parse, soak
from nanovllm import Client, SamplingParams
from tests.e2e.support import Metrics, greedy, wait_until, wait_until_idle
from tests.gateway.replicas import MODEL, Stack, make_ascii_checkpoint, running_replicas

pytestmark = pytest.mark.slow

MESSAGES = [{"role": "user", "content": "Name three rivers in France."}]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two replicas for every test that leaves them as they are."""
    checkpoint = make_ascii_checkpoint(tmp_path_factory.mktemp("models") / MODEL)
    with running_replicas(checkpoint, tmp_path_factory.mktemp("logs")) as running:
        yield running


@pytest.fixture(scope="module")
def openai(stack: Stack) -> Iterator[OpenAI]:
    with stack.openai() as client:
        yield client


@pytest.fixture(scope="module")
def scheduler(stack: Stack) -> Iterator[Client]:
    """A client of one replica, past the gateway."""
    with Client(stack.replicas[0].address) as client:
        yield client


def test_a_conversation_gets_the_text_that_the_scheduler_gives(
    openai: OpenAI, scheduler: Client
) -> None:
    (expected,) = scheduler.generate(
        MESSAGES, SamplingParams(temperature=0, max_tokens=40)
    ).completions
    whole = openai.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=40, temperature=0
    )
    assert whole.choices[0].message.content == expected.text
    assert whole.choices[0].finish_reason == expected.finish_reason
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == expected.usage.prompt_tokens
    assert whole.usage.completion_tokens == expected.usage.completion_tokens
    stream = openai.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=40, temperature=0, stream=True
    )
    parts = [event.choices[0].delta.content or "" for event in stream if event.choices]
    assert "".join(parts) == expected.text
    assert len(parts) > 2


def test_a_completion_gets_the_text_that_the_scheduler_gives(
    openai: OpenAI, scheduler: Client
) -> None:
    expected = scheduler.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=40))
    fields = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 40, "temperature": 0}
    whole = openai.completions.create(**fields)
    assert whole.choices[0].text == expected.text
    stream = openai.completions.create(**fields, stream=True)
    assert "".join(event.choices[0].text for event in stream if event.choices) == expected.text


@pytest.mark.parametrize("stream", [False, True])
def test_each_of_several_completions_has_its_own_text(openai: OpenAI, stream: bool) -> None:
    fields = {"model": MODEL, "messages": MESSAGES, "max_tokens": 20, "seed": 7, "n": 2}
    texts: dict[int, str] = {0: "", 1: ""}
    if stream:
        for event in openai.chat.completions.create(**fields, stream=True):
            for choice in event.choices:
                texts[choice.index] += choice.delta.content or ""
    else:
        for choice in openai.chat.completions.create(**fields).choices:
            texts[choice.index] = choice.message.content or ""
    assert all(texts.values())
    assert texts[0] != texts[1]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_request_at_the_scheduler_too(
    stack: Stack, openai: OpenAI, scheduler: Client, stream: bool
) -> None:
    text = scheduler.generate("Once upon a time", greedy(60)).text
    stop = text[20:23]
    before = text[: text.index(stop)]
    num_tokens = _generated_tokens(stack)
    fields = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 2000, "temperature": 0}
    if stream:
        events = openai.completions.create(**fields, stop=[stop], stream=True)
        parts = [event.choices[0].text for event in events if event.choices]
        assert "".join(parts) == before
    else:
        choice = openai.completions.create(**fields, stop=[stop]).choices[0]
        assert (choice.text, choice.finish_reason) == (before, "stop")
    # One iteration may be under way when the match is found.
    wait_until(lambda: _running(stack) == 0, "the request is over")
    assert _generated_tokens(stack) - num_tokens < 40


def test_log_probabilities_are_those_of_the_scheduler(openai: OpenAI, scheduler: Client) -> None:
    (expected,) = scheduler.generate(
        MESSAGES, SamplingParams(temperature=0, max_tokens=5, logprobs=2)
    ).completions
    assert expected.logprobs is not None
    choice = openai.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=5, temperature=0, logprobs=True, top_logprobs=2
    ).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert [token.logprob for token in choice.logprobs.content] == pytest.approx(
        [token.logprob for token in expected.logprobs], abs=1e-4
    )
    assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)


def test_what_is_not_supported_is_refused_by_name(openai: OpenAI) -> None:
    with pytest.raises(BadRequestError, match=r"sampling_params\.json_schema"):
        openai.chat.completions.create(
            model=MODEL, messages=MESSAGES, response_format={"type": "json_object"}
        )


def test_a_limit_beyond_the_context_is_clamped(openai: OpenAI) -> None:
    answer = openai.completions.create(
        model=MODEL, prompt="x" * 4090, max_tokens=100_000, temperature=0
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 4096


def test_a_client_that_leaves_ends_its_request(stack: Stack, openai: OpenAI) -> None:
    stream = openai.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=4000, temperature=0, stream=True
    )
    next(iter(stream))
    assert _running(stack) == 1
    stream.close()
    for replica in stack.replicas:
        with Client(replica.address) as client:
            wait_until_idle(client)
    aborted = sum(
        Metrics(replica.scheduler.metrics_url).value("requests_total", finished_reason="abort")
        for replica in stack.replicas
    )
    assert aborted == 1


def test_requests_with_a_common_prefix_go_to_one_replica(stack: Stack, openai: OpenAI) -> None:
    served = _served(stack)

    def both_served() -> bool:
        return all(now > before for now, before in zip(_served(stack), served, strict=True))

    for group in range(40):
        prefix = chr(65 + group) * 200
        cached = []
        for number in range(4):
            usage = openai.completions.create(
                model=MODEL, prompt=f"{prefix} {number}", max_tokens=2, temperature=0
            ).usage
            assert usage is not None
            assert usage.prompt_tokens_details is not None
            cached.append(usage.prompt_tokens_details.cached_tokens or 0)
        # 12 whole blocks: more than any other group shares.
        assert cached == [0, 192, 192, 192]
        # Groups without a place yet are given one at random.
        if group >= 5 and both_served():
            return
    pytest.fail("every group went to the same replica")


def test_load_and_silence_by_turns_break_nothing(stack: Stack) -> None:
    # Longer than the interval at which either side asks a silent connection for a sign.
    options = ["--minutes", "0.2", "--load-s", "1", "--silence-s", "12", "--concurrency", "4"]
    result = asyncio.run(soak(stack.gateway.base_url, parse(options)))
    assert result.failures == []
    assert result.num_phases == 2
    assert result.num_requests > 4


def test_no_connection_was_dropped_and_no_event_missed(stack: Stack) -> None:
    log = stack.log_path.read_text(errors="replace")
    assert log.count("KV event stream connected") == len(stack.replicas)
    assert "ENHANCE_YOUR_CALM" not in log
    for line in log.splitlines():
        assert "KV event" not in line or "gap" not in line.lower(), line


def _served(stack: Stack) -> list[float]:
    return [Metrics(r.scheduler.metrics_url)["requests_total"] for r in stack.replicas]


def _generated_tokens(stack: Stack) -> float:
    return sum(Metrics(r.scheduler.metrics_url)["generation_tokens_total"] for r in stack.replicas)


def _running(stack: Stack) -> float:
    return sum(Metrics(r.scheduler.metrics_url)["num_requests_running"] for r in stack.replicas)
