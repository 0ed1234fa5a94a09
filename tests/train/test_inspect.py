"""`tsdiff inspect --data`: the right moment, the same scores as live, words and a picture."""

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.image import imread

from tests.train.simulated import PERIOD_MS, anchor_bundle, simulate
from train.inspection import (
    Series,
    choose_entity,
    inspect_moment,
    look,
    parse_moment,
    position_of,
    score_stretch,
    series_of,
    stretch_at,
    stretches,
)
from train.picture import save_picture
from tsdiff import cli
from tsdiff.bundle import save_bundle
from tsdiff.detector import Detector
from tsdiff.errors import ConfigError, HistoryError, TsdiffError
from tsdiff.history import EntityHistory, History
from tsdiff.series import SHAPES

NOON = 1_795_435_200_000  # 2026-11-23 12:00 UTC
SLOTS, FAULT = 900, slice(600, 620)


def readings(entity: int = 0) -> np.ndarray:
    """Held-out slots of a training entity; for twenty of them channel 1 stands too high."""
    values = simulate(900 + SLOTS, entity)[900:].copy()
    if entity == 0:
        values[FAULT, 1] += 25.0
    return values


def history_of(values: np.ndarray, entity: str = "e0", start_ms: int = NOON) -> EntityHistory:
    times = start_ms + PERIOD_MS * np.arange(len(values), dtype=np.int64)
    heard = np.isfinite(values).any(axis=1)
    return EntityHistory(entity, times[heard], values[heard])


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector(anchor_bundle(), shapes=SHAPES)


@pytest.fixture(scope="module")
def series(detector: Detector) -> Series:
    return series_of(detector, anchor_bundle(), history_of(readings()))


def at(slot: int) -> int:
    return NOON + slot * PERIOD_MS


# -- what is asked for -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-11-23T12:00:00Z", NOON),
        ("2026-11-23T13:00:00+01:00", NOON),
        (" 2026-11-23 12:00 ", NOON),
        ("2026-11-23T12:00:00.250Z", NOON + 250),
        (str(NOON), NOON),
        ("2092", 2092 * PERIOD_MS),
        ("0", 0),
    ],
)
def test_a_moment_can_be_given_in_several_ways(text: str, moment: int) -> None:
    assert parse_moment(text, PERIOD_MS) == moment


@pytest.mark.parametrize("text", ["yesterday", "", "-5", "12.5", "2026-13-01", "1" * 16])
def test_what_is_no_moment(text: str) -> None:
    with pytest.raises(ConfigError, match="expected --at as RFC 3339"):
        parse_moment(text, PERIOD_MS)


def test_which_entity() -> None:
    one = history_of(readings())
    several = History(("a",), tuple(replace(one, entity=f"web-{i}") for i in range(7)), ())
    assert choose_entity(replace(several, entities=(one,)), None) is one
    assert choose_entity(several, "web-3").entity == "web-3"
    with pytest.raises(ConfigError, match=r"holds 7: web-0, .*, web-4 and 2 more"):
        choose_entity(several, None)
    with pytest.raises(ConfigError, match=r"did you mean web-1\?"):
        choose_entity(several, "wbe-1")
    with pytest.raises(ConfigError, match="the history holds web-0"):
        choose_entity(several, "database")


def test_where_a_moment_is(series: Series) -> None:
    assert position_of(series, at(40) + 59_999, PERIOD_MS) == 40
    span = "from 2026-11-23 12:08 UTC to 2026-11-24 02:59 UTC"
    with pytest.raises(ConfigError, match=f"{span}.*got 2026-11-24 03:00 UTC$"):
        position_of(series, at(SLOTS), PERIOD_MS)
    with pytest.raises(ConfigError, match="12:07 UTC; the first 8 slots of a history"):
        position_of(series, at(7), PERIOD_MS)
    with pytest.raises(ConfigError, match=r"got 2026-11-23 11:59 UTC$"):
        position_of(series, at(-1), PERIOD_MS)


def test_a_moment_in_a_long_silence(detector: Detector) -> None:
    values = readings()
    values[300:500] = np.nan
    gap = series_of(detector, anchor_bundle(), history_of(values))
    with pytest.raises(ConfigError, match="in a silence that lasts until 2026-11-23 20:20 UTC"):
        position_of(gap, at(450), PERIOD_MS)
    assert gap.numbers[position_of(gap, at(505), PERIOD_MS)] == at(505) // PERIOD_MS


def test_a_history_that_is_too_short(detector: Detector) -> None:
    short = series_of(detector, anchor_bundle(), history_of(readings()[:8]))
    with pytest.raises(HistoryError, match="expected more than 8 slots of e0"):
        position_of(short, at(7), PERIOD_MS)


# -- scoring -----------------------------------------------------------------------------------


def test_a_stretch_has_the_scores_of_the_whole(detector: Detector, series: Series) -> None:
    whole = score_stretch(detector, series, series.first, SLOTS)
    part = score_stretch(detector, series, 500, 700)
    inside = slice(500 - series.first, 700 - series.first)
    np.testing.assert_allclose(part.anomaly_score, whole.anomaly_score[inside], rtol=1e-4)
    np.testing.assert_allclose(part.expected, whole.expected[inside], rtol=1e-4)
    assert len(part.contribution) == 200


def test_slots_without_readings_have_no_score(detector: Detector) -> None:
    values = readings()
    values[400:403] = np.nan
    values[450, :4] = np.nan
    scores = score_stretch(
        detector, series_of(detector, anchor_bundle(), history_of(values)), 390, 460
    )
    assert np.flatnonzero(np.isnan(scores.anomaly_score)).tolist() == [10, 11, 12]


def test_an_entity_never_seen_gets_its_own_statistics(detector: Detector) -> None:
    values = readings() * 3.0
    stranger = series_of(detector, anchor_bundle(), history_of(values, "new"))
    assert stranger.first == 256
    assert stranger.row == -1
    pooled, _ = detector.statistics(-1)
    own = values[:256].mean(0)
    assert (np.abs(stranger.mean - own) < np.abs(pooled - own) + 1e-3).all()


#                                   slots: 0    5    10   15   20   25
@pytest.mark.parametrize(
    ("picture", "found"),
    [
        (".....................", []),
        ("..###................", [(2, 5)]),
        ("#...................#", [(0, 1), (20, 21)]),
        ("..##.....##..........", [(2, 11)]),  # five calm slots between
        ("..##......##.........", [(2, 4), (10, 12)]),  # six
        ("..##?????##..........", [(2, 11)]),
    ],
)
def test_stretches(picture: str, found: list[tuple[int, int]]) -> None:
    values = {".": 0.5, "#": 1.5, "?": np.nan}
    assert stretches(np.array([values[slot] for slot in picture], np.float32)) == found


def test_which_stretch_a_moment_belongs_to() -> None:
    found = [(10, 20), (40, 50)]
    places = {5: (10, 20), 15: (10, 20), 24: (10, 20), 25: None, 34: None, 35: (40, 50)}
    assert {place: stretch_at(found, place) for place in places} == places
    assert stretch_at([], 3) is None


def test_a_long_stretch_is_followed_to_both_of_its_ends(detector: Detector) -> None:
    values = np.concatenate([simulate(1800, 0)[900:], simulate(2600, 0)[1800:]])
    values[150:1200, 1] += 25.0 * (-1) ** (np.arange(1050) // 4)
    long = series_of(detector, anchor_bundle(), history_of(values))
    scores = look(detector, long, 700, 10)
    (stretch,) = [s for s in stretches(scores.anomaly_score) if s[0] <= 700 - scores.start < s[1]]
    assert 148 <= stretch[0] + scores.start <= 152
    assert 1198 <= stretch[1] + scores.start <= 1215
    assert len(look(detector, long, 1350, 300).evidence) == 601


# -- words and picture -------------------------------------------------------------------------


def test_the_fault_is_described_and_shown(detector: Detector) -> None:
    found = inspect_moment(detector, anchor_bundle(), history_of(readings()), at(610), channels=3)
    event = found.event
    assert event.start_ms == at(600)
    assert at(618) <= event.end_ms <= at(628)  # the window remembers the fault for a while
    assert (event.entity, event.channels, event.ongoing, event.steps) == ("e0", 5, False, False)
    assert event.anomaly_score > 1
    assert re.match(r"c1 .*on e0 (was|were) up to [\d.]+ times", found.text)
    assert " implied from 2026-11-23 22:00 to 22:2" in found.text
    picture = found.picture
    assert picture.panels[0].channel == "c1"
    assert len(picture.panels) == 3
    assert picture.panels[0].share > 0.5
    assert picture.stretch is not None
    first, last = picture.stretch
    assert (picture.numbers[first] * PERIOD_MS, last - first) == (at(600), event.slots)
    assert picture.numbers[picture.at] * PERIOD_MS == at(610)
    assert len(picture.anomaly_score) == len(picture.panels[0].observed) == len(picture.numbers)


def test_a_calm_moment(detector: Detector) -> None:
    found = inspect_moment(detector, anchor_bundle(), history_of(readings()), at(570))
    assert found.text.startswith("Nothing unusual on e0 at 2026-11-23 21:30 UTC")
    assert found.text.endswith("The nearest anomalous slot is at 2026-11-23 22:00 UTC.")
    assert found.picture.stretch is None
    assert all(np.isnan(panel.share) for panel in found.picture.panels)


def test_the_span_that_is_drawn(detector: Detector) -> None:
    history = history_of(readings())
    found = inspect_moment(detector, anchor_bundle(), history, at(610), around_ms=5 * PERIOD_MS)
    assert (found.picture.numbers * PERIOD_MS).tolist() == [at(i) for i in range(605, 616)]
    assert found.picture.stretch == (0, 11)
    assert found.event.start_ms == at(600)  # though it is not in the picture
    edge = inspect_moment(detector, anchor_bundle(), history, at(SLOTS - 1))
    assert edge.picture.numbers[-1] * PERIOD_MS == at(SLOTS - 1)


def test_what_goes_on_at_the_end_of_history_goes_on(detector: Detector) -> None:
    history = history_of(readings()[:612])
    found = inspect_moment(detector, anchor_bundle(), history, at(611))
    assert found.event.ongoing
    assert "imply since 2026-11-23 22:00 UTC" in found.text


def test_silent_channels_are_named_only_if_they_were_heard_before(detector: Detector) -> None:
    values = readings()
    values[:, 3] = np.nan
    values[590:, 4] = np.nan
    found = inspect_moment(detector, anchor_bundle(), history_of(values), at(610), channels=9)
    assert found.text.count("sent nothing") == 1
    assert "c4 sent nothing in that time." in found.text
    assert sorted(panel.channel for panel in found.picture.panels) == ["c0", "c1", "c2", "c4"]


def test_a_channel_that_never_moved_before(detector: Detector) -> None:
    values = readings(1)
    values[:, 1] = 100.0
    values[FAULT, 1] = 140.0
    found = inspect_moment(detector, anchor_bundle(), history_of(values, "e1"), at(610))
    assert "c1, which did not move before, read 140 " in found.text


@pytest.mark.parametrize("steps", [True, False])
@pytest.mark.parametrize("slot", [610, 300])
def test_the_picture_can_be_drawn(
    detector: Detector, tmp_path: Path, steps: bool, slot: int
) -> None:
    values = readings()
    values[602:604] = np.nan
    values[605:609:2, 1] = np.nan
    values[:, 4] = np.nan
    history = history_of(values, start_ms=0 if steps else NOON)
    moment = (0 if steps else NOON) + slot * PERIOD_MS
    found = inspect_moment(detector, anchor_bundle(), history, moment)
    assert found.picture.steps == steps
    save_picture(found.picture, tmp_path / "a.png")
    save_picture(found.picture, tmp_path / "b.png")
    pixels = imread(tmp_path / "a.png")
    assert pixels.shape[1] == 1440
    assert pixels[..., :3].std() > 0.05
    assert (pixels[0, 0, :3] == 1.0).all()  # a light background
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_picture_that_cannot_be_written(detector: Detector, tmp_path: Path) -> None:
    found = inspect_moment(detector, anchor_bundle(), history_of(readings()), at(300))
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(TsdiffError, match=r"cannot write .*taken.png: .*; name another file"):
        save_picture(found.picture, tmp_path / "taken.png")


# -- the command -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Files:
    """A bundle, and a folder of history, on disk."""

    bundle: Path
    history: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("inspect")
    (root / "history").mkdir()
    save_bundle(anchor_bundle(), root / "bundle")
    for entity in range(2):
        values = readings(entity)
        columns = {f"c{i}": values[:, i] for i in range(values.shape[1])}
        times = pa.array(NOON + PERIOD_MS * np.arange(SLOTS), pa.timestamp("ms"))
        table = pa.table({"timestamp": times, **columns})
        pq.write_table(table, root / "history" / f"e{entity}.parquet")
    return Files(root / "bundle", root / "history")


Captured = pytest.CaptureFixture[str]


def test_the_command_tells_and_draws(
    files: Files, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["inspect", str(files.bundle), "--data", str(files.history), "--entity", "e0"]
    assert cli.main([*given, "--at", "2026-11-23T22:10:00Z", "--around", "1h"]) == 0
    text, arrow = capsys.readouterr().out.splitlines()
    assert text.startswith("c1 ")
    assert arrow == "-> e0-20261123T221000Z.png"
    assert [path.name for path in tmp_path.iterdir()] == ["e0-20261123T221000Z.png"]


def test_without_data_it_describes(files: Files, capsys: Captured) -> None:
    assert cli.main(["inspect", str(files.bundle)]) == 0
    assert "held out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said", "status"),
    [
        (["--at", "5"], "expected --data with --at", 2),
        (["-o", "x.png"], "expected --data with --output", 2),
        (["--data", "DATA"], "expected --at with --data", 2),
        (["--data", "DATA", "--at", "soon"], "expected --at as RFC 3339", 2),
        (["--data", "DATA", "--at", "5"], "expected --entity, the history holds 2: e0, e1", 2),
        (["--data", "DATA", "--at", "5", "--entity", "e0"], "expected --at from 2026-11-23 12", 2),
        (["--data", "DATA", "--at", "5", "-o", "x.bmp"], "expected --output to end in .png", 2),
        (["--data", "DATA", "--at", "5", "-o", "no/x.png"], "expected --output in a folder", 2),
        (["--data", "DATA", "--at", "5", "--around", "5"], "--around: expected a number with", 2),
        (["--data", "nowhere", "--at", "5"], "nowhere: expected a Parquet file or a folder", 1),
    ],
)
def test_wrong_usage_is_said_in_one_line(
    files: Files, options: list[str], said: str, status: int, capsys: Captured
) -> None:
    given = [str(files.history) if option == "DATA" else option for option in options]
    assert cli.main(["inspect", str(files.bundle), *given]) == status
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith(f"error: {said}") or said in error
    assert len(error.splitlines()) == 1


def test_without_matplotlib_it_says_what_to_install(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    given = ["--data", str(files.history), "--at", "5", "--entity", "e0"]
    assert cli.main(["inspect", str(files.bundle), *given]) == 1
    assert "install it with: pip install 'tsdiff[eval]'" in capsys.readouterr().err
