"""Prints the requirements of this package and some of its extras, one a line.

An image installs them in a layer of their own, which a change of the code leaves alone:

    requirements.py EXTRA... [--without NAME]...

Reads pyproject.toml in the working directory. Needs nothing but Python.
"""

import argparse
import re
import tomllib
from pathlib import Path


def requirements(project: dict, extras: list[str], without: list[str]) -> list[str]:
    """Returns the requirements of a `[project]` table with `extras`, less those named `without`.

    Raises:
        ValueError: There is no such extra, or nothing of a name to leave out.
    """
    optional = project.get("optional-dependencies", {})
    if unknown := [extra for extra in extras if extra not in optional]:
        raise ValueError(f"no extra {', '.join(unknown)}; there are {', '.join(optional)}")
    wanted = [*project["dependencies"], *(line for extra in extras for line in optional[extra])]
    if missing := [name for name in without if name not in map(_name, wanted)]:
        raise ValueError(f"nothing requires {', '.join(missing)}; leave out --without")
    return list(dict.fromkeys(line for line in wanted if _name(line) not in without))


def _name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    if match is None:
        raise ValueError(f"{requirement!r} is no requirement")
    return match.group()


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description="Prints requirements from pyproject.toml.")
    parser.add_argument("extras", nargs="*", metavar="EXTRA")
    parser.add_argument("--without", action="append", default=[], metavar="NAME")
    options = parser.parse_args()
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    try:
        lines = requirements(project, options.extras, options.without)
    except ValueError as error:
        parser.error(str(error))
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
