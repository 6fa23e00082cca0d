"""llama.cpp's two parts of what makes heads of a latent vector, as the one tensor that they were in the checkpoint.

Its converter cuts `kv_b_proj` into what makes keys, turned round, and what makes values. Knows these three names.
"""

from collections.abc import Iterable

import numpy as np

from .weights import TensorSource

KEYS, VALUES, WHOLE = "attn_k_b.weight", "attn_v_b.weight", "attn_kv_b.weight"
"""[N, rank, still], [N, value, rank] and [N * (still + value), rank]."""


class LatentTensors:
    """A `TensorSource` that passes on everything else."""

    def __init__(self, tensors: TensorSource) -> None:
        self._tensors = tensors
        cut = [name.removesuffix(KEYS) for name in tensors.names() if name.endswith(KEYS)]
        self._whole = {block + WHOLE: (block + KEYS, block + VALUES) for block in cut}

    def names(self) -> Iterable[str]:
        """Every tensor, the two parts as one."""
        parts = {name for pair in self._whole.values() for name in pair}
        return [*self._whole, *(name for name in self._tensors.names() if name not in parts)]

    def where(self, name: str) -> str:
        """The file, and the tensor's name in it."""
        return self._tensors.where(self._whole[name][0] if name in self._whole else name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Outputs first."""
        if name not in self._whole:
            return self._tensors.shape(name)
        (heads, rank, still), values = (self._tensors.shape(part) for part in self._whole[name])
        return (heads * (still + values[1]), rank)

    def dtype(self, name: str) -> np.dtype:
        """Of its first part."""
        return self._tensors.dtype(self._whole[name][0] if name in self._whole else name)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Entries start … stop-1 of the first axis."""
        if name not in self._whole:
            return self._tensors.read_rows(name, start, stop)
        rows = self.shape(name)[0] // self._tensors.shape(self._whole[name][0])[0]
        first, last = start // rows, -(-stop // rows)
        keys, values = (self._tensors.read_rows(part, first, last) for part in self._whole[name])
        heads = np.concatenate([keys.swapaxes(1, 2), values], axis=1)
        return heads.reshape(-1, heads.shape[-1])[start - first * rows : stop - first * rows]
