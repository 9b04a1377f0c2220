"""`nanovllm models`: the embedded models and the cache."""

import argparse
from typing import TYPE_CHECKING

from nanovllm.model_store import list_models, resolve_model

if TYPE_CHECKING:
    from nanovllm.cli.options import Commands

MEGABYTE = 1_000_000


def add_command(commands: "Commands") -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "models",
        help="list, fetch and locate models",
        description="Lists the embedded models, fetches a model, or says where its files are.",
    )
    parser.set_defaults(run=_list)
    actions = parser.add_subparsers(title="actions", metavar="ACTION")
    actions.add_parser("list", help="embedded models (the default)").set_defaults(run=_list)
    for action, text in (
        ("fetch", "download and convert a model unless it is there, then print its directory"),
        ("path", "print the directory of a model, fetching it if need be, and nothing else"),
    ):
        action_parser = actions.add_parser(action, help=text, description=text.capitalize() + ".")
        action_parser.add_argument("name", help="embedded model, hub id or directory")
        action_parser.set_defaults(run=_fetch if action == "fetch" else _path)


def _list(options: argparse.Namespace) -> int:
    for model in list_models():
        size = f"{model.size_bytes / MEGABYTE:.0f} MB"
        if model.cached:
            state = f"cached    {size} in {model.path}"
        else:
            state = f"to fetch  {model.download_bytes / MEGABYTE:.0f} MB, then {size} on disk"
        print(f"{model.name}  {model.license}  {state}")
    print("Any Hugging Face hub id or model directory works too, for example Qwen/Qwen3-0.6B.")
    return 0


def _fetch(options: argparse.Namespace) -> int:
    print(f"{options.name} is in {resolve_model(options.name)}")
    return 0


def _path(options: argparse.Namespace) -> int:
    print(resolve_model(options.name))
    return 0
