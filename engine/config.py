"""Every choice an engine is built with, in one frozen value. Built by the command line or by a test; read everywhere."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .errors import PlanError

ADAPTER_PLACES = {"slots": 256, "rank": 1024}
"""What may be said of adapters to come among `lora_adapters`, and at most."""
DEFAULT_ADAPTER_RANK = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How to serve a model. `None` means: decide from the model and the device, and say what was decided."""

    model_id: str
    """Hub repository, directory of safetensors, GGUF file, or `demo`."""
    revision: str | None = None
    """Hub revision: branch, tag, commit or `refs/pr/N`."""
    load_format: str = "auto"
    """`auto` reads the checkpoint; `dummy` fills the weights with small random numbers, for benchmarks."""
    dtype: str | None = None
    """`float32` or `bfloat16`, for weights, activations and KV; default float32 on CPU, bfloat16 elsewhere."""
    quantize: Literal["int8", "int4", "gptq", "awq", "compressed-tensors", "fp8"] | None = None
    """Keep weights in 8 bits (a scale for each output) or 4 (one for 32 inputs of each); default as the checkpoint has them, which
    may be said by the name of what quantised it."""
    kv_dtype: Literal["int8"] | None = None
    """Keep keys and values in 8 bits, with a scale for each token and head; default in `dtype`."""

    data_parallel: int = 1
    """Size of the mesh axis `data`: lanes are split over it."""
    model_parallel: int | None = None
    """Size of the mesh axis `model`: heads, feed-forward and vocabulary are split over it; default all devices left."""

    coordinator: str | None = None
    """HOST:PORT of process 0, where the processes of one engine meet; needed if there are several."""
    processes: int = 1
    """Processes that serve one model together, each with the devices of its own host."""
    process_id: int = 0
    """Which of them this one is. 0 leads: it takes the requests, the others follow it."""
    group_port: int | None = None
    """Where process 0 tells the others what to launch; default the coordinator's port + 1."""

    lanes: int | None = None
    """Most sequences that decode at once (rows of the largest decode program)."""
    max_total_tokens: int | None = None
    """Most tokens of one request, prompt and output; default the model's context."""
    max_input_tokens: int | None = None
    """Most prompt tokens; default `max_total_tokens` - 1."""
    page_tokens: int | None = None
    """Tokens per KV page; default what the platform's kernels like best (`Kernels.page_tokens`)."""
    kv_bytes: int | None = None
    """Memory for the KV pool; default what is left after weights and the programs' temporaries."""
    memory_fraction: float = 0.9
    """Share of the device's memory the engine may use in all."""
    prefill_chunk_tokens: int | None = None
    """Most prompt tokens computed in one launch."""
    target_itl_ms: float | None = None
    """Longest a stream shall wait for its next token while prompts are computed beside it; default twice what it waits without
    them. The smallest piece of a prompt is computed in any case."""
    speculate: int = 0
    """Most tokens guessed at a time for a sequence, and verified in the step that samples its next one; 0 guesses none."""
    lora_adapters: tuple[str, ...] = ()
    """Adapters (PEFT) that requests may ask for, each NAME=FOLDER. `slots=N` keeps places for N more that are loaded while serving,
    `rank=N` says of which rank at most."""
    draft_model: str | None = None
    """File of draft heads made for this model, which guess where the text so far gives no hint."""
    max_queued: int = 128
    """Requests that may wait for a lane before Overloaded is raised."""

    watermark_gamma: float = 0.5
    """Share of the tokens that a watermark favours, between 0 and 1."""
    watermark_delta: float = 2.0
    """What a watermark adds to their logits."""

    kernels: str = "auto"
    """`auto`, `xla`, `native` (CPU only) or `pallas` (GPU and TPU)."""
    prefix_cache_path: str | None = None
    """File that keeps the prefix cache while no engine runs: written at an orderly end, read at the start."""
    prefix_cache_bytes: int = 2**30
    """Most bytes of pages in that file; what was used last is kept."""
    cache_dir: str | None = None
    """Where compiled programs are kept between starts; None keeps none."""

    @property
    def adapters(self) -> tuple[tuple[str, str], ...]:
        """Name and folder of each adapter; what is not named has its folder as its name."""
        parted = [adapter.partition("=") for adapter in self.lora_adapters]
        return tuple((name, folder or name) for name, _, folder in parted if name not in ADAPTER_PLACES)

    @property
    def adapter_slots(self) -> int:
        """Places for adapters that are loaded while serving."""
        return self._adapter_places("slots", 0)

    @property
    def adapter_rank(self) -> int:
        """Largest rank of those."""
        return self._adapter_places("rank", DEFAULT_ADAPTER_RANK)

    def _adapter_places(self, asked: str, default: int) -> int:
        """Raises PlanError."""
        parted = [adapter.partition("=") for adapter in self.lora_adapters]
        values = [value for name, _, value in parted if name == asked]
        if len(values) > 1:
            said = ", ".join(f"{asked}={value}" for value in values)
            raise PlanError(f"--lora-adapters {said}: {asked} is said {len(values)} times, say it once")
        for value in values:
            if not value.isdecimal() or not 1 <= int(value) <= ADAPTER_PLACES[asked]:
                raise PlanError(
                    f"--lora-adapters {asked}={value}: expected a whole number from 1 to {ADAPTER_PLACES[asked]} ({asked} of adapters "
                    f"that are loaded while serving; none can be called {asked!r})"
                )
            return int(value)
        return default


def programs_folder(config: EngineConfig) -> Path | None:
    """Where compiled programs are kept, if at all."""
    return None if config.cache_dir is None else Path(config.cache_dir) / "programs"


def texts_folder(config: EngineConfig) -> Path | None:
    """Where what was traced is kept, if at all."""
    return None if config.cache_dir is None else Path(config.cache_dir) / "traced"
