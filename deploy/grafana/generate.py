"""Writes the dashboards' JSON, which Grafana loads and the repository keeps.

python -m deploy.grafana.generate
"""

import json
from collections.abc import Callable
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.engine import engine
from deploy.grafana.serving import serving

FOLDER = Path(__file__).parent / "dashboards"
DASHBOARDS: dict[str, Callable[[], Dashboard]] = {"serving": serving, "engine": engine}


def to_json(dashboard: Dashboard) -> str:
    """The dashboard as a file's content."""
    return json.dumps(dashboard, cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def main() -> None:
    """Writes every dashboard."""
    FOLDER.mkdir(exist_ok=True)
    for name, build in DASHBOARDS.items():
        (FOLDER / f"{name}.json").write_text(to_json(build()), encoding="utf-8")


if __name__ == "__main__":
    main()
