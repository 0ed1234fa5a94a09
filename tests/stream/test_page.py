"""The page: what it answers over HTTP, and how it behaves in a real Chromium."""

import gzip
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from prometheus_client import CollectorRegistry

from stream.compose import load_model, recent_of
from stream.config import load_config
from stream.decide import AlertPolicy
from stream.demo import service_config
from stream.embedded import EmbeddedBroker, EmbeddedService, ReadingsThread
from stream.http import Guard, Health, MetricsServer
from stream.metrics import ServiceMetrics
from stream.recent import Layout, Recent
from stream.records import AlertEvent, ChannelScore, SlotScore, State
from stream.web import MISSING, charts
from stream.web import Page as Site
from tests.conftest import require_program
from tests.stream.conftest import SmallBundle
from tests.stream.test_http import WORD, ask, basic
from tsdiff.history import EntityHistory

MINUTE = 60_000
NOON = 1_795_435_200_000 // MINUTE  # 2026-11-23 12:00 UTC, as a slot
CHANNELS = ("cpu", "mem", "disk_w")
HTML = "text/html,application/xhtml+xml,*/*;q=0.8"
# Names that would be markup, script, a path or a template, if they were ever more than text.
HOSTILE = (
    "<img src=x onerror=\"document.title='owned'\">",
    "</script><script>document.title='owned'</script>",
    "a/../b?c=d&e#f%2e",
    "${document.title='owned'}",
    "\"quoted\" 'twice' `thrice` \\ \u202e\u2028",
    "名前 🔥",
)
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class Shown:
    """A server with a page, and what it shows put in by hand."""

    def __init__(
        self,
        *,
        port: int = 0,
        channels: Sequence[str] = CHANNELS,
        max_entities: int = 100,
        guard: Guard | None = None,
    ) -> None:
        self.channels = tuple(channels)
        layout = Layout(self.channels, ("%", *("",) * (len(channels) - 1)), MINUTE)
        self.recent = Recent(layout, AlertPolicy(), max_entities=max_entities, ttl_s=900.0)
        self.metrics = ServiceMetrics(
            CollectorRegistry(), channels=channels, max_entities=9, top_channels=2, entity_ttl_s=9
        )
        self.metrics.model_info("fleet@0123456789ab", period_ms=MINUTE, window=16)
        self.health = Health()
        self.health.set_ready(None)
        site = Site(self.recent, self.metrics, self.health)
        self.server = MetricsServer(
            f"127.0.0.1:{port}", CollectorRegistry(), self.health, guard, site=site
        )

    def score(self, entity: str, slot: int, number: float, state: State = "ok") -> SlotScore:
        cells = {
            n: ChannelScore(9.0, 2.0, 1.0, 3.0, 1 / (i + 2)) for i, n in enumerate(self.channels)
        }
        return SlotScore(entity, slot * MINUTE, number, 1e-6, state, 0.0, "m@0", cells)

    def put(self, entity: str, slot: int, number: float, state: State = "ok") -> None:
        score = self.score(entity, slot, number, state)
        alerts = []
        if state == "firing":
            alerts = [
                AlertEvent(
                    entity,
                    slot * MINUTE,
                    state,
                    "ok",
                    0,
                    number,
                    score.channels,
                    "m@0",
                    summary=f"cpu on {entity} is off",
                )
            ]
        self.recent.observe([score], alerts)
        self.metrics.entities({state: 1})


@contextmanager
def shown(**settings: Any) -> Iterator[Shown]:  # noqa: ANN401
    made = Shown(**settings)
    with made.server:
        yield made


# -- over HTTP ---------------------------------------------------------------------------------


def test_browsers_get_the_page_and_others_the_text() -> None:
    with shown() as made:
        status, headers, body = ask(made.server, "/", Accept=HTML)
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert b"<title>tsdiff</title>" in body
        for accept in ("*/*", "text/plain", ""):
            status, headers, body = ask(made.server, "/", Accept=accept)
            assert headers["Content-Type"] == "text/plain; charset=utf-8"
            assert b"/metrics" in body
            assert b"the page, in a browser" in body


def test_nothing_from_elsewhere_and_no_script_inside() -> None:
    with shown() as made:
        for path in ("/", "/page/page.js", "/page/page.css", "/page/icon.svg", "/api/overview"):
            _, headers, body = ask(made.server, path, Accept=HTML)
            policy = headers["Content-Security-Policy"]
            assert "default-src 'none'; script-src 'self';" in policy
            assert "frame-ancestors 'none'" in policy
            assert "unsafe-eval" not in policy
            assert headers["X-Content-Type-Options"] == "nosniff"
            allowed = body.replace(b"http://www.w3.org/2000/svg", b"")
            assert b"http://" not in allowed
            assert b"https://" not in allowed
            assert b"innerHTML" not in body
        assert ask(made.server, "/", Accept=HTML)[2].count(b"<script") == 1


def test_only_files_of_the_page_are_served() -> None:
    with shown() as made:
        for path in (
            "/page/",
            "/page/../config.py",
            "/page/%2e%2e/http.py",
            "/page/none.js",
            "/api/",
        ):
            assert ask(made.server, path, Accept=HTML)[0] == 404
        status, headers, body = ask(made.server, "/page/page.js", Accept_Encoding="gzip")
        assert (status, headers["Content-Encoding"]) == (200, "gzip")
        assert b"textContent" in gzip.decompress(body)
        again = ask(made.server, "/page/page.js", If_None_Match=headers["ETag"])
        assert (again[0], again[2]) == (304, b"")
        assert ask(made.server, "/api/overview", "POST")[0] == 405


def test_the_charts_are_those_of_the_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with shown() as made:
        status, _, body = ask(made.server, "/page/plotly.min.js")
        assert (status, body[:200].count(b"plotly.js v")) == (200, 1)
    charts.cache_clear()
    monkeypatch.setattr("stream.web.find_spec", lambda _: None)
    try:
        with shown() as made:
            made.put("web-1", NOON, 0.3)
            assert MISSING in ask(made.server, "/")[2].decode()
            overview = json.loads(ask(made.server, "/api/overview")[2])
            assert overview["service"]["charts"] is False
    finally:
        charts.cache_clear()


def test_what_the_page_shows_as_json() -> None:
    with shown() as made:
        made.put("web-1", NOON, 0.3)
        made.put("web-2", NOON, 1.4, "firing")
        made.metrics.readings(7)
        made.metrics.dead_letter("not_json", 2)
        found = json.loads(ask(made.server, "/api/overview?most=1&match=WEB")[2])
        assert [row["entity"] for row in found["entities"]] == ["web-2"]
        assert (found["matching"], found["kept"]) == (2, 2)
        assert found["events"][0]["summary"] == "cpu on web-2 is off"
        service = found["service"]
        assert (service["readings"], service["dead_letters"]) == (7, 2)
        assert (service["model"], service["not_ready"]) == ("fleet@0123456789ab", None)
        assert service["entities"]["firing"] == 1
        found = json.loads(ask(made.server, "/api/entity?name=web-2")[2])
        assert found["state"] == "firing"
        assert found["scores"][-1] == 1.4
        assert found["states"][-1] == {"from_ms": NOON * MINUTE, "state": "firing"}
        assert "cpu" in found["summary"]
        seen = found["timestamp_ms"]
        assert json.loads(ask(made.server, f"/api/entity?name=web-2&seen={seen}")[2])["unchanged"]
        status, _, body = ask(made.server, "/api/entity?name=nobody")
        assert (status, json.loads(body)["error"]) == (
            404,
            "no scores of this entity are kept here",
        )
        for bad in ("/api/overview?most=x", "/api/overview?most=-1", "/api/overview?most=9999999"):
            assert ask(made.server, bad)[0] == 400


def test_whoever_may_not_see_the_metrics_sees_no_page() -> None:
    with shown(guard=Guard(user="prometheus", password=WORD)) as made:
        made.put("secret-host", NOON, 0.3)
        for path in ("/", "/page/page.js", "/api/overview", "/api/entity?name=secret-host"):
            status, _, body = ask(made.server, path, Accept=HTML)
            assert (status, b"secret" in body) == (401, False)
            right = basic("prometheus", WORD)
            assert ask(made.server, path, Accept=HTML, Authorization=right)[0] == 200


def test_the_page_can_be_turned_off(small_bundle: SmallBundle) -> None:
    model = load_model(small_bundle.path, ((8, 4),))
    for settings, there in (
        ({}, True),
        ({"metrics.page": False}, False),
        ({"metrics.listen": ""}, False),
    ):
        config = load_config(None, {"model.path": "b", "input.topic": "t", **settings})
        assert (recent_of(model, config) is not None) is there
    with MetricsServer("127.0.0.1:0", CollectorRegistry(), Health()) as server:
        status, headers, body = ask(server, "/", Accept=HTML)
        assert (status, headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
        assert b"browser" not in body
        assert ask(server, "/api/overview")[0] == 404


# -- in a browser ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    path = require_program("chromium", "chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()


class Tab:
    """A tab that remembers whatever went wrong in it."""

    def __init__(self, browser: Browser, **settings: Any) -> None:  # noqa: ANN401
        self.page: Page = browser.new_context(**settings).new_page()
        self.wrong: list[str] = []
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on(
            "console",
            lambda m: self.wrong.append(m.text) if m.type in ("error", "warning") else None,
        )

    def rows(self) -> list[str]:
        return self.page.locator(".rows .name").all_inner_texts()

    def wait(self, condition: Callable[[], bool], seconds: float = 15.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.page.inner_text("body")[:2000]
            self.page.wait_for_timeout(50)


@pytest.fixture
def open_tab(chromium: Browser) -> Iterator[Callable[..., Tab]]:
    with ExitStack() as stack:

        def make(**settings: Any) -> Tab:  # noqa: ANN401
            tab = Tab(chromium, **settings)
            stack.callback(tab.page.context.close)
            return tab

        yield make


OpenTab = Callable[..., Tab]


def fill(made: Shown, names: Sequence[str], slots: int = 30) -> None:
    for slot in range(NOON, NOON + slots):
        made.recent.observe(
            [made.score(name, slot, 0.2 + i / (10 * len(names))) for i, name in enumerate(names)]
        )


def test_one_click_from_the_list_to_an_entity_and_back_by_keyboard(open_tab: OpenTab) -> None:
    with shown() as made:
        fill(made, ["web-1", "web-2", "web-3"])
        made.put("web-2", NOON + 30, 1.4, "firing")
        tab = open_tab()
        page = tab.page
        page.goto(made.server.url)
        tab.wait(lambda: tab.rows() == ["web-2", "web-3", "web-1"])
        assert page.locator(".spark path").count() == 3
        assert "ready" in page.inner_text("#service")
        assert "cpu on web-2 is off" in page.inner_text(".events")
        page.click("text=web-2")
        page.wait_for_selector(".score .main-svg")
        assert "channel implies" in page.inner_text(".sentence") or "cpu" in page.inner_text(
            ".sentence"
        )
        assert page.inner_text("h1") == "web-2"
        assert page.locator("figcaption .name").all_inner_texts() == [
            "anomaly score",
            "cpu (%)",
            "mem",
            "disk_w",
        ]
        assert "firing" in page.inner_text("main")
        page.keyboard.press("Escape")
        page.wait_for_selector(".rows a")
        page.keyboard.press("j")
        page.keyboard.press("ArrowDown")
        assert page.evaluate("document.activeElement.dataset.key") == "web-3"
        # The list is filled again every two seconds, and the keyboard stays where it was.
        page.wait_for_timeout(2500)
        assert page.evaluate("document.activeElement.dataset.key") == "web-3"
        page.keyboard.press("Enter")
        page.wait_for_selector("h1")
        page.go_back()
        page.wait_for_selector(".rows a")
        page.keyboard.press("/")
        page.keyboard.type("web-1")
        tab.wait(lambda: tab.rows() == ["web-1"])
        assert tab.wrong == []


def test_it_is_live_without_a_reload(open_tab: OpenTab) -> None:
    with shown() as made:
        fill(made, ["web-1"])
        tab = open_tab()
        tab.page.goto(f"{made.server.url}/#/entity/web-1")
        tab.wait(lambda: "Nothing unusual on web-1" in tab.page.inner_text(".sentence"))
        made.put("web-1", NOON + 30, 1.4, "firing")
        tab.wait(lambda: "unusual since 12:30 UTC" in tab.page.inner_text(".sentence"))
        assert tab.page.inner_text(".state.firing >> nth=0") == "firing"
        assert tab.wrong == []


def test_light_and_dark_by_preference_and_by_choice(open_tab: OpenTab) -> None:
    def ground(page: Page) -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    with shown() as made:
        fill(made, ["web-1"])
        light, dark = open_tab(color_scheme="light"), open_tab(color_scheme="dark")
        for tab in (light, dark):
            tab.page.goto(made.server.url)
            tab.page.wait_for_selector(".rows a")
        day, night = ground(light.page), ground(dark.page)
        assert day != night
        light.page.click("#theme")
        assert ground(light.page) == night
        light.page.reload()
        light.page.wait_for_selector(".rows a")
        assert ground(light.page) == night
        light.page.click("#theme")
        assert ground(light.page) == day
        assert light.wrong == dark.wrong == []


def test_a_phone_shows_all_of_it(open_tab: OpenTab) -> None:
    with shown(channels=("a_channel_with_a_very_long_name" * 4, "b")) as made:
        fill(made, ["an-entity-with-a-very-long-name" * 5, "web-1"])
        tab = open_tab(viewport={"width": 360, "height": 700}, has_touch=True)
        for path in ("/", "/#/entity/" + "an-entity-with-a-very-long-name" * 5):
            tab.page.goto(made.server.url + path)
            tab.page.wait_for_selector(".rows a, .main-svg")
            wide = tab.page.evaluate("document.documentElement.scrollWidth")
            assert wide <= 360, path
        assert tab.wrong == []


def test_hostile_names_are_text(open_tab: OpenTab) -> None:
    with shown(channels=HOSTILE) as made:
        fill(made, HOSTILE, 3)
        for name in HOSTILE:
            made.put(name, NOON + 3, 1.4, "firing")
        tab = open_tab()
        tab.page.goto(made.server.url)
        tab.wait(lambda: len(tab.rows()) == len(HOSTILE))
        shown_names = tab.page.locator(".rows .name").evaluate_all("all => all.map(x => x.title)")
        assert set(shown_names) == set(HOSTILE)
        for name in HOSTILE:
            tab.page.locator(".rows a").nth(shown_names.index(name)).click()
            tab.page.wait_for_selector(".charts .main-svg")
            assert tab.page.locator("h1").evaluate("node => node.textContent") == name
            assert tab.page.locator("main img").count() == 0
            assert tab.page.title().endswith("– tsdiff")
            tab.page.keyboard.press("Escape")
            tab.page.wait_for_selector(".rows a")
        assert tab.wrong == []


def test_ten_thousand_entities_stay_usable(open_tab: OpenTab) -> None:
    names = [f"host-{i:05d}" for i in range(10_000)]
    with shown(max_entities=10_000) as made:
        fill(made, names, 5)
        begun = time.monotonic()
        body = ask(made.server, "/api/overview?most=9999")[2]
        assert time.monotonic() - begun < 2.0
        assert len(body) < 400_000
        assert len(json.loads(body)["entities"]) == 200
        tab = open_tab()
        begun = time.monotonic()
        tab.page.goto(made.server.url)
        tab.wait(lambda: len(tab.rows()) == 50)
        assert time.monotonic() - begun < 10.0
        assert tab.rows()[0] == "host-09999"
        assert "50 of 10,000" in tab.page.inner_text(".tools")
        tab.page.fill("input", "00042")
        tab.wait(lambda: tab.rows() == ["host-00042"])
        tab.page.fill("input", "")
        tab.page.click("text=show more")
        tab.wait(lambda: len(tab.rows()) == 200)
        assert tab.wrong == []


def test_without_the_charts_the_page_says_what_to_install(
    open_tab: OpenTab, monkeypatch: pytest.MonkeyPatch
) -> None:
    charts.cache_clear()
    monkeypatch.setattr("stream.web.find_spec", lambda _: None)
    try:
        with shown() as made:
            fill(made, ["web-1"])
            tab = open_tab()
            tab.page.goto(f"{made.server.url}/#/entity/web-1")
            tab.wait(lambda: "pip install 'tsdiff[page]'" in tab.page.inner_text("main"))
            assert "Nothing unusual" in tab.page.inner_text(".sentence")
            assert tab.wrong == []
    finally:
        charts.cache_clear()


def test_it_reconnects_by_itself_when_the_service_is_started_anew(open_tab: OpenTab) -> None:
    tab = open_tab()
    with shown() as made:
        fill(made, ["web-1"])
        port = made.server.port
        tab.page.goto(made.server.url)
        tab.wait(lambda: tab.rows() == ["web-1"])
    tab.wait(lambda: "No answer since" in tab.page.inner_text("#trouble"))
    assert tab.rows() == ["web-1"]  # what was there stays to be read
    with shown(port=port) as made:
        fill(made, ["web-1", "web-2"])
        tab.wait(lambda: tab.rows() == ["web-2", "web-1"])
        assert tab.page.locator("#trouble").is_hidden()
    # The refused connections are the browser's own words, none of them is ours.
    assert all("net::ERR" in text for text in tab.wrong)


# -- of a real service -------------------------------------------------------------------------


class Feed(ReadingsThread):
    """Sends slots of one server, one after the other, as far as it is told to."""

    def __init__(
        self, broker: EmbeddedBroker, history: EntityHistory, names: Sequence[str]
    ) -> None:
        super().__init__(broker, "telemetry")
        self._history, self._names = history, names
        self.until = 0
        self.fault = 0.0

    def feed(self) -> None:
        sent = 0
        while not self._stopping.wait(0.02):
            while sent < self.until:
                row = self._history.values[sent].astype(float)
                row[0] += self.fault
                values = dict(zip(self._names, row.tolist(), strict=True))
                self.send("live", int(self._history.timestamps_ms[sent]), values)
                sent += 1


def test_a_fault_of_a_moment_ago_is_shown_and_history_outlives_a_restart(
    open_tab: OpenTab, small_bundle: SmallBundle
) -> None:
    # Under a name of its own it is a newcomer; it has to be one that the model knows.
    known = small_bundle.trained.entities[0].entity
    history = next(e for e in small_bundle.live.entities if e.entity == known)
    model = load_model(small_bundle.path, ((8, 4),))
    with EmbeddedBroker() as broker, ExitStack() as stack:
        config = service_config(broker, small_bundle.path, "127.0.0.1:0", lateness_ms=0)
        broker.create_topics(config)
        feed = stack.enter_context(Feed(broker, history, model.detector.channels))
        feed.send = lambda _, *rest: ReadingsThread.send(feed, known, *rest)  # type: ignore[method-assign]
        with EmbeddedService(config, model, print) as service:
            tab = open_tab()
            feed.until = 120
            tab.wait(lambda: bool(service.url), 60)
            port = service.url.rpartition(":")[2]
            tab.page.goto(service.url)
            tab.wait(lambda: tab.rows() == [known], 60)
            tab.page.click(f"text={known}")
            tab.page.wait_for_selector(".charts .main-svg")
            feed.fault = 500.0
            feed.until = 126
            tab.wait(lambda: "firing" in tab.page.inner_text(".head"), 30)
            said = tab.page.inner_text(".sentence")
            assert model.detector.channels[0] in said
            assert "usual error above what" in said
        # Started anew at the same address, it is there again, with some of its past.
        metrics = config.metrics.model_copy(update={"listen": f"127.0.0.1:{port}"})
        config = config.model_copy(update={"metrics": metrics})
        with EmbeddedService(config, model, print):
            feed.until = 128
            tab.wait(
                lambda: (
                    "scores since" in tab.page.inner_text("main")
                    and tab.page.locator("#trouble").is_hidden()
                ),
                60,
            )
            tab.wait(lambda: "firing" in tab.page.inner_text(".head"), 30)
