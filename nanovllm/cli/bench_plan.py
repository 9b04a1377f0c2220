"""What `nanovllm bench` sends, and when: from its options to sessions and arrivals."""

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovllm.cli.options import CommandError
from nanovllm.load.arrivals import DEFAULT_BURSTINESS, Arrivals, arrival_times
from nanovllm.load.prompts import (
    Conversation,
    choose,
    read_prompts,
    sharegpt_conversations,
)
from nanovllm.load.requests import Session
from nanovllm.load.trace import TraceRow, read_trace, scale_trace
from nanovllm.load.workload import SyntheticWorkload, text_sessions, trace_sessions
from nanovllm.sampling_params import SamplingParams

#: What --prompts takes beside a file.
SHAREGPT = "sharegpt"
DEFAULT_NUM_REQUESTS = 64
DEFAULT_CONCURRENCY = 8
DEFAULT_INPUT_LEN = 128
#: Vocabulary for servers that do not say how large theirs is; smaller than any model's.
DEFAULT_VOCAB_SIZE = 10_000


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What the workload has to fit into; None where the server does not say."""

    vocab_size: int | None = None
    max_model_len: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """A run."""

    sessions: Sequence[Session]
    warmup: Sequence[Session]
    #: When sessions are due; None for a closed loop of `concurrency` users.
    arrivals_s: Sequence[float] | None
    concurrency: int
    max_outstanding: int | None
    #: How to make the same plan again on any machine, for JSON.
    config: dict[str, Any]

    @property
    def num_requests(self) -> int:
        """Requests of all measured sessions, if none fails."""
        return sum(len(session.turns) for session in self.sessions)


@dataclass(frozen=True, slots=True)
class _Draft:
    """Parts of a plan that depend on the kind of workload."""

    sessions: Sequence[Session]
    warmup: Sequence[Session]
    config: dict[str, Any]
    arrivals_s: Sequence[float] | None = None


def make_plan(options: argparse.Namespace, limits: ServerLimits) -> Plan:
    """Makes the plan that the options ask for.

    Raises:
        CommandError: The options contradict each other, exceed the server's limits, or name a file
            that cannot be used.
        OSError: A file cannot be read.
    """
    _check_combination(options)
    vocab_size = options.vocab_size or limits.vocab_size or DEFAULT_VOCAB_SIZE
    if limits.vocab_size is not None and vocab_size > limits.vocab_size:
        raise CommandError(
            f"--vocab-size {vocab_size} exceeds the model's vocabulary of {limits.vocab_size}"
        )
    try:
        params = SamplingParams(
            temperature=options.temperature,
            seed=options.seed,
            ignore_eos=None if options.stop_at_eos else True,
        )
        if options.trace is not None:
            draft = _trace_draft(options, params, vocab_size)
        elif options.prompt is not None or options.prompts is not None:
            draft = _text_draft(options, params)
        else:
            draft = _synthetic_draft(options, params, vocab_size)
    except ValueError as error:
        raise CommandError(str(error)) from error
    _check_lengths(draft.sessions, limits)
    config: dict[str, Any] = {
        "workload": draft.config,
        "temperature": options.temperature,
        "stop_at_eos": options.stop_at_eos,
        "seed": options.seed,
        "num_warmup": options.warmup,
        "cache_salt": options.cache_salt,
    }
    arrivals_s = draft.arrivals_s
    if options.rate is not None:
        kind = Arrivals(options.arrivals or Arrivals.POISSON)
        burstiness = options.burstiness or DEFAULT_BURSTINESS
        arrivals_s = arrival_times(
            kind,
            len(draft.sessions),
            rate=options.rate,
            seed=options.seed,
            burstiness=burstiness,
        )
        config["arrivals"] = {"kind": str(kind), "rate": options.rate}
        if kind is Arrivals.BURSTY:
            config["arrivals"]["burstiness"] = burstiness
    concurrency = options.concurrency or DEFAULT_CONCURRENCY
    if arrivals_s is None:
        config["concurrency"] = concurrency
    else:
        config["max_outstanding"] = options.max_outstanding
    return Plan(
        sessions=draft.sessions,
        warmup=draft.warmup,
        arrivals_s=arrivals_s,
        concurrency=concurrency,
        max_outstanding=options.max_outstanding,
        config=config,
    )


def _synthetic_draft(
    options: argparse.Namespace, params: SamplingParams, vocab_size: int
) -> _Draft:
    workload = SyntheticWorkload(
        input_len=options.input_len or DEFAULT_INPUT_LEN,
        output_len=options.output_len,
        vocab_size=vocab_size,
        sampling_params=params,
        seed=options.seed,
        num_prefix_groups=options.prefix_groups or 0,
        prefix_len=options.prefix_len or 0,
        num_turns=options.turns,
        mean_think_s=options.think_time_s,
    )
    count = options.num_requests or DEFAULT_NUM_REQUESTS
    config = {
        "kind": "random",
        "num_sessions": count,
        "input_len": workload.input_len,
        "output_len": workload.output_len,
        "vocab_size": vocab_size,
        "num_prefix_groups": workload.num_prefix_groups,
        "prefix_len": workload.prefix_len,
        "num_turns": workload.num_turns,
        "mean_think_s": workload.mean_think_s,
    }
    return _Draft(workload.sessions(count), workload.sessions(options.warmup, "warm-up"), config)


def _trace_draft(options: argparse.Namespace, params: SamplingParams, vocab_size: int) -> _Draft:
    rows: list[TraceRow] = scale_trace(read_trace(options.trace), options.trace_scale)
    rows = rows[: options.num_requests]
    config = {
        "kind": "trace",
        "file": _file(options.trace),
        "num_sessions": len(rows),
        "scale": options.trace_scale,
        "vocab_size": vocab_size,
    }
    warmup_rows = [rows[index % len(rows)] for index in range(options.warmup)]
    return _Draft(
        sessions=trace_sessions(rows, vocab_size, params, options.seed),
        warmup=trace_sessions(warmup_rows, vocab_size, params, options.seed, "warm-up"),
        config=config,
        arrivals_s=[row.arrival_s for row in rows],
    )


def _text_draft(options: argparse.Namespace, params: SamplingParams) -> _Draft:
    count = options.num_requests or DEFAULT_NUM_REQUESTS
    config: dict[str, Any] = {
        "kind": "text",
        "num_sessions": count,
        "output_len": options.output_len,
        "num_turns": options.turns,
        "mean_think_s": options.think_time_s,
        "as_chat": options.chat,
    }
    if options.prompt is not None:
        config["prompt"] = options.prompt
        chosen = [Conversation((options.prompt,))] * (count + options.warmup)
    else:
        is_sharegpt = options.prompts == SHAREGPT
        config["prompts"] = SHAREGPT if is_sharegpt else _file(Path(options.prompts))
        config["max_prompt_chars"] = options.max_prompt_chars
        chosen = choose(
            sharegpt_conversations() if is_sharegpt else read_prompts(Path(options.prompts)),
            count + options.warmup,
            num_turns=options.turns,
            max_chars=options.max_prompt_chars,
            seed=options.seed,
        )
    sessions = text_sessions(
        chosen,
        options.output_len,
        params,
        as_chat=options.chat,
        mean_think_s=options.think_time_s,
        seed=options.seed,
    )
    return _Draft(sessions[:count], sessions[count:], config)


def _check_combination(options: argparse.Namespace) -> None:
    """Refuses options that would have no effect or contradict each other."""
    is_text = options.prompt is not None or options.prompts is not None
    is_trace = options.trace is not None
    sources = [options.prompt, options.prompts, options.trace]
    is_open = is_trace or options.rate is not None
    has_prefix = options.prefix_groups is not None
    rules = [
        (sum(source is not None for source in sources) > 1, "give one of --prompt, --prompts and "
         "--trace"),
        (is_trace and options.rate is not None, "--trace has arrivals of its own; use "
         "--trace-scale instead of --rate"),
        (not is_trace and options.trace_scale != 1.0, "--trace-scale needs --trace"),
        (options.rate is None and options.arrivals is not None, "--arrivals needs --rate"),
        (options.burstiness is not None and options.arrivals != Arrivals.BURSTY,
         "--burstiness needs --arrivals bursty"),
        (is_open and options.concurrency is not None, "--concurrency is for closed loops; an "
         "open loop takes --max-outstanding"),
        (not is_open and options.max_outstanding is not None, "--max-outstanding needs --rate or "
         "--trace; a closed loop takes --concurrency"),
        (has_prefix != (options.prefix_len is not None), "--prefix-groups and --prefix-len need "
         "each other"),
        (has_prefix and (is_text or is_trace), "--prefix-groups is for random prompts"),
        (options.input_len is not None and (is_text or is_trace), "--input-len is for random "
         "prompts"),
        (is_trace and options.turns > 1, "a --trace has no --turns"),
        (options.prompt is not None and options.turns > 1, "--turns needs --prompts or random "
         "prompts"),
        (options.think_time_s > 0 and options.turns == 1, "--think-time-s needs --turns"),
        (options.chat and not is_text, "--chat needs --prompt or --prompts"),
        (is_text and options.turns > 1 and not options.chat, "the --turns of --prompts are chat "
         "messages; add --chat"),
        (options.max_prompt_chars is not None and options.prompts is None, "--max-prompt-chars "
         "needs --prompts"),
        (options.openai is not None and not is_text and options.turns > 1, "servers of OpenAI's "
         "API do not return token ids, so that --turns needs --prompts and --chat there"),
        (options.openai is not None and options.cache_salt, "OpenAI's API has no --cache-salt"),
    ]  # fmt: skip
    for is_broken, message in rules:
        if is_broken:
            raise CommandError(message)


def _check_lengths(sessions: Sequence[Session], limits: ServerLimits) -> None:
    """Refuses prompts of token ids that the server would refuse."""
    if limits.max_model_len is None:
        return
    for session in sessions:
        if not isinstance(session.turns[0].prompt[0], int):
            continue
        input_len = sum(len(turn.prompt) for turn in session.turns)
        output_len = sum(turn.sampling_params.max_tokens or 0 for turn in session.turns)
        if input_len + output_len > limits.max_model_len:
            raise CommandError(
                f"{input_len} prompt tokens and {output_len} output tokens exceed the model's "
                f"length of {limits.max_model_len} tokens; make prompts or outputs shorter"
            )


def _file(path: Path) -> dict[str, str]:
    return {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
