"""Draft heads at the start: what file they are in, whether they were made for this model, their weights on the device.

Knows files and placement; what heads compute is in `models.draft_heads`, what their guesses are worth in `draft`.
"""

import hashlib
from pathlib import Path

import numpy as np

from ..models.config import ModelConfig
from ..models.draft_heads import HeadsFile, HeadsShape, open_heads
from ..models.kernels import Weight
from ..models.loader import load_params
from ..models.spec import ParamSpec
from ..models.weights import WeightSource
from .config import EngineConfig
from .errors import PlanError
from .step import Blueprint

READ_ROWS = 64
"""Of the embedding, to tell models apart by."""


def heads_shape(config: EngineConfig, model: ModelConfig) -> HeadsShape | None:
    """Of the heads that are asked for. Raises PlanError if they cannot be this model's, CheckpointError if they are none."""
    if config.draft_model is None:
        return None
    if not config.speculate:
        raise PlanError(f"--draft-model {config.draft_model} guesses nothing without --speculate N")
    file = open_heads(Path(config.draft_model))
    if file.shape.hidden != model.hidden_size or file.tokens.max() >= model.vocab_size:
        raise _foreign(config, file)
    return file.shape


def load_heads(config: EngineConfig, blueprint: Blueprint, source: WeightSource | None) -> tuple[Weight, ...]:
    """The heads' weights, and the tokens that they can guess, in `Heads.of`'s order; nothing if none are asked for.

    Raises PlanError if they were made for another model.
    """
    if config.draft_model is None:
        return ()
    place, file = blueprint.placement.replicated, open_heads(Path(config.draft_model))
    if file.made_for != fingerprint(blueprint.graph.specs, source):
        raise _foreign(config, file)
    weights = load_params(blueprint.head_specs, file.source, lambda spec: place)
    return (*weights, blueprint.placement.put(file.tokens))


def fingerprint(specs: tuple[ParamSpec, ...], source: WeightSource | None) -> str:
    """Tells a checkpoint from others of its shape, whatever type it is served in: by its last norm and some embeddings."""
    if source is None:
        return "dummy"
    digest = hashlib.sha256()
    for spec in specs:
        if spec.path in ("norm.scale", "embed.weight"):
            index = (
                slice(0, READ_ROWS if spec.path == "embed.weight" else None),
                *[slice(None)] * (len(spec.shape) - 1),
            )
            plain = ParamSpec(spec.path, spec.shape, "float32", spec.axes)
            digest.update(np.ascontiguousarray(source.read(plain, index)).tobytes())
    return digest.hexdigest()


def _foreign(config: EngineConfig, file: HeadsFile) -> PlanError:
    return PlanError(
        f"--draft-model {config.draft_model} was made for {file.model_id}, and not for the weights of {config.model_id}: "
        "make heads for it with xlane train-draft"
    )
