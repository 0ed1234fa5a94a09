"""Image, compose file, chart and unit: checked by the tools that read them, and by rules of ours.

No container is started here. hadolint, docker compose and the schemas of Kubernetes come with the
extra `deploy`; helm and systemd-analyze are used where they are.
"""

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from prometheus_client import CollectorRegistry

from stream.config import ServiceConfig, load_config
from stream.http import Health, MetricsServer
from tests.conftest import ROOT, unavailable
from tests.deploy.chart import CHART, RENDERED, Manifest, fingerprint, helm, manifests, render
from tests.deploy.chart import template as helm_template

DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def tool(name: str) -> str:
    """The path of a program that the extra `deploy` brings, where there is one for this machine."""
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if path is None:
        unavailable(f"{name} is not here; pip install '.[deploy]' brings it on Linux on x86-64")
    return path


def run(*command: str, **options: Any) -> "subprocess.CompletedProcess[str]":  # noqa: ANN401
    return subprocess.run(command, check=False, capture_output=True, text=True, **options)


# -- the image ---------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, continued lines joined, comments left out."""
    text = (DEPLOY / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (word.upper(), " ".join(rest.split()))
        for word, _, rest in (line.strip().partition(" ") for line in joined.splitlines())
        if word
    ]


def stages() -> list[list[tuple[str, str]]]:
    """The instructions of each stage, from its FROM on."""
    found: list[list[tuple[str, str]]] = []
    for word, rest in instructions():
        if word == "FROM":
            found.append([])
        if found:
            found[-1].append((word, rest))
    return found


def last(word: str) -> str:
    """What the final stage says last with an instruction."""
    return [rest for known, rest in stages()[-1] if known == word][-1]


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    answer = run(tool("hadolint"), "--no-color", str(DEPLOY / "Dockerfile"))
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_the_final_stage_is_small_and_not_root() -> None:
    builder, final = stages()
    (python,) = [rest for word, rest in instructions() if word == "ARG" and "PYTHON=" in rest]
    version = re.fullmatch(r"PYTHON=(\d+)\.(\d+)\.(\d+)-slim-\w+", python)
    assert version is not None, "a slim image, pinned to its last digit"
    least = re.search(r"(\d+)\.(\d+)", PROJECT["requires-python"])
    assert least is not None
    assert (int(version[1]), int(version[2])) >= (int(least[1]), int(least[2]))
    assert final[0] == ("FROM", "python:${PYTHON}")
    assert builder[0] == ("FROM", "python:${PYTHON} AS builder")
    copied = [rest for word, rest in final if word == "COPY"]
    assert copied == ["--from=builder /opt/tsdiff /opt/tsdiff"], "only what was built goes on"
    assert not any(re.search(r"\b(apt-get|pip|gcc)\b", rest) for w, rest in final if w == "RUN")
    assert last("USER") == "10001:10001"
    labels = " ".join(rest for word, rest in final if word == "LABEL")
    for label in ("title", "description", "licenses", "source", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in labels
    assert f'licenses="{PROJECT["license"]}"' in labels


def test_the_builder_is_sent_what_it_copies_and_no_more() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    sent = {rule[1:] for rule in rules if rule.startswith("!")}
    assert sent == set(copied_to_the_builder())


def copied_to_the_builder() -> list[str]:
    copies = [rest.split()[:-1] for word, rest in stages()[0] if word == "COPY"]
    return [source for sources in copies for source in sources]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel that the builder's files make; dependencies are borrowed."""
    folder = tmp_path_factory.mktemp("image")
    source, venv = folder / "source", folder / "venv"
    source.mkdir()
    for name in copied_to_the_builder():
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
        else:
            shutil.copy2(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    wheels = folder / "wheels"
    built = run(*pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), str(source))
    assert built.returncode == 0, built.stderr
    (wheel,) = wheels.glob("*.whl")
    assert run(sys.executable, "-m", "venv", "--without-pip", str(venv)).returncode == 0
    python = str(venv / "bin" / "python")
    put = run(*pip, "--python", python, "install", "--no-deps", "--no-index", str(wheel))
    assert put.returncode == 0, put.stderr
    # A plain line in a .pth file adds a folder without running the .pth files in it, so this tree
    # is not found there: tsdiff comes from the wheel, all else from here.
    own, borrowed = (
        run(p, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
        for p in (python, sys.executable)
    )
    (Path(own) / "borrowed.pth").write_text(borrowed + "\n")
    return venv


def in_image(clean: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    """Run a command as the image would, with its PATH, in a folder that holds nothing."""
    empty = clean.parent / "empty"
    empty.mkdir(exist_ok=True)
    program = shutil.which(command[0], path=str(clean / "bin"))
    assert program is not None, f"{command[0]} is not in the image"
    environment = {"PATH": f"{clean / 'bin'}:/usr/bin:/bin", "XDG_CACHE_HOME": str(empty)}
    return run(program, *command[1:], cwd=empty, env=environment)


@pytest.mark.timeout(240)
def test_the_entry_command_works_in_a_clean_environment(clean: Path) -> None:
    entry, command = json.loads(last("ENTRYPOINT")), json.loads(last("CMD"))
    where = in_image(clean, "python", "-c", "import stream, train, tsdiff; print(tsdiff.__file__)")
    assert str(clean) in where.stdout, where.stderr
    files = "import stream.web as w; print(*(p.name for p in w._FOLDER.iterdir()))"
    assert "page.html" in in_image(clean, "python", "-c", files).stdout, "the page's own files"
    version = in_image(clean, *entry, "--version")
    assert version.stdout.strip() == f"tsdiff {PROJECT['version']}"
    shown = in_image(clean, *entry, command[0], "--help")
    assert shown.returncode == 0 and "--config" in shown.stdout
    schema = in_image(clean, *entry, *command, "--print-schema")
    assert json.loads(schema.stdout)["properties"].keys() >= {"model", "input"}, schema.stderr
    # Nothing is mounted here: wrong usage, in one line that names the file.
    bare = in_image(clean, *entry, *command)
    assert bare.returncode == 2
    assert command[-1] in bare.stderr and len(bare.stderr.splitlines()) == 1


def test_the_health_check_tells_healthy_from_not() -> None:
    check = last("HEALTHCHECK").split("CMD ", 1)[1]
    now = 0.0
    health = Health(stalled_after_s=1.0, clock=lambda: now)
    with MetricsServer("127.0.0.1:0", CollectorRegistry(), health) as server:
        python, *rest = json.loads(check)
        assert python == "python"
        command = [sys.executable, *(part.replace("9464", str(server.port)) for part in rest)]
        assert run(*command).returncode == 0
        now = 10.0
        assert run(*command).returncode != 0
    assert run(*command).returncode != 0, "nobody answers"


# -- compose -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    """What docker compose makes of the file."""
    file = str(DEPLOY / "compose.yaml")
    answer = run(tool("docker-compose"), "-f", file, "config", "--format", "json")
    assert answer.returncode == 0, answer.stderr
    assert not answer.stderr, answer.stderr
    config: dict[str, Any] = json.loads(answer.stdout)
    return config


def test_everything_that_watches_is_composed(composed: dict[str, Any]) -> None:
    wanted = {"kafka", "tsdiff", "prometheus", "alertmanager", "grafana"}
    assert composed["services"].keys() == wanted


def test_services_are_pinned_checked_and_on_loopback(composed: dict[str, Any]) -> None:
    for name, service in composed["services"].items():
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), f"{name}: {service['image']}"
        assert service["healthcheck"]["test"][0] == "CMD", name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        for port in service["ports"]:
            assert port["host_ip"] == "127.0.0.1", f"{name}: {port}"
    assert composed["services"]["tsdiff"]["image"] == f"tsdiff:{PROJECT['version']}"
    assert composed["services"]["tsdiff"]["read_only"] is True


def test_what_is_mounted_exists(composed: dict[str, Any]) -> None:
    for name, service in composed["services"].items():
        for mount in service.get("volumes", ()):
            if mount["type"] == "volume":
                assert mount["source"] in composed["volumes"], (name, mount)
                continue
            assert mount["read_only"], (name, mount)
            source = Path(mount["source"])
            if mount["target"] == "/bundle":  # the user's own
                assert source == ROOT / "bundle"
                assert not mount["bind"].get("create_host_path", False)
            else:
                assert source.exists(), (name, mount)
    context = composed["services"]["tsdiff"]["build"]
    assert Path(context["context"], context["dockerfile"]) == DEPLOY / "Dockerfile"


def test_files_that_commands_name_are_mounted(composed: dict[str, Any]) -> None:
    for name in ("prometheus", "alertmanager"):
        service = composed["services"][name]
        options = dict(part.split("=", 1) for part in service["command"])
        file = Path(options["--config.file"])
        (mount,) = [m for m in service["volumes"] if m["target"] == str(file.parent)]
        assert (Path(mount["source"]) / file.name).exists()
    grafana = composed["services"]["grafana"]
    targets = {mount["target"]: Path(mount["source"]) for mount in grafana["volumes"]}
    board = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (targets[str(board.parent)] / board.name).exists()
    provisioned = Path("/etc/grafana/provisioning")
    provider = targets[str(provisioned / "dashboards")] / "dashboards.yaml"
    assert str(board.parent) in provider.read_text()
    # Who has Alertmanager would be told twice by Grafana's own rules.
    assert "alertmanager" in composed["services"]
    assert not {str(provisioned), str(provisioned / "alerting")} & targets.keys()


def test_prometheus_reaches_the_other_containers() -> None:
    """By the names that they have there; 127.0.0.1 would be Prometheus' own container."""
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.compose.yml").read_text())
    jobs = [*config["scrape_configs"], *config.get("alerting", {}).get("alertmanagers", ())]
    asked = {
        target
        for job in jobs
        for group in job.get("static_configs", ())
        for target in group["targets"]
    }
    assert asked == {"tsdiff:9464", "alertmanager:9093"}
    # Nothing but the addresses differs from what one machine has.
    text = json.dumps(config).replace("tsdiff:9464", "127.0.0.1:9464")
    here = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    assert json.loads(text.replace("alertmanager:9093", "127.0.0.1:9093")) == here


def settings_in(
    file: Path, environment: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> ServiceConfig:
    """What the service reads from a settings file and a container's environment."""
    for key, value in environment.items():
        if key.startswith("TSDIFF_"):
            monkeypatch.setenv(key, str(value))
    return load_config(file)


def test_the_composed_service_accepts_its_settings(
    composed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = composed["services"]["tsdiff"]
    config = settings_in(DEPLOY / "tsdiff.yaml", service["environment"], monkeypatch)
    kafka = composed["services"]["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
    assert f"INSIDE://{config.input.bootstrap_servers[0]}" in kafka
    assert config.model.path == Path("/bundle")
    port = config.metrics.listen.rpartition(":")[2]
    assert [str(published["target"]) for published in service["ports"]] == [port]
    assert f":{port}/" in service["healthcheck"]["test"][-1]


def test_compose_health_checks_ask_what_the_programs_answer(composed: dict[str, Any]) -> None:
    """Every check asks the service itself, at the port that is published as well."""
    for name, service in composed["services"].items():
        published = {str(port["target"]) for port in service["ports"]}
        asked = " ".join(service["healthcheck"]["test"])
        assert any(f":{port}" in asked for port in published), name


# -- the chart ---------------------------------------------------------------------------------


def values(*names: str) -> dict[str, Any]:
    """The chart's values, with those of files in `ci/` over them."""

    def over(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
        merged = dict(base)
        for key, value in more.items():
            both = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = over(merged[key], value) if both else value
        return merged

    found: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    for name in names:
        more = yaml.safe_load((CHART / "ci" / f"{name}-values.yaml").read_text())
        found = over(found, more)
    return found


def test_the_chart_says_what_the_project_says() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["apiVersion"] == "v2" and chart["name"] == PROJECT["name"]
    assert chart["appVersion"] == PROJECT["version"]


def test_values_fit_their_schema() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    for names in ((), ("claim",), ("full",)):
        jsonschema.validate(values(*names), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**values(), "replicas": 0}, schema)


def test_every_value_is_used_and_every_used_one_exists() -> None:
    text = "\n".join(path.read_text() for path in (CHART / "templates").iterdir())
    used = set(re.findall(r"\.Values\.([\w.]+\w)", text))
    known = values()

    def exists(path: str) -> bool:
        here: Any = known
        for key in path.split("."):
            if not isinstance(here, dict) or (key not in here and here != {}):
                return False
            here = here.get(key, {})
        return True

    # Given to Kubernetes or to tsdiff as a whole: their keys are not the chart's.
    whole = {"config", "resources", "affinity", "nodeSelector"}
    assert not [path for path in used if path.split(".")[0] not in whole and not exists(path)]
    leaves = {
        f"{name}.{key}" if isinstance(section, dict) and section and name not in whole else name
        for name, section in known.items()
        for key in (section if isinstance(section, dict) and section else [""])
    }
    unused = {leaf for leaf in leaves if not any(use.startswith(leaf) for use in used)}
    assert not unused


def test_braces_of_the_templates_are_balanced() -> None:
    for path in (CHART / "templates").iterdir():
        text = path.read_text()
        assert "{{" not in re.sub(r"{{.*?}}", "", text), path.name
        opened = len(re.findall(r"{{-? *(?:if|range|with|define)\b", text))
        assert opened == len(re.findall(r"{{-? *end\b", text)), path.name


def test_the_rendered_chart_is_of_this_chart() -> None:
    first = RENDERED.read_text().splitlines()[0]
    assert fingerprint() in first, "run python -m tests.deploy.chart, which needs helm"


def test_helm_lints_and_renders_the_chart() -> None:
    if shutil.which("helm") is None:
        pytest.skip("helm is not in PATH (go install helm.sh/helm/v3/cmd/helm@latest)")
    for name in ("claim", "full"):
        file = str(CHART / "ci" / f"{name}-values.yaml")
        lint = helm("lint", "--strict", str(CHART), "--values", file)
        assert lint.returncode == 0, lint.stdout + lint.stderr
    assert manifests(render()) == manifests(RENDERED.read_text())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "set one of bundle.existingClaim and bundle.initContainer"),
        (["bundle.existingClaim=a", "bundle.initContainer.image=b"], "set one of"),
        (
            ["bundle.existingClaim=a", "config.metrics.listen=127.0.0.1:9464"],
            "that other pods reach",
        ),
        (
            ["bundle.existingClaim=a", "config.input.security.sasl_password=secret"],
            "put it into a Secret",
        ),
        (["bundle.existingClaim=a", "prometheusRule.enabled=true"], "--set-file"),
        (["bundle.existingClaim=a", "config.input.topic="], "topic"),
    ],
)
def test_values_that_cannot_work_are_refused(given: list[str], said: str) -> None:
    if shutil.which("helm") is None:
        pytest.skip("helm is not in PATH (go install helm.sh/helm/v3/cmd/helm@latest)")
    answer = helm_template(*(part for value in given for part in ("--set", value)))
    assert answer.returncode != 0 and said in answer.stderr


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[Manifest]]:
    return manifests(RENDERED.read_text())


def one(kind: str, among: list[Manifest]) -> Manifest:
    (found,) = [manifest for manifest in among if manifest["kind"] == kind]
    return found


def test_kubernetes_own_schemas_accept_the_manifests(rendered: dict[str, list[Manifest]]) -> None:
    custom = {"ServiceMonitor", "PrometheusRule", "ScaledObject"}
    for everything in rendered.values():
        for manifest in everything:
            if manifest["kind"] not in custom:
                kubernetes_validate.validate(manifest, "1.33", strict=True)
    assert {m["kind"] for m in rendered["full"]} - {m["kind"] for m in rendered["claim"]} == custom


def test_pods_have_no_privileges_and_know_their_names(rendered: dict[str, list[Manifest]]) -> None:
    for everything in rendered.values():
        spec = one("StatefulSet", everything)["spec"]["template"]["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == int(last("USER").split(":")[0])
        assert spec["automountServiceAccountToken"] is False
        for container in [*spec["containers"], *spec.get("initContainers", ())]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
        (container,) = spec["containers"]
        environment = {entry["name"]: entry for entry in container["env"]}
        name = environment["TSDIFF_INPUT__INSTANCE_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
        assert name == "metadata.name"
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert set(mounts.values()) == volumes.keys()
        assert "emptyDir" in volumes[mounts[environment["XDG_CACHE_HOME"]["value"]]]
        assert container["livenessProbe"]["httpGet"]["path"] == "/-/healthy"
        assert container["readinessProbe"]["httpGet"]["path"] == "/-/ready"
        assert container["resources"]["requests"].keys() == {"cpu", "memory"}
        assert container["args"] == json.loads(last("CMD"))


def test_everything_is_about_the_same_pods(rendered: dict[str, list[Manifest]]) -> None:
    for everything in rendered.values():
        stateful = one("StatefulSet", everything)
        labels = stateful["spec"]["template"]["metadata"]["labels"]
        selectors = [
            stateful["spec"]["selector"]["matchLabels"],
            one("Service", everything)["spec"]["selector"],
            one("PodDisruptionBudget", everything)["spec"]["selector"]["matchLabels"],
            one("NetworkPolicy", everything)["spec"]["podSelector"]["matchLabels"],
        ]
        assert all(selector.items() <= labels.items() for selector in selectors)
        assert stateful["spec"]["serviceName"] == one("Service", everything)["metadata"]["name"]
    full = rendered["full"]
    assert "replicas" in one("StatefulSet", rendered["claim"])["spec"]
    assert "replicas" not in one("StatefulSet", full)["spec"], "KEDA's to say"
    scaled = one("ScaledObject", full)["spec"]
    assert scaled["scaleTargetRef"]["name"] == one("StatefulSet", full)["metadata"]["name"]
    assert scaled["triggers"][0]["metadata"]["consumerGroup"] == "tsdiff"
    assert all(isinstance(value, str) for value in scaled["triggers"][0]["metadata"].values())
    (endpoint,) = one("ServiceMonitor", full)["spec"]["endpoints"]
    (port,) = one("Service", full)["spec"]["ports"]
    assert endpoint["port"] == port["name"]


def test_the_service_accepts_the_settings_of_the_chart(
    rendered: dict[str, list[Manifest]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TSDIFF_INPUT__SECURITY__SASL_PASSWORD", "secret")
    for name, everything in rendered.items():
        if name != "full":
            monkeypatch.delenv("TSDIFF_INPUT__SECURITY__SASL_PASSWORD", raising=False)
        else:
            monkeypatch.setenv("TSDIFF_INPUT__SECURITY__SASL_PASSWORD", "secret")
        file = tmp_path / f"{name}.yaml"
        file.write_text(one("ConfigMap", everything)["data"]["tsdiff.yaml"])
        spec = one("StatefulSet", everything)["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        environment = {e["name"]: e.get("value", "demo-tsdiff-0") for e in container["env"]}
        config = settings_in(file, environment, monkeypatch)
        assert config.input.instance_id == "demo-tsdiff-0"
        (port,) = container["ports"]
        assert config.metrics.listen == f"0.0.0.0:{port['containerPort']}"


# -- systemd -----------------------------------------------------------------------------------

UNIT = DEPLOY / "systemd" / "tsdiff.service"


def unit() -> dict[str, dict[str, str]]:
    """The unit's sections; of a key that is there twice, the last one."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(UNIT.read_text())
    return {name: dict(parser[name]) for name in parser.sections()}


def test_the_unit_is_hardened_and_reloads() -> None:
    service = unit()["Service"]
    wanted = {
        "ExecReload": "/bin/kill -HUP $MAINPID",
        "Restart": "on-failure",
        "DynamicUser": "yes",
        "StateDirectory": "tsdiff",
        "CacheDirectory": "tsdiff",
        "ProtectSystem": "strict",
        "NoNewPrivileges": "yes",
        "CapabilityBoundingSet": "",
    }
    assert {key: service[key] for key in wanted} == wanted
    command = shlex.split(service["ExecStart"])
    assert command[1:] == json.loads(last("CMD")), "the same as the image's"
    assert unit()["Install"]["WantedBy"] == "multi-user.target"


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("no systemd-analyze here; the unit's keys are checked above")
    # It looks for the program, which nobody has put into /opt here.
    program_here = f"ExecStart={sys.executable}"
    text = re.sub(r"^ExecStart=\S+", program_here, UNIT.read_text(), flags=re.MULTILINE)
    copy = tmp_path / UNIT.name
    copy.write_text(text)
    answer = run(program, "verify", "--man=no", str(copy))
    assert answer.returncode == 0 and not answer.stderr, answer.stderr
    # 1.4 of 10 where this was written; each line of the hardening that is lost adds to it.
    exposed = run(program, "security", "--offline=yes", "--threshold=20", str(copy))
    assert exposed.returncode == 0, exposed.stdout[-2000:]
