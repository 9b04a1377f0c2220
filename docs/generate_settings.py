"""Writes docs/settings.md from the settings that the services define.

python -m docs.generate_settings
"""

import typing
from pathlib import Path

from docs.tables import markdown_table
from executor_service.settings import ExecutorSettings
from nanovllm.service_settings import ServiceSettings
from scheduler_service.settings import SchedulerSettings

DOCUMENT = Path(__file__).with_name("settings.md")

_TEXT = """\
# Settings

Written by `make docs` from the definitions in the code; `--help` of each service says the same.

The command line wins over the environment, which wins over the default. Addresses are HOST:PORT or
unix:/path. `--[no-]name` takes no value; its variable is `true` or `false`. Names that end in `-s`
are in seconds. [operations.md](operations.md#tuning) says which setting to change for what,
[security.md](security.md) explains those for TLS and tokens.

## Settings of `executor_service`

{executor}

## Settings of `scheduler_service`

{scheduler}
"""


def document() -> str:
    """The text of docs/settings.md."""
    return _TEXT.format(executor=_table(ExecutorSettings), scheduler=_table(SchedulerSettings))


def _table(settings_class: type[ServiceSettings]) -> str:
    prefix = settings_class.model_config["env_prefix"]
    rows = []
    for name, field in settings_class.model_fields.items():
        flag = name.replace("_", "-")
        meaning = field.description or ""
        if field.annotation is bool:
            flag = f"[no-]{flag}"
        if typing.get_origin(field.annotation) is typing.Literal:
            meaning += f" One of {', '.join(typing.get_args(field.annotation))}."
        default = "" if field.default is None else f"`{field.default}`"
        rows.append((f"`--{flag}`", f"`{prefix}{name.upper()}`", default, meaning))
    return markdown_table(("option", "environment variable", "default", "meaning"), rows)


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
