#!/usr/bin/env bash
# Start-up script of a Cloud TPU VM: installs xlane, brings the weights, compiles, and keeps the server running. It runs at every
# boot and does only what is not done yet; every host of a slice runs it and learns from its metadata which one it is.
#
#   gcloud compute tpus tpu-vm create NAME … --metadata-from-file=startup-script=tpu/startup.sh \
#     --metadata=xlane-model-id=Qwen/Qwen3-8B,xlane-hf-token-secret=hf-token
#
# Metadata, all but the first optional:
#   xlane-model-id         Hub repository, gs://BUCKET/PATH of safetensors, or a path on xlane-weights-disk
#   xlane-revision         branch, tag or commit on the Hub
#   xlane-env              more options, as lines VARIABLE=value (`xlane serve --help` names the variables)
#   xlane-version          release to install; default the one this script came with
#   xlane-package          gs://… of a wheel to install instead
#   xlane-weights-disk     device name of an attached disk, mounted read-only at /mnt/xlane
#   xlane-cache            gs://BUCKET/PATH for compiled programs, shared by all who serve the same
#   xlane-hf-token-secret, xlane-api-key-secret    names in Secret Manager
#   xlane-port             default 8080
#
# Logs: `journalctl -u google-startup-scripts -u xlane`, and the serial console.
set -euo pipefail
shopt -s inherit_errexit

VERSION=0.1.0
COORDINATOR_PORT=8476
ROOT="${XLANE_ROOT:-}" # a rehearsal's throw-away root
PREFIX="$ROOT/opt/xlane"
STATE="$ROOT/var/lib/xlane"
ENVIRONMENT="$ROOT/etc/xlane/env"
UNIT="$ROOT/etc/systemd/system/xlane.service"
MOUNT="$ROOT/mnt/xlane"

say() { echo "xlane: $*"; }
die() {
  echo "xlane: $*" >&2
  exit 1
}

# metadata NAME: the instance attribute, empty if it is not set.
metadata() {
  local answer status
  answer="$(mktemp)"
  status="$(curl --silent --show-error --retry 5 --retry-connrefused --header 'Metadata-Flavor: Google' \
    --output "$answer" --write-out '%{http_code}' \
    "http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1/instance/attributes/$1")" ||
    die "the metadata server does not answer"
  case "$status" in
    200) cat "$answer" ;;
    404) ;;
    *) die "the metadata server answers $status for $1" ;;
  esac
  rm -f "$answer"
}

secret() { gcloud secrets versions access latest --secret="$1"; }

changed=no # whether a server that runs already is out of date

# replace FILE MODE TEXT
replace() {
  local new="$1.new"
  [[ ! -f "$1" || "$(<"$1")" != "$3" ]] || return 0
  mkdir -p "$(dirname "$1")"
  install --mode="$2" /dev/null "$new"
  printf '%s\n' "$3" >"$new"
  mv "$new" "$1"
  changed=yes
}

# find_python: one that is new enough; the image's own may not be.
find_python() {
  local python
  for python in python3.13 python3.12 python3.11 python3; do
    if "$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$python"
      return
    fi
  done
  apt-get -qq update >&2
  apt-get -qq install --yes python3.11-venv >&2
  echo python3.11
}

install_package() {
  local version package wanted python
  version="$(metadata xlane-version)"
  package="$(metadata xlane-package)"
  wanted="${package:-xlane==${version:-$VERSION}}"
  if [[ "$(cat "$PREFIX/.installed" 2>/dev/null)" == "$wanted" ]]; then
    say "$wanted is installed"
    return
  fi
  say "installing $wanted"
  python="$(find_python)"
  rm -rf "$PREFIX" # a half-installed one is not mended but made anew
  "$python" -m venv "$PREFIX"
  if [[ "$package" == gs://* ]]; then
    gcloud storage cp "$package" "$STATE/"
    "$PREFIX/bin/pip" install --quiet --no-deps "$STATE/$(basename "$package")"
  else
    "$PREFIX/bin/pip" install --quiet --no-deps "xlane==${version:-$VERSION}"
  fi
  # It brings the list of what it was tested with.
  "$PREFIX/bin/pip" install --quiet --require-hashes \
    --requirement "$PREFIX"/lib/python3*/site-packages/xlane/tpu/requirements-tpu.lock
  echo "$wanted" >"$PREFIX/.installed"
  changed=yes
}

# bring_weights MODEL: mounts or downloads, and prints what to give as the model's id. From the Hub the server fetches itself.
bring_weights() {
  local disk
  disk="$(metadata xlane-weights-disk)"
  if [[ -n "$disk" ]] && ! mountpoint -q "$MOUNT"; then
    mkdir -p "$MOUNT"
    mount -o ro,noload "/dev/disk/by-id/google-$disk" "$MOUNT" >&2
  fi
  if [[ "$1" == gs://* ]]; then
    mkdir -p "$STATE/model"
    gcloud storage rsync --recursive --delete-unmatched-destination-objects "$1" "$STATE/model" >&2
    echo "$STATE/model"
  else
    echo "$1"
  fi
}

# The lines of xlane-env, those that systemd takes as they are.
extra_environment() {
  local given line
  given="$(metadata xlane-env)"
  while IFS= read -r line; do
    [[ -n "$line" && "$line" != '#'* ]] || continue
    [[ "$line" =~ ^[A-Z_][A-Z0-9_]*=[^\"\'\\]*$ ]] ||
      die "xlane-env: $line: expected VARIABLE=value, without quotes or backslashes"
    echo "$line"
  done <<<"$given"
}

# workers: the slice's addresses, one a line, process 0 first. Endpoints are addresses, or name:id:address.
workers() { metadata worker-network-endpoints | tr ',' '\n' | sed 's/.*://; /^$/d'; }

# optional VARIABLE VALUE
optional() { [[ -z "$2" ]] || echo "$1=$2"; }

# environment MODEL ADDRESSES PROCESS: everything the commands are told, secrets too, so that none shows in `ps`.
environment() {
  local port token key value text
  value="$(metadata xlane-revision)"
  port="$(metadata xlane-port)"
  token="$(metadata xlane-hf-token-secret)"
  key="$(metadata xlane-api-key-secret)"
  echo "MODEL_ID=$1"
  optional REVISION "$value"
  echo "HOSTNAME=0.0.0.0"
  echo "PORT=${port:-8080}"
  echo "HF_HOME=$STATE/hub"
  echo "XLANE_CACHE_DIR=$STATE/cache"
  if [[ "$2" == *$'\n'* ]]; then
    echo "XLANE_COORDINATOR=${2%%$'\n'*}:$COORDINATOR_PORT"
    echo "XLANE_NUM_PROCESSES=$(wc -l <<<"$2")"
    echo "XLANE_PROCESS_ID=$3"
  fi
  extra_environment
  for value in "HF_TOKEN $token" "API_KEY $key"; do
    [[ "$value" != *' ' ]] || continue
    text="$(secret "${value#* }")" # printed as it was stored, most often without an end of line
    echo "${value% *}=$text"
  done
  [[ -n "$key" ]] || echo "XLANE_INSECURE=true" # without a key it is the network's firewall that decides who comes in
}

# unit COMMAND
unit() {
  cat <<UNIT
[Unit]
Description=xlane
After=network-online.target
Wants=network-online.target
StartLimitIntervalSec=0

[Service]
User=xlane
EnvironmentFile=${ENVIRONMENT#"$ROOT"}
ExecStart=${PREFIX#"$ROOT"}/bin/xlane $1
Restart=always
RestartSec=5
TimeoutStopSec=100
LimitMEMLOCK=infinity
LimitNOFILE=1048576
NoNewPrivileges=yes
StandardOutput=journal+console
StandardError=journal+console
UNIT
}

# warm ADDRESSES: compile, unless that was done for these very options. Several hosts compile together, when they start.
warm() {
  local bucket stamp
  bucket="$(metadata xlane-cache)"
  stamp="$(cat "$PREFIX/.installed" "$ENVIRONMENT" | sha256sum)"
  [[ "$(cat "$STATE/warmed" 2>/dev/null)" != "$stamp" ]] || return 0
  if [[ -n "$bucket" ]]; then
    gcloud storage rsync --recursive "$bucket" "$STATE/cache" || say "nothing to take from $bucket yet"
  fi
  chown -R xlane "$STATE"
  if [[ "$1" != *$'\n'* ]]; then
    say "compiling what is not in the cache"
    systemctl stop xlane 2>/dev/null || true # it holds the chips which the compiler asks about
    systemd-run --quiet --wait --pipe --collect --uid=xlane --property=EnvironmentFile="$ENVIRONMENT" \
      --property=LimitMEMLOCK=infinity "$PREFIX/bin/xlane" warmup
    [[ -z "$bucket" ]] || gcloud storage rsync --recursive "$STATE/cache" "$bucket"
  fi
  echo "$stamp" >"$STATE/warmed"
}

main() {
  local model addresses process command=serve text
  model="$(metadata xlane-model-id)"
  [[ -n "$model" ]] || die "the metadata has no xlane-model-id: which model is to be served?"
  addresses="$(workers)"
  process="$(metadata agent-worker-number)"
  if [[ "$addresses" == *$'\n'* ]]; then
    [[ -n "$process" ]] || die "the slice has several hosts, and no agent-worker-number says which this is"
    [[ "$process" == 0 ]] || command="engine --drain=95" # the leader's requests end on it
  fi
  id xlane >/dev/null 2>&1 || useradd --system --home-dir "$STATE" xlane
  mkdir -p "$STATE/cache"

  install_package
  model="$(bring_weights "$model")"
  text="$(environment "$model" "$addresses" "$process")"
  replace "$ENVIRONMENT" 600 "$text"
  text="$(unit "$command")"
  replace "$UNIT" 644 "$text"
  warm "$addresses"
  # Not enabled: at a boot this script starts it, when all of the above is known to be so.
  systemctl daemon-reload
  if [[ "$changed" == yes ]]; then systemctl restart xlane; else systemctl start xlane; fi
  say "started \`xlane $command\`; journalctl -fu xlane tells how it goes"
}

main
