"""The Helm chart, rendered: what a cluster would be given.

    python -m tests.deploy.chart

needs helm, and writes `rendered.yaml` beside this file, so that machines without helm check the
manifests all the same. Its first line says of which chart it was made.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import ROOT

CHART = ROOT / "deploy" / "helm" / "tsdiff"
RENDERED = Path(__file__).parent / "rendered.yaml"
# Whatever cluster helm may be near, the manifests are for this one.
KUBERNETES = "1.33.0"
VALUES = ("claim", "full")

Manifest = dict[str, Any]


def fingerprint() -> str:
    """Tell one state of the chart from another."""
    files = sorted(path for path in CHART.rglob("*") if path.is_file())
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(CHART).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def helm(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run helm, which must be in PATH; the caller looks at how it went."""
    program = shutil.which("helm")
    assert program is not None
    with tempfile.TemporaryDirectory() as empty:
        # No configuration of whoever runs this.
        homes = {f"HELM_{name}_HOME": empty for name in ("CONFIG", "CACHE", "DATA")}
        return subprocess.run(
            [program, *arguments],
            check=False,
            capture_output=True,
            text=True,
            env={**os.environ, **homes},
        )


def template(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Render the chart as the release "demo"."""
    where = ["--namespace", "monitor", "--kube-version", KUBERNETES]
    return helm("template", "demo", str(CHART), *where, *arguments)


def render() -> str:
    """Everything that the values of `ci/` give, one set after the other."""
    parts = [f"# chart {fingerprint()}; python -m tests.deploy.chart\n"]
    for name in VALUES:
        answer = template("--values", str(CHART / "ci" / f"{name}-values.yaml"))
        assert answer.returncode == 0, answer.stderr
        parts.append(f"# with ci/{name}-values.yaml\n{answer.stdout}")
    return "".join(parts)


def manifests(text: str) -> dict[str, list[Manifest]]:
    """The manifests by the name of the values that they were rendered with."""
    found: dict[str, list[Manifest]] = {}
    for part in text.split("# with ci/")[1:]:
        name = part.split("-values.yaml", 1)[0]
        documents = yaml.safe_load_all(part.split("\n", 1)[1])
        found[name] = [document for document in documents if document]
    return found


if __name__ == "__main__":
    if shutil.which("helm") is None:
        sys.exit("error: expected helm in PATH, found none")
    RENDERED.write_text(render(), "utf-8")
