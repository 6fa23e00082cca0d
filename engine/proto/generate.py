"""Regenerates the Python of xlane.proto, with imports that name the installed package (`xlane.engine.proto…`).

Generated code refuses a protobuf or grpcio older than its generator, so the generator is the oldest we support:
grpcio-tools 1.76.0 writes code for protobuf 6.31 and grpcio 1.76, which also runs on protobuf 7. From the root of a
checkout:

    python -m venv /tmp/generate && /tmp/generate/bin/pip install grpcio-tools==1.76.0
    /tmp/generate/bin/python engine/proto/generate.py
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = "xlane/engine/proto"


def main() -> None:
    """Run protoc and put what it writes beside the .proto."""
    with tempfile.TemporaryDirectory() as out:
        outputs = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
        protoc = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PACKAGE}={HERE}", *outputs]
        subprocess.run([*protoc, f"{PACKAGE}/xlane.proto"], check=True)
        for generated in Path(out, PACKAGE).iterdir():
            shutil.copy(generated, HERE)


if __name__ == "__main__":
    main()
