"""Command line options that several commands share."""

import argparse
from typing import TYPE_CHECKING, TypeAlias

from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


class CommandError(Exception):
    """A command cannot do what it was asked to; the message is for the user."""


def add_timeout(parser: argparse.ArgumentParser) -> None:
    """Adds --timeout-s."""
    parser.add_argument(
        "--timeout-s", type=positive_float, metavar="S", help="limit per request in seconds"
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `sampling_params` reads."""
    group = parser.add_argument_group("sampling", "Defaults come from the model.")
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--min-p", type=float, metavar="P")
    group.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")
    group.add_argument("--max-tokens", type=int, metavar="N")
    group.add_argument("--min-tokens", type=int, metavar="N")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="repeatable")
    group.add_argument(
        "--stop-token-id", action="append", default=[], type=int, metavar="ID", help="repeatable"
    )
    group.add_argument("--ignore-eos", action="store_true", default=None)
    group.add_argument("--presence-penalty", type=float, metavar="X")
    group.add_argument("--frequency-penalty", type=float, metavar="X")
    group.add_argument("--repetition-penalty", type=float, metavar="X")


def sampling_params(
    options: argparse.Namespace, *, n: int | None = None, logprobs: int | None = None
) -> SamplingParams:
    """Returns what the options of `add_sampling` say.

    Raises:
        CommandError: An integer is too large for the wire.
    """
    try:
        return SamplingParams(
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            min_p=options.min_p,
            seed=options.seed,
            n=n,
            max_tokens=options.max_tokens,
            min_tokens=options.min_tokens,
            stop=options.stop,
            stop_token_ids=options.stop_token_id,
            ignore_eos=options.ignore_eos,
            presence_penalty=options.presence_penalty,
            frequency_penalty=options.frequency_penalty,
            repetition_penalty=options.repetition_penalty,
            logprobs=logprobs,
        )
    except ValueError as error:
        raise CommandError(str(error)) from error


def positive_int(text: str) -> int:
    """Reads a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def positive_float(text: str) -> float:
    """Reads a number above 0."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {value:g}")
    return value
