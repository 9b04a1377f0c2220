"""Iterations on a real tiny model: tokens, finish flags, and what is written where."""

import random
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from executor_service.batch_state import (
    FINISH_LENGTH,
    FINISH_NONE,
    FINISH_NOT_RUN,
    FINISH_STOP_TOKEN,
)
from tests.checkpoints import make_checkpoint
from tests.executor_service.driver import Driver
from tests.executor_service.plans import LIMITS, admit

NUM_NEW = 16


def prompt(length: int) -> tuple[int, ...]:
    return tuple(random.Random(length).choices(range(320), k=length))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("runner"))


@pytest.fixture(scope="module")
def reference(checkpoint: Path):
    """Greedy tokens of transformers."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()

    @cache
    def generate(token_ids: tuple[int, ...]) -> list[int]:
        inputs = torch.tensor([token_ids])
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=NUM_NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return output[0, len(token_ids) :].tolist()

    generate.model = model
    return generate


@pytest.fixture
def driver(checkpoint: Path) -> Driver:
    return Driver(checkpoint)


def shuffled_blocks(seed: int = 0) -> list[int]:
    blocks = list(range(LIMITS.num_blocks))
    random.Random(seed).shuffle(blocks)
    return blocks


def greedy(slot: int, token_ids: tuple[int, ...], blocks: list[int], **options):
    """An admit with all the blocks that NUM_NEW tokens need, taken off `blocks`."""
    count = -(-(len(token_ids) + NUM_NEW) // LIMITS.block_size)
    mine = [blocks.pop() for _ in range(count)]
    options.setdefault("max_total_tokens", len(token_ids) + NUM_NEW)
    return admit(slot, list(token_ids), mine, **options)


def test_greedy_tokens_of_a_mixed_batch_with_shuffled_blocks_equal_transformers(driver, reference):
    blocks = shuffled_blocks()
    prompts = {0: prompt(1), 1: prompt(30), 2: prompt(7)}
    driver.step(admits=[greedy(0, prompts[0], blocks)], chunks=[(0, 1)])
    driver.step(
        admits=[greedy(1, prompts[1], blocks), greedy(2, prompts[2], blocks)],
        chunks=[(1, 11), (2, 7)],
    )
    driver.step(chunks=[(1, 1)])
    driver.step(chunks=[(1, 18)])
    driver.run()
    for slot, token_ids in prompts.items():
        assert driver.tokens[slot] == reference(token_ids), f"slot {slot}"


def test_a_slot_takes_its_next_owner_without_a_trace_of_the_last(driver, reference):
    blocks = shuffled_blocks(1)
    first = greedy(0, prompt(30), list(blocks), repetition_penalty=5.0, logit_bias=((3, 50.0),))
    driver.step(admits=[first], chunks=[(0, 30)])
    driver.step()
    driver.step(releases=[0], admits=[greedy(0, prompt(7), blocks)], chunks=[(0, 7)])
    driver.run()
    assert driver.tokens[0] == reference(prompt(7))


def test_cached_prefix_blocks_of_another_slot_give_the_same_tokens(driver, reference):
    blocks = shuffled_blocks(2)
    token_ids = prompt(30)
    owner = greedy(0, token_ids, blocks)
    driver.step(admits=[owner], chunks=[(0, 30)])
    shared = greedy(1, token_ids, blocks, num_cached_tokens=28)
    shared.block_ids[:7] = owner.block_ids[:7]
    driver.step(admits=[shared], chunks=[(1, 2)])
    driver.run()
    assert driver.tokens[1] == reference(token_ids)


def test_length_and_stop_tokens_finish_a_slot_at_the_right_token(driver, reference):
    expected = reference(prompt(7))
    stop = expected[5]
    blocks = shuffled_blocks()
    driver.step(
        admits=[
            greedy(0, prompt(7), blocks, max_total_tokens=10),
            greedy(1, prompt(7), blocks, stop_token_ids=(stop, 300)),
        ],
        chunks=[(0, 7), (1, 7)],
    )
    outputs = [driver.step() for _ in range(8) if driver.slots.runnable()]
    assert driver.tokens[0] == expected[:3]
    assert driver.tokens[1] == expected[: expected.index(stop) + 1]
    flags = {slot: [] for slot in (0, 1)}
    for output in outputs:
        for slot, flag in zip(output.slots, output.finish_flags, strict=True):
            flags[slot].append(flag)
    assert flags[0][-1] == FINISH_LENGTH
    assert flags[1][-1] == FINISH_STOP_TOKEN
    assert set(flags[0][:-1] + flags[1][:-1]) <= {FINISH_NONE}


def test_a_stop_token_cannot_come_before_the_minimum_length(driver, reference):
    expected = reference(prompt(7))
    blocks = shuffled_blocks()
    driver.step(
        admits=[greedy(0, prompt(7), blocks, stop_token_ids=(expected[0],), min_total_tokens=12)],
        chunks=[(0, 7)],
    )
    driver.run()
    assert expected[0] not in driver.tokens[0][:5]
    assert len(driver.tokens[0]) > 5


def kv_blocks(driver: Driver) -> torch.Tensor:
    """All blocks but the trash block."""
    return torch.stack([driver.cache.key, driver.cache.value])[:, :, : LIMITS.num_blocks].clone()


def test_a_finished_slot_does_not_run_and_writes_only_to_the_trash_block(driver, reference):
    blocks = shuffled_blocks()
    driver.step(
        admits=[greedy(0, prompt(7), blocks, max_total_tokens=9), greedy(1, prompt(5), blocks)],
        chunks=[(0, 7), (1, 5)],
    )
    driver.step()
    before, rows = kv_blocks(driver), driver.state.token_ids[0].clone()
    length = int(driver.state.ints("num_tokens")[0])
    one = driver.slots[1].num_computed
    output = driver.launch_also(0)
    assert output.slots == [1, 0]
    assert output.finish_flags == [FINISH_NONE, FINISH_NOT_RUN]
    after = kv_blocks(driver)
    changed = (before != after).flatten(3).any(dim=3).any(dim=0).any(dim=0).nonzero().flatten()
    table = driver.state.block_tables[1].tolist()
    assert changed.tolist() == [table[one // LIMITS.block_size]]
    assert torch.equal(driver.state.token_ids[0], rows)
    assert int(driver.state.ints("num_tokens")[0]) == length
    driver.run()
    assert driver.tokens[1] == reference(prompt(5))


def test_a_slot_out_of_blocks_does_not_run_and_goes_on_unharmed_when_granted(driver, reference):
    token_ids = prompt(7)
    blocks = shuffled_blocks()
    first, rest = blocks[:2], blocks[2:6]
    driver.step(
        admits=[admit(0, list(token_ids), first, max_total_tokens=7 + NUM_NEW)], chunks=[(0, 7)]
    )
    driver.run()
    assert driver.tokens[0] == reference(token_ids)[:2]
    before = kv_blocks(driver)
    assert driver.launch_also(0).finish_flags == [FINISH_NOT_RUN]
    assert torch.equal(kv_blocks(driver), before)
    driver.step(grants=[(0, rest)])
    driver.run()
    assert driver.tokens[0] == reference(token_ids)


SAMPLED = {
    "temperature": 0.9,
    "top_k": 50,
    "top_p": 0.95,
    "min_p": 0.01,
    "presence_penalty": 0.5,
    "repetition_penalty": 1.2,
}


def test_a_seeded_slot_draws_the_same_tokens_alone_and_in_a_batch(checkpoint):
    alone, batched = Driver(checkpoint), Driver(checkpoint)
    alone.step(
        admits=[greedy(3, prompt(7), shuffled_blocks(3), seed=-5, **SAMPLED)], chunks=[(3, 7)]
    )
    blocks = shuffled_blocks(4)
    batched.step(admits=[greedy(0, prompt(20), blocks, seed=1, temperature=1.5)], chunks=[(0, 9)])
    batched.step(
        admits=[greedy(1, prompt(7), blocks, seed=-5, **SAMPLED), greedy(2, prompt(5), blocks)],
        chunks=[(0, 11), (1, 7), (2, 5)],
    )
    alone.run()
    batched.run()
    assert len(alone.tokens[3]) == NUM_NEW
    assert batched.tokens[1] == alone.tokens[3]


def test_a_readmitted_seeded_slot_goes_on_with_the_same_draws(checkpoint):
    """As after a preemption: the generated tokens come back as known ones."""
    whole, broken = Driver(checkpoint), Driver(checkpoint)
    whole.step(admits=[greedy(0, prompt(7), shuffled_blocks(), seed=8, **SAMPLED)], chunks=[(0, 7)])
    whole.run()
    known = [*prompt(7), *whole.tokens[0][:6]]
    again = admit(
        2,
        known,
        shuffled_blocks(5)[:6],
        num_prompt_tokens=7,
        max_total_tokens=7 + NUM_NEW,
        seed=8,
        **SAMPLED,
    )
    broken.step(admits=[again], chunks=[(2, len(known))])
    broken.run()
    assert broken.tokens[2] == whole.tokens[0][6:]


def test_log_probabilities_are_those_of_the_model_for_whoever_asked(driver, reference):
    token_ids = prompt(7)
    blocks = shuffled_blocks()
    output = driver.step(
        admits=[
            greedy(0, token_ids, blocks),
            greedy(1, token_ids, blocks, num_logprobs=3),
            greedy(2, token_ids, blocks, num_logprobs=0),
        ],
        chunks=[(0, 7), (1, 7), (2, 7)],
    )
    with torch.inference_mode():
        logits = reference.model(torch.tensor([token_ids])).logits[0, -1]
    expected = torch.log_softmax(logits.double(), dim=-1)
    top = expected.topk(3)
    one, two = output.logprobs
    assert (one.slot, two.slot) == (1, 2)
    assert one.top_token_ids == top.indices.tolist()
    assert one.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-4)
    assert one.chosen == pytest.approx(float(expected[output.token_ids[1]]), abs=1e-4)
    assert two.top_token_ids == []
    assert two.chosen == pytest.approx(one.chosen, abs=1e-5)


def test_a_partial_prefill_produces_no_token(driver):
    output = driver.step(admits=[greedy(0, prompt(20), shuffled_blocks())], chunks=[(0, 12)])
    assert (output.slots, output.token_ids, output.finish_flags) == ([], [], [])
