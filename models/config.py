"""The architecture of a decoder as data: every difference between families that the decoder knows is a field here.

Knows no checkpoint format: `families/*` read config.json or GGUF metadata into this.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from .spec import Quant


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Rope:
    """Llama 3.1's rescaling of rotary frequencies (transformers' `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnRope:
    """Peng et al. 2023 (`rope_type: yarn`): slow waves are stretched, fast ones kept, those between blended by a ramp."""

    factor: float
    beta_fast: float
    beta_slow: float
    """Turns within the original context at which a wave is kept, and at which it is wholly stretched."""
    original_max_position: int
    attention_factor: float
    """What rotated queries and keys are multiplied by."""
    truncate: bool = True
    """The ramp begins and ends at whole dimensions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRope:
    """Ding et al. 2024 (`rope_type: longrope`, Phi-3): every frequency has a divisor of its own, one set for contexts up to
    the original length and one for longer ones. Which of the two follows from `ModelConfig.max_positions`, the same for all
    texts: keys that were rotated by one set mean nothing to queries rotated by the other."""

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_position: int
    attention_factor: float
    long_attention_factor: float
    """What rotated queries and keys are multiplied by, with each set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicRope:
    """`rope_type: dynamic`: the base grows with the context (`ModelConfig.max_positions`) beyond the original one."""

    factor: float
    original_max_position: int


RopeScaling = Llama3Rope | YarnRope | LongRope | DynamicRope

Activation = Literal["silu", "gelu", "gelu_tanh", "gelu_sigmoid", "relu", "relu2"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A feed-forward made of many, of which each token goes through few (Shazeer et al. 2017). All of them have a gate."""

    count: int
    """X"""
    chosen: int
    """Of them, those that a token goes through."""
    ffn_size: int
    """F of each."""
    shares: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    """How much a token takes of each: a softmax over all experts, a sigmoid of each for itself, or SparseMixer's (Liu et al.
    2024, `mixer_jitter`)."""
    normalized: bool = True
    """The shares of those chosen are made to add up to 1."""
    share_scale: float = 1.0
    """What the shares are multiplied by after that."""
    choice_bias: bool = False
    """Each has a learned number that is added to its share while experts are chosen, and then no more (DeepSeek-V3)."""
    groups: int = 1
    """The experts are in so many groups of neighbours …"""
    chosen_groups: int = 1
    """… and a token's are chosen from so many of these, …"""
    group_best: int = 1
    """… those in which so many of the best experts add up to most."""
    mixer_jitter: float = 0.0
    """SparseMixer looks at the best expert and those that are worse by at most twice this part."""
    router_bias: bool = False
    wide_router: bool = False
    """Which experts a token takes is computed in float32, whatever the rest is in (DeepSeek)."""
    bias: bool = False
    """Biases on both projections of each expert."""
    shared_ffn_size: int = 0
    """F of one more that every token goes through; 0 for none."""
    shared_gate: bool = False
    """A token takes of that one what a sigmoid of a projection of its own says."""
    layers: tuple[bool, ...] = ()
    """Per layer: experts instead of one feed-forward? Empty means every layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """The keys and values of all heads are linear maps of one vector a token, and that vector is what is kept of it
    (multi-head latent attention, DeepSeek-AI 2024).

    A head's key is `still` numbers out of that vector and `rotary` ones, the same for all heads, that carry the position. Its
    map of the vector is taken to the query's side and its map to values behind the softmax. So attention is that of many query heads and one
    key head of `rank` + `rotary` dimensions, of which the first `rank` are the value: `ModelConfig` has kv_heads 1 and
    head_dim `rank` + `rotary`."""

    rank: int
    """Numbers of that vector."""
    rotary: int
    still: int
    value: int
    """Numbers of a head's value."""
    query_rank: int = 0
    """Queries are made of a vector of so many numbers; 0 where they are made of the stream itself."""
    norm_eps: float = 1e-6
    """Of the norms of these vectors."""


class StoredWeight(NamedTuple):
    """A parameter that is kept in the bits in which the checkpoint has it."""

    path: str
    quant: Quant
    ordered: bool
    """Its inputs are sorted by their scale, and the map's input is first put in the same order."""
    group: int = 0
    """Inputs that share a scale, of 8 bits; 0 for all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Adapters that tokens may be computed with, one or none each."""

    names: tuple[str, ...]
    """Of those that are there from the start, in the first slots."""
    digests: tuple[str, ...]
    """What each one's numbers are known by."""
    slots: int
    """How many there may be at once."""
    rank: int
    """The largest; smaller ones are filled up with zeros."""
    maps: tuple[tuple[str, int], ...]
    """Path of each linear map that any of them may change, and how many tensors are fused in it."""


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
    """K, divides N; 1 with `latent`"""
    kv_copies: int = 1
    """Of these heads so many in a row are one of the checkpoint's (`repeated.py`)."""
    head_dim: int
    """H, of a key"""
    ffn_size: int
    """F"""
    max_positions: int
    """The context the model was made for, in tokens."""

    # Positions
    rope_theta: float | None
    """Base of the rotary frequencies; None if no layer rotates."""
    rope_scaling: RopeScaling | None = None
    rope_linear_factor: float = 1.0
    """Positions are divided by this (`rope_type: linear`)."""
    rope_layers: tuple[bool, ...] = ()
    """Per layer: rotate queries and keys? Empty means every layer does (SmolLM3 skips some)."""
    rope_local_theta: float | None = None
    """Base of the layers with a window, which then are never rescaled (Gemma 3); None means they rotate as the others."""
    rotary_dim: int | None = None
    """The first this many dimensions of a head rotate; None means all."""
    rope_interleaved: bool = False
    """Neighbouring dimensions are a pair (GPT-J, Cohere), not the two halves of a head."""
    learned_positions: int = 0
    """Rows of a table of position vectors added to the embeddings; 0 for none."""
    position_offset: int = 0
    """Row of that table for position 0 (OPT)."""
    alibi_slopes: tuple[float, ...] = ()
    """Per query head: what a score loses for each token of distance (Press et al. 2021); empty for none."""

    # Norms
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float
    norm_scale: bool = True
    norm_bias: bool = False
    norm_plus_one: bool = False
    """Scales are stored as their distance from 1 (Gemma)."""
    pre_norms: bool = True
    """Attention and feed-forward read the stream through a norm."""
    post_norms: bool = False
    """What they return passes a norm before it is added to the stream."""
    parallel: bool = False
    """Both read the same stream, and their sum is added to it."""
    shared_norm: bool = False
    """With `parallel`: both read it through the same norm."""

    # Attention
    latent: Latent | None = None
    """What keys and values are made of, if not of the stream."""
    window: int | None = None
    """Sliding window in tokens: a query sees itself and the `window` - 1 tokens before it."""
    window_layers: tuple[bool, ...] = ()
    """Per layer: is `window` applied? Empty means every layer (when `window` is set)."""
    qkv_bias: bool = False
    """Biases on what is made of the stream: queries, keys, values, or with `latent` the vectors they come from."""
    output_bias: bool = False
    """Bias on the attention's output projection."""
    qk_norm: Literal["head", "each_head", "row"] | None = None
    """A norm of queries and of keys before the rotation: over each head with one scale for all (Qwen3) or one of its own
    (Cohere), or over all heads together (OLMo 2)."""
    qkv_clip: float | None = None
    """Queries, keys and values are cut to this absolute value (OLMo, MPT)."""
    attention_scale: float | None = None
    """What scores are multiplied by; None means 1/sqrt(H)."""
    attention_softcap: float | None = None
    """Scores s become c tanh(s / c)."""
    attention_sinks: bool = False
    """Each query head has a learned score that takes its share of the softmax and gives nothing (gpt-oss)."""

    # Feed-forward
    activation: Activation = "silu"
    gated: bool = True
    """The activation of one projection multiplies another one."""
    mlp_bias: bool = False
    gate_limit: float | None = None
    """The gate is cut above this, what it multiplies also below (gpt-oss)."""
    gate_plus_one: bool = False
    """What the gate multiplies is stored as its distance from 1 (gpt-oss)."""
    experts: Experts | None = None

    # Around the layers
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    residual_scale: float = 1.0
    """What attention and feed-forward return is multiplied by before it is added (Granite)."""
    tied_embeddings: bool = False
    """The output head is the embedding."""
    head_bias: bool = False
    logits_scale: float = 1.0
    logits_softcap: float | None = None
    """Logits l become c tanh(l / c)."""

    # Weights
    stored_by: str = ""
    """What quantised the checkpoint (`quant_method`); empty if nothing did."""
    stored: tuple[StoredWeight, ...] = ()
    """What is kept in few bits as it is stored."""
    lora: Lora | None = None

    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    """Ids that end a text, from generation_config.json when there is one."""

    @property
    def value_dim(self) -> int | None:
        """How many of a key's first numbers are its value; None where values are kept beside the keys."""
        return self.latent.rank if self.latent else None

    @property
    def value_size(self) -> int:
        """Numbers of what a query head brings back."""
        return self.latent.value if self.latent else self.head_dim

    def layer_window(self, layer: int) -> int | None:
        """The sliding window of one layer, or None."""
        return self.window if not self.window_layers or self.window_layers[layer] else None

    def layer_experts(self, layer: int) -> Experts | None:
        """The experts of one layer, or None where it has one feed-forward."""
        experts = self.experts
        return experts if experts and (not experts.layers or experts.layers[layer]) else None

    def layer_rotates(self, layer: int) -> bool:
        """Whether one layer uses rotary positions."""
        return self.rope_theta is not None and (not self.rope_layers or self.rope_layers[layer])

    def layer_rotates_locally(self, layer: int) -> bool:
        """Whether one layer turns by `rope_local_theta`."""
        return self.rope_local_theta is not None and self.layer_window(layer) is not None
