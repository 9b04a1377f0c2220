"""What a session's sender sees."""

from executor_service.session import EndReason, Session, SessionOptions
from nanovllm.v1 import executor_pb2


def result(iteration: int) -> executor_pb2.StepResult:
    return executor_pb2.StepResult(iteration=iteration)


def iterations(message: executor_pb2.StepResults | None) -> list[int]:
    assert message is not None
    return [item.iteration for item in message.results]


def test_results_that_piled_up_leave_in_one_message_in_order():
    session = Session(1)
    for iteration in range(1, 6):
        session.put(result(iteration))
    assert iterations(session.take()) == [1, 2, 3, 4, 5]


def test_one_message_is_bounded():
    session = Session(1)
    for iteration in range(300):
        session.put(result(iteration))
    first, second = session.take(), session.take()
    assert len(first.results) == 256
    assert iterations(first) + iterations(second) == list(range(300))


def test_results_before_the_end_are_still_taken():
    session = Session(1)
    session.put(result(1))
    session.end(EndReason.FENCED, "a newer session took over")
    session.put(result(2))
    assert iterations(session.take()) == [1]
    assert session.take() is None


def test_the_first_reason_counts():
    session = Session(1)
    session.end(EndReason.PROTOCOL, "first")
    session.end(EndReason.CLOSED, "second")
    assert session.ended
    assert (session.end_reason, session.end_message) == (EndReason.PROTOCOL, "first")
    assert session.take() is None


def test_a_session_without_results_yields_an_empty_message_when_a_heartbeat_is_due():
    session = Session(1, SessionOptions(heartbeat_interval_s=0.01))
    assert iterations(session.take()) == []
    session.put(result(3))
    assert iterations(session.take()) == [3]
    assert iterations(session.take()) == []
    assert session.num_iterations == 3
    session.end(EndReason.CLOSED, "closed")
    assert session.take() is None


def test_results_wait_for_the_scheduler_to_take_in_those_on_their_way():
    session = Session(1, SessionOptions(heartbeat_interval_s=0.01, max_messages_in_flight=2))
    for iteration in (1, 2):
        session.put(result(iteration))
        assert iterations(session.take()) == [iteration]
    for iteration in (3, 4, 5):
        session.put(result(iteration))
    assert iterations(session.take()) == []
    session.acknowledge(1)
    assert iterations(session.take()) == [3, 4, 5]
    session.put(result(6))
    assert iterations(session.take()) == []
    session.acknowledge(3)
    assert iterations(session.take()) == [6]


def test_a_session_that_ended_sends_its_last_results_whatever_is_on_its_way():
    session = Session(1, SessionOptions(max_messages_in_flight=1))
    session.put(result(1))
    assert iterations(session.take()) == [1]
    session.put(result(2))
    session.end(EndReason.SHUTDOWN, "the executor is shutting down")
    assert iterations(session.take()) == [2]
    assert session.take() is None


def test_a_session_that_ends_before_the_worker_takes_it_was_never_open():
    taken, dropped = Session(1), Session(2)
    taken.open()
    dropped.end(EndReason.CLOSED, "the stream was closed")
    assert taken.wait_until_open()
    assert not dropped.wait_until_open()
