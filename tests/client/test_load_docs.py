"""docs/benchmarking.md and `nanovllm bench` speak of the same options."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from nanovllm.cli import bench
from nanovllm.load.arrivals import Arrivals

DOCUMENT = (Path(__file__).parents[2] / "docs/benchmarking.md").read_text(encoding="utf-8")
_SHELL = "".join(re.findall(r"^```sh\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL))
COMMANDS = [
    line for line in _SHELL.replace("\\\n", " ").splitlines() if line.startswith("nanovllm")
]
#: Options of other commands that the document names.
FOREIGN = {"--max-queued-requests"}


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser()
    bench.add_command(root.add_subparsers())
    return root


def own_options(parser: argparse.ArgumentParser) -> set[str]:
    """Options of the command, without those of every command that connects."""
    (subparsers,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return {
        option
        for group in subparsers.choices["bench"]._action_groups
        if group.title in {"load", "workload", "other servers", "report"}
        for action in group._group_actions
        for option in action.option_strings
    }


def test_every_option_is_explained_and_every_explained_option_exists(parser):
    explained = set(re.findall(r"--[a-z][a-z-]+", DOCUMENT)) - FOREIGN
    options = own_options(parser)
    assert len(options) > 20
    assert explained - options == set()
    # What a name and a help line explain fully.
    assert options - explained == {"--temperature"}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_example_is_accepted(parser, command):
    assert parser.parse_args(shlex.split(command)[1:]).run


def test_every_arrival_process_is_explained():
    for kind in Arrivals:
        assert re.search(rf"^\| `{kind}`", DOCUMENT, re.MULTILINE), kind


def test_contents_list_every_heading():
    headings = re.findall(r"^## (.*)$", DOCUMENT, re.MULTILINE)
    assert re.findall(r"^- \[(.*?)\]\(#", DOCUMENT, re.MULTILINE) == headings
