"""The slot table against the plainest model of slots."""

import copy
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from executor_service.plan_reader import PlanError
from executor_service.slots import SlotTable
from scheduler_service.plan import Admit
from tests.executor_service.plans import LIMITS, admit, order


@dataclass
class PlainSlot:
    known: int
    computed: int
    blocks: int
    limit: int
    decoding: bool = False


SLOTS = st.integers(0, 2)


@st.composite
def small_admits(draw: st.DrawFn) -> Admit:
    known = draw(st.integers(1, 12))
    blocks = -(-known // LIMITS.block_size) + draw(st.integers(0, 2))
    return admit(
        draw(SLOTS),
        [1] * known,
        list(range(blocks)),
        num_cached_tokens=draw(st.integers(0, known - 1)),
        max_total_tokens=known + draw(st.integers(1, 6)),
    )


PLANS = st.fixed_dictionaries(
    {},
    optional={
        "releases": st.lists(SLOTS, max_size=2),
        "admits": st.lists(small_admits(), min_size=1, max_size=2),
        "grants": st.lists(
            st.tuples(SLOTS, st.lists(st.integers(0, 9), min_size=1, max_size=2)),
            max_size=2,
            unique_by=lambda grant: grant[0],
        ),
        "chunks": st.lists(
            st.tuples(SLOTS, st.integers(1, 13)), max_size=3, unique_by=lambda chunk: chunk[0]
        ),
    },
)


def apply_plainly(slots: dict[int, PlainSlot], plan: dict) -> list[tuple[int, int, int, bool]]:
    """Raises KeyError where the plan is unlawful; returns slot, start, count and completeness."""
    for slot in plan.get("releases", ()):
        del slots[slot]
    for item in plan.get("admits", ()):
        if item.slot in slots:
            raise KeyError("taken")
        slots[item.slot] = PlainSlot(
            len(item.token_ids), item.num_cached_tokens, len(item.block_ids), item.max_total_tokens
        )
    for slot, blocks in plan.get("grants", ()):
        slots[slot].blocks += len(blocks)
        if slots[slot].blocks > LIMITS.max_blocks_per_seq:
            raise KeyError("too many blocks")
    chunks = []
    for slot, count in plan.get("chunks", ()):
        state = slots[slot]
        if state.decoding or state.computed + count > state.known:
            raise KeyError("nothing to compute")
        chunks.append((slot, state.computed, count, state.computed + count == state.known))
        state.computed += count
    return chunks


def plainly_runnable(slots: dict[int, PlainSlot]) -> set[int]:
    return {
        slot
        for slot, state in slots.items()
        if state.decoding
        and state.known < state.limit
        and state.computed < state.blocks * LIMITS.block_size
    }


@given(st.lists(PLANS, max_size=20))
@settings(max_examples=150)
def test_the_table_agrees_with_a_plain_model_on_every_plan(plans: list[dict]):
    table, plain, step_id = SlotTable(LIMITS), {}, 1
    for plan in plans:
        attempt = copy.deepcopy(plain)
        try:
            expected = apply_plainly(attempt, plan)
        except KeyError:
            with pytest.raises(PlanError):
                copy.deepcopy(table).apply(order(step_id, **plan))
            continue
        plain = attempt
        chunks = table.apply(order(step_id, **plan))
        step_id += 1
        assert [(c.slot, c.start, c.num_tokens, c.completes) for c in chunks] == expected
        runnable = table.runnable()
        assert set(runnable) == plainly_runnable(plain)
        assert table.num_occupied == len(plain)
        for slot in runnable:
            table.advance(slot)
            plain[slot].known += 1
            plain[slot].computed += 1
        for slot, _, _, completes in expected:
            if completes:
                table.complete_prefill(slot)
                plain[slot].known += 1
                plain[slot].decoding = True


def test_plans_must_come_one_after_the_other():
    table = SlotTable(LIMITS)
    table.apply(order(1))
    with pytest.raises(PlanError, match="plan 3 came after plan 1"):
        table.apply(order(3))


def test_a_cleared_table_begins_again_with_plan_one():
    table = SlotTable(LIMITS)
    table.apply(order(1, admits=[admit(0, [1], [0])]))
    table.clear()
    table.apply(order(1, admits=[admit(0, [1], [0])]))
    assert table.applied_step_id == 1


def test_owners_of_a_slot_differ_in_their_generation():
    table = SlotTable(LIMITS)
    table.apply(order(1, admits=[admit(0, [1], [0])]))
    first = table[0].generation
    table.apply(order(2, releases=[0], admits=[admit(0, [1], [0])]))
    assert table[0].generation != first


def test_more_tokens_than_an_iteration_takes_are_refused():
    table = SlotTable(LIMITS)
    with pytest.raises(PlanError, match="exceed 64 tokens"):
        table.apply(
            order(
                1,
                admits=[admit(slot, [1] * 33, list(range(9))) for slot in range(2)],
                chunks=[(0, 33), (1, 33)],
            )
        )
