"""Choosing among executors: affinity where it saves work, within a bound on imbalance."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler_service.block_manager import BlockHash
from scheduler_service.router import Candidate, Choice, ExecutorIndex, Router, RoutingPolicy

BLOCK = 16


def chain(name: str, length: int = 8) -> list[BlockHash]:
    return [BlockHash(f"{name}{number}".encode()) for number in range(length)]


def candidate(
    index: int, *, known: int = 0, queued: int = 0, live: int = 0, slots: int = 64, prompt="a"
) -> Candidate:
    return Candidate(
        ExecutorIndex(index),
        chain(prompt),
        BLOCK,
        num_known_blocks=known,
        num_queued_tokens=queued,
        num_live=live,
        num_slots=slots,
    )


def choose(*candidates: Candidate, policy: RoutingPolicy | None = None) -> Choice:
    """A first choice, without memory of any before."""
    return Router(policy or RoutingPolicy()).choose(candidates)


def test_the_longest_known_prefix_wins_among_equally_busy_executors():
    choice = choose(candidate(0, known=2), candidate(1, known=5), candidate(2))
    assert (choice.index, choice.num_cached_tokens) == (1, 5 * BLOCK)


def test_without_a_known_prefix_the_least_loaded_executor_wins():
    assert choose(candidate(0, live=3), candidate(1, live=1), candidate(2, live=2)).index == 1


def test_among_equals_the_first_executor_wins():
    assert choose(candidate(3, live=1), candidate(1, live=1), candidate(2, live=1)).index == 1


def test_a_queue_of_more_than_twice_what_the_prefix_saves_outweighs_it():
    worth = 2 * 5 * BLOCK
    assert choose(candidate(0, known=5, queued=worth - 1), candidate(1)).index == 0
    assert choose(candidate(0, known=5, queued=worth + 1), candidate(1)).index == 1


def test_affinity_ends_at_the_bound_on_imbalance():
    policy = RoutingPolicy(max_imbalance=4)
    at_the_bound = (candidate(0, known=8, live=6), candidate(1, live=2))
    assert choose(*at_the_bound, policy=policy).index == 0
    beyond = (candidate(0, known=8, live=7), candidate(1, live=2))
    assert choose(*beyond, policy=policy).index == 1


def test_an_executor_of_four_times_the_slots_is_as_loaded_with_four_times_the_sequences():
    small, large = candidate(0, live=16, slots=64), candidate(1, live=63, slots=256)
    assert choose(small, large).index == 1
    assert choose(small, candidate(1, live=65, slots=256)).index == 0


def test_the_bound_is_proportional_to_an_executors_slots():
    policy = RoutingPolicy(max_imbalance=8)
    # Eight beyond the least load at the larger one are two at the smaller one.
    large = candidate(1, live=40, slots=256)
    assert choose(candidate(0, known=8, live=12, slots=64), large, policy=policy).index == 0
    assert choose(candidate(0, known=8, live=13, slots=64), large, policy=policy).index == 1


def test_no_executor_gets_a_whole_batch_more_than_another():
    known = candidate(0, known=8, live=9, slots=8)
    assert choose(known, candidate(1, live=1, slots=8)).index == 0
    assert choose(known, candidate(1, live=0, slots=8)).index == 1


def test_as_many_sequences_of_a_prompt_follow_as_the_bound_allows():
    policy = RoutingPolicy(max_imbalance=4)
    choice = choose(candidate(0, live=1), candidate(1, live=3), policy=policy)
    # The first meets one sequence there, the last that may follow seven.
    assert (choice.index, choice.num_followers) == (0, 6)
    assert choose(candidate(0, known=8, live=7), candidate(1, live=3), policy=policy) == Choice(
        ExecutorIndex(0),
        num_cached_tokens=8 * BLOCK,
        num_followers=0,
        num_follower_cached_tokens=8 * BLOCK,
    )


def test_any_number_may_follow_where_there_is_one_executor():
    assert choose(candidate(0, live=1_000)).num_followers > 1_000_000


def test_followers_find_all_full_blocks_of_the_prompt():
    choice = choose(candidate(0, known=1))
    assert (choice.num_cached_tokens, choice.num_follower_cached_tokens) == (BLOCK, 8 * BLOCK)


def test_requests_that_arrive_together_follow_the_first_of_their_prefix():
    router = Router(RoutingPolicy())
    assert router.choose([candidate(0), candidate(1, live=1)]).index == 0
    # It waits: nothing is known there yet, and it counts as queued and live.
    others = [candidate(0, queued=130, live=3), candidate(1, live=1)]
    choice = router.choose(others)
    assert (choice.index, choice.num_cached_tokens) == (0, 8 * BLOCK)
    stranger = [
        candidate(0, queued=130, live=3, prompt="b"),
        candidate(1, live=1, prompt="b"),
    ]
    assert router.choose(stranger).index == 1


def test_only_the_part_of_a_prefix_that_was_sent_is_expected():
    router = Router(RoutingPolicy())
    router.choose([candidate(0)])
    longer = Candidate(ExecutorIndex(0), [*chain("a", 3), *chain("b")], BLOCK, 0, 130, 1, 64)
    assert router.choose([longer]).num_cached_tokens == 3 * BLOCK


def test_what_was_computed_and_evicted_is_not_expected_any_more():
    router = Router(RoutingPolicy())
    router.choose([candidate(0), candidate(1, live=1)])
    assert router.choose([candidate(0, live=1), candidate(1)]).index == 1


def test_no_more_is_expected_than_what_is_queued_and_the_oldest_is_forgotten_first():
    router = Router(RoutingPolicy())
    router.choose([candidate(0)])
    router.choose([candidate(0, queued=8 * BLOCK, prompt="b")])
    # Of sixteen blocks nine are queued: all eight of the second prompt, none of the first's start.
    queued = 9 * BLOCK
    assert router.choose([candidate(0, queued=queued, prompt="b")]).num_cached_tokens == 8 * BLOCK
    assert router.choose([candidate(0, queued=queued, prompt="a")]).num_cached_tokens == 0


def test_a_lost_executor_is_expected_to_know_nothing():
    router = Router(RoutingPolicy())
    router.choose([candidate(0), candidate(1, live=1)])
    router.forget(ExecutorIndex(0))
    assert router.choose([candidate(0, queued=130)]).num_cached_tokens == 0


def test_without_executors_there_is_no_choice():
    with pytest.raises(ValueError, match="no executor"):
        choose()


@st.composite
def some_candidates(draw) -> list[Candidate]:
    slots = draw(st.sampled_from([32, 64, 256]))
    return [
        candidate(
            index,
            known=draw(st.integers(0, 8)),
            queued=draw(st.integers(0, 300)),
            live=draw(st.integers(0, 40)),
            slots=slots,
        )
        for index in range(draw(st.integers(1, 6)))
    ]


@given(some_candidates(), st.integers(0, 20))
def test_no_choice_exceeds_the_bound_and_none_within_it_would_cost_less(options, bound):
    choice = choose(*options, policy=RoutingPolicy(max_imbalance=bound))
    chosen = options[choice.index]
    fewest = min(each.num_live for each in options)
    assert chosen.num_live <= fewest + bound

    def cost(each: Candidate) -> int:
        return each.num_queued_tokens - 2 * each.num_known_blocks * BLOCK

    allowed = [each for each in options if each.num_live <= fewest + bound]
    assert cost(chosen) == min(map(cost, allowed))


@given(some_candidates(), st.integers(0, 20))
def test_the_last_follower_is_within_the_bound_and_one_more_would_not_be(options, bound):
    choice = choose(*options, policy=RoutingPolicy(max_imbalance=bound))
    others = [each.num_live for each in options if each.index != choice.index]
    if not others:
        return
    # What each further sequence meets, the first of them counted.
    met = options[choice.index].num_live + choice.num_followers
    assert met <= min(others) + bound
    assert met + 1 > min(others) + bound
