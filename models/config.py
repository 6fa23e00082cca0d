"""The architecture of a decoder as data: every difference between families that the decoder knows is a field here.

Knows no checkpoint format: `families/*` read config.json or GGUF metadata into this.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Rope:
    """Llama 3.1's rescaling of rotary frequencies (transformers' `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One decoder-only network. Letters as in the room's docstring."""

    family: str
    """Name of the family module that wrote this."""
    vocab_size: int
    """V"""
    hidden_size: int
    """D"""
    layers: int
    """L"""
    heads: int
    """N"""
    kv_heads: int
    """K, divides N"""
    head_dim: int
    """H"""
    ffn_size: int
    """F"""
    max_positions: int
    """The context the model was made for, in tokens."""
    norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Rope | None = None
    rope_linear_factor: float = 1.0
    """Positions are divided by this (`rope_type: linear`)."""
    rope_layers: tuple[bool, ...] = ()
    """Per layer: rotate queries and keys? Empty means every layer does (SmolLM3 skips some)."""
    window: int | None = None
    """Sliding window in tokens: a query sees itself and the `window` - 1 tokens before it."""
    window_layers: tuple[bool, ...] = ()
    """Per layer: is `window` applied? Empty means every layer (when `window` is set)."""
    tied_embeddings: bool = False
    """The output head is the embedding."""
    qkv_bias: bool = False
    output_bias: bool = False
    """Bias on the attention's output projection."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMS norm over each head of queries and keys before the rotation (Qwen3)."""
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    """Ids that end a text, from generation_config.json when there is one."""

    def layer_window(self, layer: int) -> int | None:
        """The sliding window of one layer, or None."""
        return self.window if not self.window_layers or self.window_layers[layer] else None

    def layer_rotates(self, layer: int) -> bool:
        """Whether one layer uses rotary positions."""
        return not self.rope_layers or self.rope_layers[layer]
