"""The names of array dimensions and of device dimensions. The one place where they are spelled."""

from collections.abc import Callable
from typing import Literal

import jax

LogicalAxis = Literal["tokens", "kv_heads", "heads", "ffn", "experts", "vocab"]
"""`tokens`: rows of a launch · `kv_heads`, `heads`: attention heads · `ffn`: feed-forward width · `experts`:
feed-forwards of which each token takes few · `vocab`: vocabulary."""

MeshAxis = Literal["data", "model"]

Constrain = Callable[["jax.Array", tuple[str | None, ...]], "jax.Array"]
"""Says, while tracing, how an array lies: one logical axis name (or None) per dimension."""
