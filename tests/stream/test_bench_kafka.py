"""`tsdiff bench --kafka`: what it counts. How fast anything is, no test says."""

import gc
import json
from pathlib import Path

import pytest
from kafka import KafkaAdminClient

from stream.bench_kafka import quantile, together
from tests.conftest import free_port
from tests.train.simulated import anchor_bundle
from tsdiff import cli
from tsdiff.bundle import save_bundle

BUCKET = 'tsdiff_end_to_end_latency_seconds_bucket{le="%s"}'


def buckets(*counts: float) -> dict[str, float]:
    return {BUCKET % le: n for le, n in zip(("0.1", "0.2", "1.0", "+Inf"), counts, strict=True)}


def test_a_quantile_lies_where_prometheus_would_put_it() -> None:
    before, after = buckets(5, 5, 5, 5), buckets(15, 25, 25, 25)
    assert quantile(0.5, before, after) == pytest.approx(0.1)
    assert quantile(0.25, before, after) == pytest.approx(0.05)
    assert quantile(0.75, before, after) == pytest.approx(0.15)
    assert quantile(0.99, before, buckets(5, 5, 5, 9)) == 1.0  # beyond the last bound: no idea
    assert quantile(0.5, before, before) is None


def test_of_several_services_the_furthest_behind_tells_how_far() -> None:
    one = {"tsdiff_readings_total": 3.0, "tsdiff_consumer_lag_seconds": 2.0}
    other = {"tsdiff_readings_total": 4.0, "tsdiff_consumer_lag_seconds": 1.0, "more": 1.0}
    assert together([one, other]) == {
        "tsdiff_readings_total": 7.0,
        "tsdiff_consumer_lag_seconds": 2.0,
        "more": 1.0,
    }


@pytest.mark.kafka
@pytest.mark.timeout(240)
def test_services_are_measured_and_nothing_is_left_behind(
    kafka: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_bundle(anchor_bundle(), tmp_path / "bundle")
    size = ["--entities=50", "--backlog=120000", "--rate=100", "--seconds=2"]
    command = ["bench", "-m", str(tmp_path / "bundle"), "--kafka", kafka, "--services=2"]
    status = cli.main([*command, *size, "--json"])
    out, err = capsys.readouterr()
    assert status == 0, err
    found = json.loads(out)
    assert found["readings_per_second"] > 0
    assert sum(found["stage_share"].values()) <= 1.05
    assert (found["entities"], found["services"]) == (50, 2)
    assert 150 <= found["rate_readings"] <= 200
    assert 0 < found["latency_p50_seconds"] <= found["latency_p99_seconds"]
    assert found["late_readings"] == found["dead_letters"] == 0
    assert found["windows_per_second_per_core"] is None
    admin = KafkaAdminClient(bootstrap_servers=kafka)
    left = [topic["name"] for topic in admin.describe_topics()]
    admin.close()
    assert not [name for name in left if name.startswith("tsdiff-bench")]


def test_without_a_broker_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_bundle(anchor_bundle(), tmp_path / "bundle")
    servers = f"127.0.0.1:{free_port()}"
    assert cli.main(["bench", "-m", str(tmp_path / "bundle"), "--kafka", servers]) == 1
    assert f"expected a broker at {servers} (--kafka), got " in capsys.readouterr().err
    gc.collect()  # a socket left open is a warning here, and warnings are errors
    assert cli.main(["bench", "--kafka", servers, "--rate", "0"]) == 2
    assert "--rate and --seconds above 0" in capsys.readouterr().err
    assert cli.main(["bench", "--kafka", servers, "--services", "0"]) == 2
    assert "--services" in capsys.readouterr().err
