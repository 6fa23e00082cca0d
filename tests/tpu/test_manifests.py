"""The GKE manifests keep to Kubernetes' schemas, their parts find each other, and the server reads the arguments they give.

LeaderWorkerSet has no schema among Kubernetes' own: what it wraps are pod templates, which have.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.deploy.dockerfile import read
from xlane.server import flags
from xlane.server.cli import Settings, choose, settle
from xlane.server.config import ServerConfig

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = "1.34"
MANIFESTS = ("gke.yaml", "gke-multihost.yaml")
IMAGE = read(ROOT / "Dockerfile")[1].environment()
CHIPS_A_HOST = {"2x4": 8, "4x4": 4}
"""Topology of a v6e slice -> chips of each of its machines: one host has up to 8, each of several has 4."""


def replicas() -> dict[tuple[str, str], dict[str, Any]]:
    """Kind and name -> object of the engines and their front."""
    found = yaml.safe_load_all((ROOT / "tpu" / "gke-replicas.yaml").read_text())
    return {(item["kind"], item["metadata"]["name"]): item for item in found}


def objects(name: str) -> dict[str, dict[str, Any]]:
    """Kind -> object."""
    found = list(yaml.safe_load_all((ROOT / "tpu" / name).read_text()))
    assert len({item["kind"] for item in found}) == len(found)
    return {item["kind"]: item for item in found}


REPLICAS = replicas()
SINGLE, GROUP = objects("gke.yaml"), objects("gke-multihost.yaml")
LEADER = GROUP["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]["leaderTemplate"]
WORKER = GROUP["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]["workerTemplate"]
TEMPLATES = {"single": SINGLE["Deployment"]["spec"]["template"], "leader": LEADER, "worker": WORKER}


def container(template: Mapping[str, Any]) -> dict[str, Any]:
    [only] = template["spec"]["containers"]
    return only


def settings(template: Mapping[str, Any], **group: str) -> Settings:
    """What the container's command makes of its arguments and variables, in a group with these variables."""
    one = container(template)
    plain = {item["name"]: item["value"] for item in one["env"] if "value" in item}
    secret = {item["name"]: "a-secret" for item in one["env"] if "valueFrom" in item}
    args = [re.sub(r"\$\((\w+)\)", lambda found: group[found[1]], arg) for arg in one["args"]]
    entry, *rest = one.get("command", ["text-generation-launcher"])
    defaults = flags.TGI_DEFAULTS if entry == "text-generation-launcher" else {}
    command, typed = choose([*(rest or ["serve"]), *args])
    return settle(command, typed, {"HOSTNAME": "xlane-0-1", **IMAGE, **plain, **secret}, defaults)


def selects(selector: Mapping[str, str], template: Mapping[str, Any]) -> bool:
    return selector.items() <= template["metadata"]["labels"].items()


def validated() -> Iterator[Any]:
    for name in MANIFESTS:
        for kind, item in objects(name).items():
            if kind != "LeaderWorkerSet":
                yield pytest.param(item, id=f"{name}:{kind}")
    for (kind, name), item in REPLICAS.items():
        yield pytest.param(item, id=f"gke-replicas.yaml:{kind} {name}")
    for role, template in TEMPLATES.items():
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            **template,
            "metadata": {"name": "x", **template["metadata"]},
        }
        yield pytest.param(pod, id=f"pod:{role}")


@pytest.mark.parametrize("item", validated())
def test_it_fits_the_schema(item: dict[str, Any]):
    kubernetes_validate.validate(item, KUBERNETES, strict=True)


def test_the_group_is_what_leaderworkerset_takes():
    group = GROUP["LeaderWorkerSet"]
    assert group["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
    assert set(group["spec"]) == {"replicas", "leaderWorkerTemplate"}
    template = group["spec"]["leaderWorkerTemplate"]
    assert set(template) == {"size", "restartPolicy", "leaderTemplate", "workerTemplate"}
    assert template["restartPolicy"] == "RecreateGroupOnPodRestart"


def test_chips_hosts_and_topology_agree():
    sizes = {"single": 1, "leader": GROUP["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]["size"]}
    for role, hosts in sizes.items():
        topology = TEMPLATES[role]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        resources = container(TEMPLATES[role])["resources"]
        chips = int(resources["limits"]["google.com/tpu"])
        x, y = map(int, topology.split("x"))
        assert chips == CHIPS_A_HOST[topology]
        assert chips * hosts == x * y
        assert resources["requests"] == resources["limits"]
    assert WORKER["spec"]["nodeSelector"] == LEADER["spec"]["nodeSelector"]
    assert container(WORKER)["resources"] == container(LEADER)["resources"]


def test_the_services_reach_the_server_and_only_it():
    selector = SINGLE["Deployment"]["spec"]["selector"]["matchLabels"]
    assert selects(selector, TEMPLATES["single"])
    assert selects(SINGLE["Service"]["spec"]["selector"], TEMPLATES["single"])
    assert selects(GROUP["Service"]["spec"]["selector"], LEADER)
    assert not selects(GROUP["Service"]["spec"]["selector"], WORKER)
    for service in (SINGLE["Service"], GROUP["Service"]):
        assert service["spec"]["type"] == "ClusterIP"
        assert [port["targetPort"] for port in service["spec"]["ports"]] == ["http"]


@pytest.mark.parametrize("role", ["single", "leader"])
def test_the_ports_and_probes_are_the_servers(role: str):
    one = container(TEMPLATES[role])
    ports = {port["name"]: port["containerPort"] for port in one["ports"]}
    server = settings(
        TEMPLATES[role], LWS_LEADER_ADDRESS="a", LWS_GROUP_SIZE="4", LWS_WORKER_INDEX="0"
    ).server
    assert (server.host, server.port, server.api_key) == ("0.0.0.0", ports["http"], "a-secret")
    assert TEMPLATES[role]["metadata"]["annotations"]["prometheus.io/port"] == str(server.port)
    paths = {name: one[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert [paths[name]["path"] for name in paths] == ["/health", "/health", "/v2/health/live"]
    assert {probe["port"] for probe in paths.values()} == {"http"}
    grace_s = TEMPLATES[role]["spec"]["terminationGracePeriodSeconds"]
    assert grace_s > ServerConfig().graceful_termination_timeout_s


def test_the_probes_paths_exist():
    from xlane.server.app import create_app
    from xlane.server.backend import Backend

    paths = {getattr(route, "path", "") for route in create_app(Backend(), ServerConfig()).routes}
    assert {"/health", "/v2/health/live", "/metrics"} <= paths


def test_the_processes_of_a_group_are_one_engine():
    group = {"LWS_LEADER_ADDRESS": "xlane-0.xlane.ns", "LWS_GROUP_SIZE": "4"}
    leader = settings(LEADER, **group, LWS_WORKER_INDEX="0").engine
    worker = settings(WORKER, **group, LWS_WORKER_INDEX="3").engine
    assert (leader.process_id, worker.process_id) == (0, 3)
    assert leader.processes == worker.processes == 4
    ports = {port["name"]: port["containerPort"] for port in container(LEADER)["ports"]}
    assert leader.coordinator == worker.coordinator == f"xlane-0.xlane.ns:{ports['coordinator']}"
    assert ports["group"] == ports["coordinator"] + 1
    assert leader.model_id == worker.model_id != "demo"


def test_strangers_reach_the_api_only():
    policy = GROUP["NetworkPolicy"]["spec"]
    open_to_all = [rule for rule in policy["ingress"] if "from" not in rule]
    assert [port["port"] for rule in open_to_all for port in rule["ports"]] == [8080]
    assert selects(policy["podSelector"]["matchLabels"], LEADER)
    assert selects(policy["podSelector"]["matchLabels"], WORKER)


@pytest.mark.parametrize("role", TEMPLATES)
def test_what_is_mounted_is_there(role: str):
    volumes = {volume["name"]: volume for volume in TEMPLATES[role]["spec"]["volumes"]}
    assert [mount["name"] for mount in container(TEMPLATES[role])["volumeMounts"]] == list(volumes)
    assert (
        settings(
            TEMPLATES[role],
            LWS_LEADER_ADDRESS="a",
            LWS_GROUP_SIZE="4",
            LWS_WORKER_INDEX="1" if role == "worker" else "0",
        ).engine.cache_dir
        == f"{container(TEMPLATES[role])['volumeMounts'][0]['mountPath']}/xlane"
    )
    if "persistentVolumeClaim" in volumes["data"]:
        claim = SINGLE["PersistentVolumeClaim"]["metadata"]["name"]
        assert volumes["data"]["persistentVolumeClaim"]["claimName"] == claim


def test_the_front_finds_the_engines_and_both_serve_the_same():
    engines, front = (REPLICAS["Deployment", name]["spec"]["template"] for name in ("xlane-engine", "xlane"))
    headless = REPLICAS["Service", "xlane-engine"]["spec"]
    engine, asked = settings(engines), settings(front)
    port = engine.options.plain("listen").rpartition(":")[2]
    assert asked.run.engines == (f"dns:///xlane-engine:{port}",)
    assert (headless["clusterIP"], [item["port"] for item in headless["ports"]]) == ("None", [int(port)])
    assert engine.engine.model_id == asked.engine.model_id != "demo"
    assert engine.engine.cache_dir == f"{container(engines)['volumeMounts'][0]['mountPath']}/xlane"
    assert selects(headless["selector"], engines)
    assert not selects(headless["selector"], front)
    assert selects(REPLICAS["Service", "xlane"]["spec"]["selector"], front)
    assert not selects(REPLICAS["Service", "xlane"]["spec"]["selector"], engines)
    for template, last_s in (
        (engines, engine.options.plain("drain_s")),
        (front, asked.server.drain_delay_s + asked.server.graceful_termination_timeout_s),
    ):
        assert template["spec"]["terminationGracePeriodSeconds"] > last_s
    for probe in ("startupProbe", "readinessProbe"):
        assert container(engines)[probe]["grpc"] == {"port": int(port)}
    (rule,) = REPLICAS["NetworkPolicy", "xlane-engine"]["spec"]["ingress"]
    assert [item["port"] for item in rule["ports"]] == [int(port)]
    assert selects(rule["from"][0]["podSelector"]["matchLabels"], front)
