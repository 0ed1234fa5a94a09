#!/usr/bin/env python3
"""The three dashboards of tsdiff, as code: fleet -> entity -> channel, and the service itself.

    python deploy/grafana/dashboards.py

writes `dashboards/{fleet,entity,service}.json` beside this file, which Grafana 11 and newer read
from disk (`provisioning/`). Needs grafana-foundation-sdk, which is part of the extra `test`.
"""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from entity import entity
from fleet import fleet
from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from service import service

FOLDER: Final = Path(__file__).resolve().parent / "dashboards"

DASHBOARDS: Final[Mapping[str, Callable[[], Dashboard]]] = {
    "fleet": fleet,
    "entity": entity,
    "service": service,
}


def rendered() -> dict[str, str]:
    """The JSON of each dashboard, by the name of its file."""
    encoder = JSONEncoder(sort_keys=True, indent=2)
    texts = {f"{name}.json": encoder.encode(make().build()) for name, make in DASHBOARDS.items()}
    # Through json once more: enums are written as what they stand for, whatever Python this is.
    return {
        name: json.dumps(json.loads(text), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        for name, text in texts.items()
    }


def main() -> int:
    """Write the files."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in rendered().items():
        (FOLDER / name).write_text(text, "utf-8")
        print(FOLDER / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
