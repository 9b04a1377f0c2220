"""The executor's wire protocol, driven by hand: what it promises and what it refuses."""

import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from nanovllm import ServiceProcess
from nanovllm.v1 import executor_pb2 as pb
from nanovllm.v1 import executor_pb2_grpc as pb_grpc
from nanovllm.wire import pack_int32, unpack_int32
from tests.e2e.support import CPU, LIMIT_S, VOCAB_SIZE, Reference, random_prompt

BLOCK_SIZE, NUM_BLOCKS, MAX_NUM_SEQS, MAX_BATCHED, MAX_MODEL_LEN = 8, 32, 4, 48, 128
GOES_ON, STOP_TOKEN, LENGTH = range(3)
PROMPT = random_prompt(20, seed=140)


@pytest.fixture(scope="module")
def executor(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServiceProcess]:
    folder = tmp_path_factory.mktemp("executor")
    process = ServiceProcess(
        "executor_service",
        [
            *("--model", str(checkpoint("qwen3")), "--listen", f"unix:{folder}/executor.sock"),
            *("--metrics-port", "-1", *CPU, "--max-model-len", str(MAX_MODEL_LEN)),
            *("--num-kv-blocks", str(NUM_BLOCKS), "--block-size", str(BLOCK_SIZE)),
            *("--max-num-seqs", str(MAX_NUM_SEQS), "--max-num-batched-tokens", str(MAX_BATCHED)),
        ],
        log_path=folder / "log",
    )
    with process:
        process.wait_until_ready(2 * LIMIT_S)
        yield process


@pytest.fixture(scope="module")
def channel(executor: ServiceProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(executor.address) as opened:
        yield opened


@pytest.fixture(scope="module")
def info(channel: grpc.Channel) -> pb.GetExecutorInfoResponse:
    stub = pb_grpc.ExecutorServiceStub(channel)
    return stub.GetExecutorInfo(pb.GetExecutorInfoRequest(), timeout=LIMIT_S)


class RawSession:
    """One Execute stream, message by message."""

    def __init__(self, channel: grpc.Channel, *, timeout_s: float = LIMIT_S) -> None:
        self._requests: queue.SimpleQueue[pb.ExecuteRequest | None] = queue.SimpleQueue()
        stub = pb_grpc.ExecutorServiceStub(channel)
        self.call: Any = stub.Execute(iter(self._requests.get, None), timeout=timeout_s)

    def __enter__(self) -> "RawSession":
        return self

    def __exit__(self, *_: object) -> None:
        self.call.cancel()
        self.close()

    def start(self, epoch: int) -> "RawSession":
        self.send(pb.ExecuteRequest(start_session=pb.StartSession(expected_epoch=epoch)))
        assert next(self.call).session_started.epoch == epoch
        return self

    def send(self, request: pb.ExecuteRequest) -> None:
        self._requests.put(request)

    def plan(self, step_id: int, **fields: Any) -> None:
        self.send(pb.ExecuteRequest(plan=pb.Plan(step_id=step_id, **fields)))

    def close(self) -> None:
        """Ends the client's half of the stream."""
        self._requests.put(None)

    def results(self) -> Iterator[pb.StepResult]:
        for response in self.call:
            yield from response.step_results.results

    def error(self) -> grpc.Call:
        """Reads until the stream ends with an error."""
        with pytest.raises(grpc.RpcError) as caught:
            for _ in self.call:
                pass
        assert isinstance(caught.value, grpc.Call)
        return caught.value


def admit(
    slot: int = 0,
    tokens: list[int] = PROMPT,
    blocks: range = range(8),
    total: int = len(PROMPT) + 10,
    **fields: Any,
) -> pb.Admit:
    values: dict[str, Any] = {
        "slot": slot,
        "token_ids": pack_int32(tokens),
        "block_ids": pack_int32(list(blocks)),
        "num_prompt_tokens": len(tokens),
        "max_total_tokens": total,
        "sampling": pb.SlotSampling(
            top_k=VOCAB_SIZE, top_p=1.0, repetition_penalty=1.0, num_logprobs=-1
        ),
    }
    return pb.Admit(**(values | fields))


def chunks(*slots_and_counts: tuple[int, int]) -> pb.PrefillChunks:
    return pb.PrefillChunks(
        slots=pack_int32([slot for slot, _ in slots_and_counts]),
        num_tokens=pack_int32([count for _, count in slots_and_counts]),
    )


def grants(slots: list[int], counts: list[int], blocks: list[int]) -> pb.Grants:
    return pb.Grants(
        slots=pack_int32(slots), num_blocks=pack_int32(counts), block_ids=pack_int32(blocks)
    )


def generate(session: RawSession, first_step_id: int = 1, **fields: Any) -> list[int]:
    """Runs one sequence to its end in slot 0."""
    session.plan(
        first_step_id,
        admits=[admit(**fields)],
        prefill_chunks=chunks((0, len(PROMPT))),
    )
    tokens: list[int] = []
    for result in session.results():
        tokens += unpack_int32(result.token_ids, "token_ids").tolist()
        if any(result.finish_flags):
            return tokens
    pytest.fail("the session ended before the sequence did")


@pytest.fixture
def expected(reference: Callable[[str], Reference]) -> list[int]:
    return reference("qwen3").greedy(PROMPT, 10)


class TestSession:
    def test_info_describes_the_executor(self, info: pb.GetExecutorInfoResponse) -> None:
        assert info.epoch > 0
        assert (info.block_size, info.num_blocks) == (BLOCK_SIZE, NUM_BLOCKS)
        assert (info.max_num_seqs, info.max_num_batched_tokens) == (MAX_NUM_SEQS, MAX_BATCHED)
        assert (info.vocab_size, info.max_model_len) == (VOCAB_SIZE, MAX_MODEL_LEN)
        assert (info.dtype, info.device, info.attention_backend) == ("float32", "cpu", "torch")

    def test_health_is_serving(self, channel: grpc.Channel) -> None:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "nanovllm.v1.ExecutorService"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=LIMIT_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING

    def test_slot_decodes_to_its_end_without_further_plans(
        self, channel: grpc.Channel, info: pb.GetExecutorInfoResponse, expected: list[int]
    ) -> None:
        with RawSession(channel).start(info.epoch) as session:
            assert generate(session) == expected

    def test_slot_pauses_without_room_and_goes_on_with_a_grant(
        self, channel: grpc.Channel, info: pb.GetExecutorInfoResponse, expected: list[int]
    ) -> None:
        with RawSession(channel).start(info.epoch) as session:
            # Three blocks hold 24 tokens; the prompt has 20.
            session.plan(
                1,
                admits=[admit(blocks=range(3))],
                prefill_chunks=chunks((0, len(PROMPT))),
            )
            results = session.results()
            tokens: list[int] = []
            while len(tokens) < 5:
                tokens += unpack_int32(next(results).token_ids, "token_ids").tolist()
            # With four more tokens computed there is no room to feed the fifth one back. An empty
            # plan is answered without a token.
            session.plan(2)
            answer = next(results)
            assert (answer.applied_step_id, answer.token_ids) == (2, b"")
            session.plan(3, grants=grants([0], [1], [9]))
            while len(tokens) < 10:
                result = next(results)
                assert result.applied_step_id == 3
                tokens += unpack_int32(result.token_ids, "token_ids").tolist()
            assert tokens == expected
            assert list(result.finish_flags) == [LENGTH]

    def test_chunks_of_a_prompt_add_up(
        self, channel: grpc.Channel, info: pb.GetExecutorInfoResponse, expected: list[int]
    ) -> None:
        with RawSession(channel).start(info.epoch) as session:
            session.plan(1, admits=[admit()], prefill_chunks=chunks((0, 7)))
            session.plan(2, prefill_chunks=chunks((0, 12)))
            session.plan(3, prefill_chunks=chunks((0, 1)))
            tokens: list[int] = []
            for result in session.results():
                new = unpack_int32(result.token_ids, "token_ids").tolist()
                assert not new or result.applied_step_id == 3
                tokens += new
                if any(result.finish_flags):
                    break
            assert tokens == expected

    def test_stop_token_is_flagged_and_nothing_follows(
        self, channel: grpc.Channel, info: pb.GetExecutorInfoResponse, expected: list[int]
    ) -> None:
        stop = expected[4]
        with RawSession(channel).start(info.epoch) as session:
            tokens = generate(session, stop_token_ids=pack_int32([stop]))
            assert tokens == expected[: expected.index(stop) + 1]
            session.plan(2, release_slots=pack_int32([0]))
            answer = next(session.results())
            assert (answer.applied_step_id, answer.token_ids) == (2, b"")

    def test_block_is_given_to_a_new_owner_in_the_plan_that_releases_it(
        self,
        channel: grpc.Channel,
        info: pb.GetExecutorInfoResponse,
        reference: Callable[[str], Reference],
    ) -> None:
        other = random_prompt(20, seed=141)
        with RawSession(channel).start(info.epoch) as session:
            session.plan(
                1,
                admits=[admit(total=MAX_MODEL_LEN, blocks=range(16))],
                prefill_chunks=chunks((0, 20)),
            )
            next(session.results())
            session.plan(
                2,
                release_slots=pack_int32([0]),
                admits=[admit(tokens=other, blocks=range(8))],
                prefill_chunks=chunks((0, 20)),
            )
            tokens: list[int] = []
            for result in session.results():
                if result.applied_step_id == 2:
                    tokens += unpack_int32(result.token_ids, "token_ids").tolist()
                if len(tokens) == 10:
                    break
        assert tokens == reference("qwen3").greedy(other, 10)

    def test_newer_session_fences_the_older_one(
        self, channel: grpc.Channel, info: pb.GetExecutorInfoResponse, expected: list[int]
    ) -> None:
        with RawSession(channel).start(info.epoch) as older:
            older.plan(1, admits=[admit()])
            with RawSession(channel).start(info.epoch) as newer:
                error = older.error()
                assert error.code() is grpc.StatusCode.ABORTED
                assert "newer session" in (error.details() or "")
                # The same slot is free for the newer one.
                assert generate(newer) == expected

    def test_session_of_a_client_that_is_done_ends(
        self, channel: grpc.Channel, info: pb.GetExecutorInfoResponse
    ) -> None:
        with RawSession(channel).start(info.epoch) as session:
            session.close()
            assert session.error().code() is grpc.StatusCode.CANCELLED


class TestRefusedSessions:
    @pytest.fixture(autouse=True)
    def _goes_on_serving(
        self, channel: grpc.Channel, info: pb.GetExecutorInfoResponse, expected: list[int]
    ) -> Iterator[None]:
        yield
        with RawSession(channel).start(info.epoch) as session:
            assert generate(session) == expected

    def test_first_message_must_start_the_session(self, channel: grpc.Channel) -> None:
        for first in (pb.ExecuteRequest(), pb.ExecuteRequest(plan=pb.Plan(step_id=1))):
            with RawSession(channel) as session:
                session.send(first)
                error = session.error()
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert "StartSession" in (error.details() or "")

    def test_stream_without_any_message_is_refused(self, channel: grpc.Channel) -> None:
        with RawSession(channel) as session:
            session.close()
            assert session.error().code() is grpc.StatusCode.INVALID_ARGUMENT

    def test_epoch_of_another_process_is_refused(
        self, channel: grpc.Channel, info: pb.GetExecutorInfoResponse
    ) -> None:
        with RawSession(channel) as session:
            start = pb.StartSession(expected_epoch=info.epoch ^ 1)
            session.send(pb.ExecuteRequest(start_session=start))
            error = session.error()
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert "GetExecutorInfo" in (error.details() or "")

    def test_second_start_is_refused(
        self, channel: grpc.Channel, info: pb.GetExecutorInfoResponse
    ) -> None:
        with RawSession(channel).start(info.epoch) as session:
            start = pb.StartSession(expected_epoch=info.epoch)
            session.send(pb.ExecuteRequest(start_session=start))
            assert session.error().code() is grpc.StatusCode.INVALID_ARGUMENT


ODD = b"\0\0\0"
GOOD_SAMPLING = admit().sampling


def sampling(**fields: Any) -> dict[str, Any]:
    changed = pb.SlotSampling()
    changed.CopyFrom(GOOD_SAMPLING)
    changed.MergeFrom(pb.SlotSampling(**fields))
    return {"admits": [admit(sampling=changed)]}


#: Each is one plan, after a plan that admitted a sequence to slot 3 and computed 5 of its tokens.
BAD_PLANS: dict[str, tuple[dict[str, Any], str]] = {
    "step-id-repeats": ({"step_id": 1}, "plan 1 came after plan 1"),
    "step-id-skips": ({"step_id": 3}, "plan 3 came after plan 1"),
    "slot-negative": ({"admits": [admit(slot=-1)]}, "slot -1"),
    "slot-beyond-the-last": ({"admits": [admit(slot=MAX_NUM_SEQS)]}, f"slot {MAX_NUM_SEQS}"),
    "slot-taken": ({"admits": [admit(slot=3)]}, "slot 3 is taken"),
    "slot-admitted-twice": ({"admits": [admit(), admit()]}, "slot 0 is taken"),
    "release-of-a-free-slot": ({"release_slots": pack_int32([0])}, "slot 0"),
    "release-twice": ({"release_slots": pack_int32([3, 3])}, "slot 3"),
    "release-out-of-range": ({"release_slots": pack_int32([99])}, "release_slots"),
    "odd-releases": ({"release_slots": ODD}, "release_slots"),
    "odd-tokens": ({"admits": [admit(token_ids=ODD)]}, "token_ids"),
    "odd-blocks": ({"admits": [admit(block_ids=ODD)]}, "block_ids"),
    "odd-bias": (sampling(logit_bias_values=ODD), "logit_bias_values"),
    "odd-chunks": (
        {"prefill_chunks": pb.PrefillChunks(slots=pack_int32([3]), num_tokens=ODD)},
        "num_tokens",
    ),
    "no-tokens": ({"admits": [admit(tokens=[])]}, "0 tokens"),
    "token-out-of-vocabulary": ({"admits": [admit(tokens=[VOCAB_SIZE])]}, "vocabulary"),
    "token-negative": ({"admits": [admit(tokens=[-1])]}, "vocabulary"),
    "stop-token-out-of-vocabulary": (
        {"admits": [admit(stop_token_ids=pack_int32([VOCAB_SIZE]))]},
        "vocabulary",
    ),
    "block-out-of-range": ({"admits": [admit(blocks=range(NUM_BLOCKS, NUM_BLOCKS + 8))]}, "block"),
    "block-negative": ({"admits": [admit(blocks=range(-8, 0))]}, "block"),
    "too-few-blocks": ({"admits": [admit(blocks=range(2))]}, "2 blocks for 20 tokens"),
    "too-many-blocks": ({"admits": [admit(blocks=range(17))]}, "17 blocks"),
    "longer-than-the-model": ({"admits": [admit(total=MAX_MODEL_LEN + 1)]}, "model length"),
    "limit-already-reached": ({"admits": [admit(total=len(PROMPT))]}, "limit of 20"),
    "all-tokens-cached": ({"admits": [admit(num_cached_tokens=20)]}, "20 of 20 tokens"),
    "more-prompt-than-tokens": ({"admits": [admit(num_prompt_tokens=21)]}, "prompt"),
    "temperature-nan": (sampling(temperature=float("nan")), "finite"),
    "temperature-negative": (sampling(temperature=-1.0), "temperature"),
    "too-many-logprobs": (sampling(num_logprobs=1000), "log-probabilities"),
    "bias-without-value": (sampling(logit_bias_token_ids=pack_int32([1])), "biases"),
    "grant-to-a-free-slot": ({"grants": grants([0], [1], [20])}, "slot 0 is free"),
    "grant-of-nothing": ({"grants": grants([3], [0], [])}, "grants"),
    "grant-does-not-add-up": ({"grants": grants([3], [2], [20])}, "grants"),
    "grant-out-of-range": ({"grants": grants([3], [1], [NUM_BLOCKS])}, "block"),
    "grant-beyond-the-models-length": (
        {"grants": grants([3], [16], list(range(16, 32)))},
        "slot 3",
    ),
    "chunk-of-a-free-slot": ({"prefill_chunks": chunks((0, 1))}, "slot 0 is free"),
    "chunk-of-nothing": ({"prefill_chunks": chunks((3, 0))}, "at least one token"),
    "chunk-beyond-the-known-tokens": ({"prefill_chunks": chunks((3, 16))}, "slot 3"),
    "chunk-twice": ({"prefill_chunks": chunks((3, 1), (3, 1))}, "repeat"),
    "chunk-beyond-the-budget": (
        {
            "admits": [admit(slot=slot, blocks=range(8)) for slot in range(3)],
            "prefill_chunks": chunks((0, 20), (1, 20), (2, 20)),
        },
        "exceed 48 tokens",
    ),
}


class TestRefusedPlans:
    @pytest.mark.parametrize(("plan", "message"), BAD_PLANS.values(), ids=BAD_PLANS.keys())
    def test_plan_that_breaks_the_protocol_ends_the_session_and_nothing_else(
        self,
        channel: grpc.Channel,
        info: pb.GetExecutorInfoResponse,
        expected: list[int],
        plan: dict[str, Any],
        message: str,
    ) -> None:
        with RawSession(channel).start(info.epoch) as session:
            first = admit(slot=3, blocks=range(8, 16))
            session.plan(1, admits=[first], prefill_chunks=chunks((3, 5)))
            session.plan(**({"step_id": 2} | plan))
            error = session.error()
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert message in (error.details() or "")
        with RawSession(channel).start(info.epoch) as session:
            assert generate(session) == expected
