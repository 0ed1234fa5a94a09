"""The page: static files of ours, the charts' library where it is installed, and JSON for both.

/                     for browsers; whoever does not accept HTML gets the text index instead
/page/...             style, script, and plotly.min.js from the installed package
/api/overview         service, counts, the worst entities (?match=NAME, ?most=N), alerts of late
/api/entity?name=E    score, states, channels (?match=NAME); ?seen=TIMESTAMP_MS asks for news only

Read-only; `stream.http` has asked who it is before.
"""

import gzip
import hashlib
import time
from functools import cache
from http import HTTPStatus
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qs

import msgspec

from stream.http import Answer, Health
from stream.metrics import ServiceMetrics
from stream.recent import Recent
from stream.shown import entity, overview

_FOLDER = Path(__file__).parent / "page"
_CHARTS = "plotly.min.js"
_TYPES: Final = {
    "page.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
    _CHARTS: "text/javascript; charset=utf-8",
}
MISSING: Final = "charts need the extra page: pip install 'tsdiff[page]'"
# Nothing from elsewhere, no script inside of pages; Plotly lays out its charts by inline styles.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_COMMON = [
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Content-Security-Policy", POLICY),
    ("Vary", "Accept, Accept-Encoding"),
]
# Less than a packet is not worth packing.
_WORTH_GZIP = 1400
_LONGEST_NAME = 4096


class _File(NamedTuple):
    content: bytes
    packed: bytes
    etag: str


class Page:
    """Answers for the page; see `stream.http.Site`."""

    def __init__(self, recent: Recent, metrics: ServiceMetrics, health: Health) -> None:
        self._recent = recent
        self._metrics = metrics
        self._health = health
        self.index = "/            the page, in a browser\n/api/overview  what it shows, as JSON\n"
        if charts() is None:
            self.index += f"             {MISSING}\n"

    def answer(self, path: str, query: str, encodings: str, known: str) -> Answer | None:
        """Answer a GET, or say that nothing is here."""
        packs = "gzip" in encodings
        if path == "/":
            return _static("page.html", packs, known)
        if path.startswith("/page/"):
            return _static(path.removeprefix("/page/"), packs, known)
        given = {key: values[-1] for key, values in parse_qs(query, max_num_fields=9).items()}
        if path == "/api/overview":
            return self._overview(given, packs)
        if path == "/api/entity":
            return self._entity(given, packs)
        return None

    def _overview(self, given: dict[str, str], packs: bool) -> Answer:
        most = given.get("most", "50")
        if not most.isdecimal() or len(most) > 6:
            return _json({"error": "expected a number for most"}, packs, HTTPStatus.BAD_REQUEST)
        shown = overview(self._recent, given.get("match", "")[:_LONGEST_NAME], int(most))
        return _json({"service": self._service(), **shown}, packs)

    def _entity(self, given: dict[str, str], packs: bool) -> Answer:
        name, service = given.get("name", ""), self._service()
        if "seen" in given and given["seen"] == str(self._recent.newest_ms(name)):
            return _json({"unchanged": True, "service": service}, packs)
        shown = entity(self._recent, name, given.get("match", "")[:_LONGEST_NAME])
        if shown is None:
            text = "no scores of this entity are kept here"
            return _json({"error": text, "service": service}, packs, HTTPStatus.NOT_FOUND)
        return _json({"service": service, **shown}, packs)

    def _service(self) -> dict[str, Any]:
        return {
            "now_ms": round(time.time() * 1000),
            "not_healthy": self._health.unhealthy(),
            "not_ready": self._health.unready(),
            "charts": charts() is not None,
            **self._metrics.overview(),
        }


@cache
def charts() -> Path | None:
    """Find the charts' library in the installed package, without importing that."""
    spec = find_spec("plotly")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "package_data" / _CHARTS
    return path if path.is_file() else None


@cache
def _file(name: str) -> _File | None:
    """Read one of the few files that there are; a request never names a path."""
    if name not in _TYPES:
        return None
    path = charts() if name == _CHARTS else _FOLDER / name
    if path is None:
        return None
    content = path.read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:20]}"'
    return _File(content, gzip.compress(content, 6, mtime=0), etag)


def _static(name: str, packs: bool, known: str) -> Answer | None:
    file = _file(name)
    if file is None:
        return None
    # Kept, but asked for every time: another version may run by then.
    headers = [("Content-Type", _TYPES[name]), ("ETag", file.etag), ("Cache-Control", "no-cache")]
    headers += _COMMON
    if file.etag in known:
        return Answer(HTTPStatus.NOT_MODIFIED, headers, b"")
    if packs:
        return Answer(HTTPStatus.OK, [*headers, ("Content-Encoding", "gzip")], file.packed)
    return Answer(HTTPStatus.OK, headers, file.content)


def _json(record: dict[str, Any], packs: bool, status: HTTPStatus = HTTPStatus.OK) -> Answer:
    body = msgspec.json.encode(record)
    headers = [("Content-Type", "application/json"), ("Cache-Control", "no-store"), *_COMMON]
    if packs and len(body) > _WORTH_GZIP:
        headers.append(("Content-Encoding", "gzip"))
        body = gzip.compress(body, 1, mtime=0)
    return Answer(status, headers, body)
