"""The TPU VM's start-up script, run in a throw-away root beside a metadata server on loopback, with the cloud's commands
played by stubs that write down how they were called."""

import os
import subprocess
import threading
import tomllib
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from xlane.server.cli import choose, settle

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tpu" / "startup.sh"

STUBS = {
    "systemctl": "",
    "useradd": "",
    "chown": "",
    "mount": "",
    "mountpoint": "exit 1",
    "id": "exit 1",
    # Runs what it is given, with the variables of the file and no others, as the unit would.
    "systemd-run": """
        file="$(sed 's/.*--property=EnvironmentFile=\\([^ ]*\\) .*/\\1/' <<<"$*")"
        mapfile -t lines <"$file"
        while [[ "$1" == --* ]]; do shift; done
        exec env -i PATH="$PATH" CALLS="$CALLS" "${lines[@]}" "$@" """,
    # A secret is printed as it was stored: most often without an end of line.
    "gcloud": 'case "$1" in secrets) printf %s "value-of-${5#--secret=}" ;; esac',
    "python3.13": """
        [[ "$1" != -c ]] || exit 0
        mkdir -p "$3/bin"
        for name in pip xlane; do cp "$STUBS/recorder" "$3/bin/$name"; done""",
}
RECORDER = '#!/bin/bash\necho "${0##*/} $*" >>"$CALLS"\n'


class Host:
    """One host: its metadata, its root, and what was called on it."""

    def __init__(self, root: Path, server: ThreadingHTTPServer, metadata: dict[str, str]) -> None:
        self.root, self.metadata = root, metadata
        self._calls, self._port = root / "calls", server.server_port
        self._stubs = root / "stubs"
        self._stubs.mkdir()
        for name, body in {"recorder": "", **STUBS}.items():
            (self._stubs / name).write_text(RECORDER + body + "\n")
            (self._stubs / name).chmod(0o755)

    def boot(self, code: int = 0) -> list[str]:
        """Run the script; the commands it called."""
        self._calls.write_text("")
        done = subprocess.run(
            [SCRIPT], check=False, capture_output=True, text=True, timeout=60,
            env={
                "PATH": f"{self._stubs}:{os.environ['PATH']}", "CALLS": str(self._calls), "STUBS": str(self._stubs),
                "XLANE_ROOT": str(self.root), "GCE_METADATA_HOST": f"127.0.0.1:{self._port}",
            },
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        self.said = done.stdout + done.stderr
        return [line.replace(str(self.root), "") for line in self._calls.read_text().splitlines()]

    @property
    def environment(self) -> dict[str, str]:
        lines = (self.root / "etc/xlane/env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)

    @property
    def unit(self) -> str:
        return (self.root / "etc/systemd/system/xlane.service").read_text()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    metadata = {"xlane-model-id": "o/m"}

    class Metadata(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, _, name = self.path.rpartition("/")
            known = path == "/computeMetadata/v1/instance/attributes" and name in metadata
            allowed = self.headers["Metadata-Flavor"] == "Google"
            self.send_response((200 if known else 404) if allowed else 403)
            self.end_headers()
            self.wfile.write(metadata[name].encode() if known and allowed else b"<html>no</html>")

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Host(tmp_path, server, metadata)
    server.shutdown()
    server.server_close()


def version() -> str:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def read(command: str, environ: Mapping[str, str]):
    """What the command makes of the environment file; refuses what it does not know the meaning of."""
    chosen, rest = choose([command])
    return settle(chosen, rest, environ, {})


def test_it_is_lint_free():
    subprocess.run(["shellcheck", SCRIPT], check=True)


def test_the_first_boot_installs_compiles_and_starts(host: Host):
    calls = host.boot()
    assert f"pip install --quiet --no-deps xlane=={version()}" in calls
    assert calls.index("xlane warmup") > calls.index(f"pip install --quiet --no-deps xlane=={version()}")
    [locked] = [call for call in calls if "--require-hashes" in call]
    assert locked.endswith("/site-packages/xlane/tpu/requirements-tpu.lock")
    assert calls[-2:] == ["systemctl daemon-reload", "systemctl restart xlane"]
    settings = read("serve", host.environment)
    assert (settings.engine.model_id, settings.engine.processes) == ("o/m", 1)
    assert (settings.server.host, settings.server.port) == ("0.0.0.0", 8080)
    assert settings.server.keyed or settings.server.insecure
    assert settings.engine.cache_dir == f"{host.root}/var/lib/xlane/cache"
    assert "ExecStart=/opt/xlane/bin/xlane serve\n" in host.unit
    assert "EnvironmentFile=/etc/xlane/env\n" in host.unit
    assert "StandardOutput=journal+console\n" in host.unit


def test_the_second_boot_only_starts(host: Host):
    host.metadata["xlane-cache"] = "gs://b/cache"
    host.boot()
    kept = {
        path: path.stat().st_mtime_ns
        for path in host.root.rglob("*")
        if path.is_file() and path.name != "calls"
    }
    calls = host.boot()
    assert [
        call for call in calls if call.split()[0] in ("pip", "xlane", "gcloud", "systemd-run", "chown")
    ] == []
    assert calls[-2:] == ["systemctl daemon-reload", "systemctl start xlane"]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_boot_that_broke_off_is_made_good(host: Host):
    host.boot()
    (host.root / "opt/xlane/.installed").unlink()
    calls = host.boot()
    assert any(call.startswith("pip install") for call in calls)
    assert calls[-1] == "systemctl restart xlane"


def test_changed_metadata_restart_the_server(host: Host):
    host.boot()
    host.metadata |= {
        "xlane-env": "# longer\nMAX_TOTAL_TOKENS=4096\n",
        "xlane-version": "0.2.0",
        "xlane-revision": "v1",
    }
    calls = host.boot()
    assert "pip install --quiet --no-deps xlane==0.2.0" in calls
    assert "xlane warmup" in calls
    assert calls[-1] == "systemctl restart xlane"
    settings = read("serve", host.environment)
    assert (settings.engine.max_total_tokens, settings.engine.revision) == (4096, "v1")


def test_secrets_are_for_root_and_show_in_no_command_line(host: Host):
    host.metadata |= {"xlane-hf-token-secret": "hf", "xlane-api-key-secret": "key"}
    calls = host.boot()
    assert (host.environment["HF_TOKEN"], host.environment["API_KEY"]) == ("value-of-hf", "value-of-key")
    assert (host.root / "etc/xlane/env").stat().st_mode & 0o777 == 0o600
    assert "value-of" not in " ".join(calls) + host.said + host.unit


def test_weights_come_from_a_bucket_and_programs_go_to_one(host: Host):
    host.metadata |= {
        "xlane-model-id": "gs://b/weights",
        "xlane-cache": "gs://b/cache",
        "xlane-package": "gs://b/x.whl",
    }
    calls = host.boot()
    model, cache = "/var/lib/xlane/model", "/var/lib/xlane/cache"
    assert host.environment["MODEL_ID"] == f"{host.root}{model}"
    assert (
        f"gcloud storage rsync --recursive --delete-unmatched-destination-objects gs://b/weights {model}"
        in calls
    )
    assert "pip install --quiet --no-deps /var/lib/xlane/x.whl" in calls
    order = [
        calls.index(f"gcloud storage rsync --recursive gs://b/cache {cache}"),
        calls.index("xlane warmup"),
    ]
    assert order == sorted(order)
    assert calls.index(f"gcloud storage rsync --recursive {cache} gs://b/cache") > order[-1]


def test_weights_lie_on_a_disk(host: Host):
    host.metadata |= {"xlane-model-id": "/mnt/xlane/m", "xlane-weights-disk": "weights"}
    assert "mount -o ro,noload /dev/disk/by-id/google-weights /mnt/xlane" in host.boot()
    assert host.environment["MODEL_ID"] == "/mnt/xlane/m"


@pytest.mark.parametrize("endpoints", ["n:1:10.0.0.2,n:2:10.0.0.3", "10.0.0.2,10.0.0.3"])
@pytest.mark.parametrize(("worker", "command"), [("0", "serve"), ("1", "engine --drain=95")])
def test_the_hosts_of_a_slice_serve_together(host: Host, endpoints: str, worker: str, command: str):
    host.metadata |= {"worker-network-endpoints": endpoints, "agent-worker-number": worker}
    calls = host.boot()
    assert "xlane warmup" not in calls
    assert f"ExecStart=/opt/xlane/bin/xlane {command}\n" in host.unit
    engine = read(command.split()[0], host.environment).engine
    assert (engine.coordinator, engine.processes, engine.process_id) == ("10.0.0.2:8476", 2, int(worker))


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"xlane-model-id": ""}, "no xlane-model-id"),
        ({"xlane-env": 'A="b"'}, 'xlane-env: A="b": expected VARIABLE=value'),
        ({"worker-network-endpoints": "a,b"}, "no agent-worker-number"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_starts_nothing(host: Host, metadata: dict[str, str], words: str):
    host.metadata |= metadata
    calls = host.boot(code=1)
    assert words in host.said
    assert [call for call in calls if call.startswith("systemctl")] == []


def test_a_secret_that_cannot_be_read_starts_nothing(host: Host):
    host.metadata["xlane-api-key-secret"] = "gone"
    (host.root / "stubs/gcloud").write_text("#!/bin/bash\nexit 1\n")
    assert [call for call in host.boot(code=1) if call.startswith("systemctl")] == []
