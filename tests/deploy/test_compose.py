"""compose.yaml keeps to the Compose specification, opens nothing to strangers, and its parts find each other."""

import json
import subprocess
from pathlib import Path
from typing import Any

import yaml

from xlane.server import flags
from xlane.server.cli import choose, settle
from xlane.server.config import ServerConfig

from .dockerfile import read

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]


def content(name: str) -> Any:
    return yaml.safe_load(COMPOSE["configs"][name]["content"])


def test_it_fits_the_specification():
    checker = ["check-jsonschema", "--builtin-schema", "vendor.compose-spec"]
    subprocess.run([*checker, ROOT / "compose.yaml"], check=True)


def test_what_it_mounts_is_there():
    mounts = [volume for service in SERVICES.values() for volume in service.get("volumes", [])]
    files = [mount.split(":")[0] for mount in mounts if mount.startswith("./")]
    names = {mount.split(":")[0] for mount in mounts if not mount.startswith("./")}
    assert sorted(files) == ["./docs/alerts.yaml", "./docs/grafana.json"]
    assert [file for file in files if not (ROOT / file).is_file()] == []
    assert names == set(COMPOSE["volumes"])
    sources = [config["source"] for service in SERVICES.values() for config in service.get("configs", [])]
    assert sorted(sources) == sorted(COMPOSE["configs"])


def test_every_port_is_on_loopback_until_told_otherwise():
    ports = [port for service in SERVICES.values() for port in service["ports"]]
    assert len(ports) == 3
    assert all(port.startswith(("127.0.0.1:", "${XLANE_BIND:-127.0.0.1}:")) for port in ports)


def test_nobody_has_a_well_known_password():
    grafana = SERVICES["grafana"]["environment"]
    assert grafana["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert grafana["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert "PASSWORD" not in " ".join(grafana)


def test_the_server_reads_its_variables():
    xlane, [_, image] = SERVICES["xlane"], read(ROOT / "Dockerfile")
    command, rest = choose(["serve", *xlane["command"]])
    unset = {name: value.partition(":-")[2].rstrip("}") for name, value in xlane["environment"].items()}
    settings = settle(command, rest, image.environment() | unset, flags.TGI_DEFAULTS)
    assert (settings.engine.model_id, settings.server.api_key, settings.run.json_output) == (
        "demo",
        None,
        True,
    )
    assert settings.server.port == int(xlane["ports"][0].rpartition(":")[2])
    assert int(xlane["stop_grace_period"].rstrip("s")) > ServerConfig().graceful_termination_timeout_s


def test_prometheus_asks_the_server_and_grafana_asks_prometheus():
    prometheus, source = content("prometheus"), content("grafana-source")["datasources"][0]
    [target] = prometheus["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target == f"xlane:{SERVICES['xlane']['ports'][0].rpartition(':')[2]}"
    # Rule files are looked for beside prometheus.yml.
    assert "./docs/alerts.yaml:/etc/prometheus/alerts.yaml:ro" in SERVICES["prometheus"]["volumes"]
    assert prometheus["rule_files"] == ["alerts.yaml"]
    assert source["url"] == f"http://prometheus:{SERVICES['prometheus']['ports'][0].rpartition(':')[2]}"
    # The dashboard asks for a source of this type, and takes the default one.
    [variable] = [
        item
        for item in json.loads((ROOT / "docs/grafana.json").read_text())["templating"]["list"]
        if item["type"] == "datasource"
    ]
    assert (source["type"], source["isDefault"]) == (variable["query"], True)


def test_grafana_finds_the_dashboard():
    [provider] = content("grafana-dashboards")["providers"]
    [mount] = SERVICES["grafana"]["volumes"]
    inside = mount.split(":")[1]
    assert inside.startswith(provider["options"]["path"] + "/")
    assert SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == inside
