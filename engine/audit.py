"""What a compiler made of the programs, held against what was meant. Works for devices that only compile, too.

Knows the programs' promises; not how to keep them.
"""

import math

import jax

from ..models.attention import BLOCK_TOKENS
from .hlo import Collective, aliases, collectives, moves, sorts
from .programs import Programs
from .prompt_scores import SCORE_WIDTH, block_rows
from .request import ProgramInfo
from .state import abstract_kv, abstract_state, held_bytes
from .step import Blueprint
from .turn import Size


def faults(programs: Programs) -> list[str]:
    """Whatever is wrong with any of the programs, a line each; none is the rule."""
    sizes = {size.name: size for size in programs.blueprint.sizes}
    return [
        f"{info.name}: {fault}"
        for info in programs.infos
        for fault in _faults(programs.blueprint, sizes[info.name], info, programs[info.name].as_text())
    ]


def _faults(blueprint: Blueprint, size: Size, info: ProgramInfo, text: str) -> list[str]:
    kv = abstract_kv(blueprint.config, blueprint.shapes, blueprint.kv_dtype, blueprint.placement)
    donated = (
        kv,
        abstract_state(blueprint.shapes, blueprint.placement, adapters=blueprint.config.lora is not None),
    )
    found: list[str] = []
    arrays, wanted = aliases(text), len(jax.tree.leaves(donated))
    held = held_bytes(donated) // blueprint.placement.mesh.size
    if arrays != wanted or info.alias_bytes < held:
        found.append(
            f"{arrays} of {wanted} arrays of KV and state are updated in place, {info.alias_bytes} of {held} bytes"
        )
    pool = math.prod(kv[0].k.sharding.shard_shape(kv[0].k.shape))
    # A pool that is smaller than what a launch computes cannot be told from it by its size.
    if pool > _launch_elements(blueprint, size):
        found += [f"moves a layer's KV: {line[:160]}" for line in moves(text, pool)]
    # XLA:TPU orders the few numbers of a scatter to add up what meets.
    found += [f"sorts: {line[:160]}" for line in sorts(text, blueprint.config.vocab_size)]
    # What experts and a split of the lanes move besides is not counted here.
    dense = blueprint.config.experts is None
    if dense and blueprint.placement.model_size > 1 and blueprint.placement.data_size == 1:
        found += _traffic(blueprint, size, collectives(text))
    return found


def _launch_elements(blueprint: Blueprint, size: Size) -> int:
    """Of the largest array that a launch computes: feed-forward, logits, or the keys of a block of pages for each row."""
    config, shapes = blueprint.config, blueprint.shapes
    logits = size.rows + blueprint.segments(size)
    if size.tokens:
        logits = max(logits, block_rows(shapes.lanes))
    block = max(BLOCK_TOKENS, shapes.page_tokens) * config.kv_heads * config.head_dim
    return max(
        block * (1 if size.tokens else size.rows),
        logits * config.vocab_size,
        sum(size) * max(2 * config.ffn_size, config.hidden_size),
    )


def _traffic(blueprint: Blueprint, size: Size, found: list[Collective]) -> list[str]:
    """Over a model axis: sums of the launch's activations, two a layer, and elsewhere nothing larger than logits."""
    config, rows = blueprint.config, sum(size)
    inside = [one for one in found if "_run_layer" in one.where]
    wrong = [
        f"{one.kind} of {one.elements} elements in a layer" for one in inside if one.kind != "all-reduce"
    ]
    summed = sum(one.elements for one in inside if one.kind == "all-reduce")
    meant = 2 * config.layers * rows * config.hidden_size
    if not 0 < summed <= meant:
        wrong.append(f"layers add up {summed} elements between devices, and {meant} are meant")
    most = rows * max(config.vocab_size, config.hidden_size, SCORE_WIDTH)
    elsewhere = [one for one in found if "_run_layer" not in one.where and one.elements > most]
    return wrong + [f"{one.kind} of {one.elements} elements in {one.where}" for one in elsewhere]
