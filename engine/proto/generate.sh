#!/usr/bin/env bash
# Regenerates the Python of xlane.proto, with imports that name the installed package (xlane.engine.proto…).
#
# Generated code refuses a protobuf or grpcio older than its generator, so the generator is the oldest we support:
# grpcio-tools 1.76.0 writes code for protobuf 6.31 and grpcio 1.76, which also runs on protobuf 7.
#
#   python -m venv /tmp/generate && /tmp/generate/bin/pip install grpcio-tools==1.76.0
#   PYTHON=/tmp/generate/bin/python engine/proto/generate.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
"${PYTHON:-python}" -m grpc_tools.protoc -I xlane/engine/proto=engine/proto \
    --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" xlane/engine/proto/xlane.proto
cp "$out"/xlane/engine/proto/xlane_pb2{.py,.pyi,_grpc.py} engine/proto/
