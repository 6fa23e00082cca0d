"""The demo model's GGUF with every tensor as float32, so that peers that read GGUF can be measured at equal precision.

python -m tests.bench.f32_gguf OUT.gguf
"""

import sys
from pathlib import Path

import gguf
import numpy as np

from xlane.models.demo import default_cache_dir, demo_model

SKIPPED = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")


def write_f32(source: Path, target: Path) -> None:
    """Copy the metadata, dequantise the tensors."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith(SKIPPED):
            kind = field.types[0]
            writer.add_key_value(
                field.name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None
            )
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values.reshape([int(n) for n in reversed(tensor.shape)]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write_f32(demo_model(default_cache_dir()), Path(sys.argv[1]))
