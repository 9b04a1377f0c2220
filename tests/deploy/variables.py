"""The environment variables that the services and the command `nanovllm` really read."""

import argparse
import re
from typing import Any

from executor_service.settings import ExecutorSettings
from nanovllm.cli.connection import add_connection
from nanovllm.service_settings import ServiceSettings
from scheduler_service.settings import SchedulerSettings

VARIABLE = re.compile(r"NANOVLLM_[A-Z0-9_]+")
SERVICES: dict[str, type[ServiceSettings]] = {
    "executor": ExecutorSettings,
    "scheduler": SchedulerSettings,
}


def prefix(service: str) -> str:
    return SERVICES[service].model_config["env_prefix"]


def setting_variables(service: str) -> dict[str, str]:
    """Variables of a service's settings, with the names of their fields."""
    return {prefix(service) + name.upper(): name for name in SERVICES[service].model_fields}


def real_variables() -> set[str]:
    """Every variable that some program of this repository reads."""
    parser = argparse.ArgumentParser()
    add_connection(parser)
    client = set(VARIABLE.findall(parser.format_help()))
    settings = {name for service in SERVICES for name in setting_variables(service)}
    # The folder of converted models, see nanovllm/model_store.py.
    return client | settings | {"NANOVLLM_CACHE"}


def default(service: str, field: str) -> Any:
    """The default of a service's setting."""
    return SERVICES[service].model_fields[field].default


def settings_of(service: str, environment: dict[str, str]) -> dict[str, object]:
    """Fields that an environment sets, with validated values. Raises pydantic's ValidationError."""
    fields = setting_variables(service)
    given = {fields[name]: value for name, value in environment.items() if name in fields}
    validated = SERVICES[service].model_validate(given)
    return {name: getattr(validated, name) for name in given}


def port(address: object) -> int:
    return int(str(address).rpartition(":")[2])
