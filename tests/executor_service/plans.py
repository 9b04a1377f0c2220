"""Plans as a scheduler makes them, read as an executor reads them."""

from executor_service.plan_reader import ExecutorLimits, PlanOrder, read_plan
from scheduler_service.plan import Admit, Plan, encode_plan
from scheduler_service.sequence import SlotSampling

LIMITS = ExecutorLimits(
    vocab_size=320,
    num_blocks=64,
    block_size=4,
    max_num_seqs=6,
    max_num_batched_tokens=64,
    max_model_len=96,
)


def admit(
    slot: int,
    token_ids: list[int],
    block_ids: list[int],
    *,
    num_cached_tokens: int = 0,
    num_prompt_tokens: int | None = None,
    max_total_tokens: int = LIMITS.max_model_len,
    min_total_tokens: int = 0,
    stop_token_ids: tuple[int, ...] = (),
    **sampling,
) -> Admit:
    return Admit(
        slot=slot,
        token_ids=token_ids,
        block_ids=block_ids,
        num_cached_tokens=num_cached_tokens,
        num_prompt_tokens=num_prompt_tokens or len(token_ids),
        max_total_tokens=max_total_tokens,
        min_total_tokens=min_total_tokens,
        stop_token_ids=stop_token_ids,
        sampling=SlotSampling(**sampling),
    )


def order(step_id: int, *, limits: ExecutorLimits = LIMITS, **changes) -> PlanOrder:
    """A plan after a trip over the wire; `changes` are fields of the scheduler's Plan."""
    return read_plan(encode_plan(Plan(step_id, **changes)), limits)
