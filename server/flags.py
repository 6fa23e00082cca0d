"""Every option there is, once: from this table come the flags, the environment variables, the help and the configs.

Names are Text Generation Inference's where it has one, with its environment variable; our own variables start with
XLANE_. What TGI has and we do not is listed too, so that a TGI command line works, or is refused by name: nothing is
ignored in silence. Knows no parsing (`options.py`) and nothing of what the options do.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..engine.config import EngineConfig
from ..engine.request import MAX_SPECULATE
from .bounds import BOUNDS, OF_TGI
from .config import ServerConfig
from .options import Flag, Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """How a command runs, apart from what it serves."""

    json_output: bool = False
    """Log and report progress as JSON lines."""
    log_level: str = "info"
    uds_path: str | None = None
    """Unix socket between front and engine; default a private temporary one."""
    hub_cache: str | None = None
    """Where downloaded models are kept; default the Hub client's own place."""
    engines: tuple[str, ...] = ()
    """Addresses of engines that run elsewhere; none starts one of our own."""
    show_env: bool = False


CONFIGS: Mapping[str, type] = {"engine": EngineConfig, "server": ServerConfig, "run": RunConfig}


PLATFORM_ENV = {
    "model-id": ("HF_MODEL_ID",),
    "revision": ("HF_MODEL_REVISION",),
    "num-shard": ("SM_NUM_GPUS",),
    "quantize": ("HF_MODEL_QUANTIZE",),
    "trust-remote-code": ("HF_MODEL_TRUST_REMOTE_CODE",),
    "port": ("AIP_HTTP_PORT", "SAGEMAKER_BIND_TO_PORT"),
}
"""Option -> variables by which SageMaker (HF_MODEL_…, SM_…) and Vertex AI (AIP_…) set it."""


NO_SUCH_QUANTIZATION = {
    "marlin": "GPTQ and AWQ checkpoints are read without it; leave it out",
    "exl2": "its checkpoints are not read; serve a GPTQ, AWQ or GGUF one, or the unquantized one with int8 or int4",
    **dict.fromkeys(("bitsandbytes", "eetq"), "take int8, which is made while the weights are read, too"),
    **dict.fromkeys(
        ("bitsandbytes-nf4", "bitsandbytes-fp4"), "take int4, which is made while the weights are read, too"
    ),
}
"""TGI's other kinds of `--quantize` -> what to use instead."""
NO_SUCH_KV_TYPE = dict.fromkeys(
    ("fp8_e4m3fn", "fp8_e5m2"), "take int8, which has its size and a scale for each vector"
)


def _tgi(name: str, to: str, help: str, kind: Kind = "text", **rest: Any) -> Flag:
    """An option TGI has: same name, same variable."""
    env, platform_env = name.upper().replace("-", "_"), PLATFORM_ENV.get(name, ())
    return Flag(name, to, help, kind, env=env, platform_env=platform_env, **rest)


def _own(name: str, to: str, help: str, kind: Kind = "text", **rest: Any) -> Flag:
    """An option TGI does not have."""
    return Flag(name, to, help, kind, env="XLANE_" + name.upper().replace("-", "_"), **rest)


FILE = _own(
    "config",
    "config",
    "Read options from this TOML file: NAME = VALUE, named as here without the dashes in front.",
)

MODEL = (
    _tgi(
        "model-id", "engine.model_id", "Hub repository, directory of safetensors, GGUF file, or `demo`.", default="demo"
    ),
    _tgi("revision", "engine.revision", "Branch, tag, commit or refs/pr/N on the Hub."),
    _tgi(
        "dtype", "engine.dtype", "Of weights, activations and KV; default float32 on CPU, bfloat16 elsewhere.",
        choices=("float32", "bfloat16"), why="for float16 take bfloat16, which has its size and does not overflow"
    ),
    _tgi(
        "quantize", "engine.quantize",
        "Keep weights in 8 bits (a scale for each output) or 4 (a scale for 32 inputs of each), made while they are read. A "
        "quantized checkpoint is kept as it is without; the others say how it must be.",
        choices=("int8", "int4", "gptq", "awq", "compressed-tensors", "fp8"), refused=NO_SUCH_QUANTIZATION
    ),
    _tgi(
        "kv-cache-dtype", "engine.kv_dtype", "Keep keys and values in 8 bits, with a scale for each token and head.",
        choices=("int8",), refused=NO_SUCH_KV_TYPE
    ),
    _own(
        "load-format", "engine.load_format", "`dummy` fills the weights with small random numbers, for benchmarks.",
        choices=("auto", "dummy")
    ),
    _tgi("huggingface-hub-cache", "run.hub_cache", "Where downloaded models are kept."),
    FILE,
)  # fmt: skip

LIMITS = (
    _tgi(
        "lora-adapters", "engine.lora_adapters",
        "PEFT adapters that requests may ask for by name: NAME=DIRECTORY, or a Hub repository, OWNER/NAME or OWNER/NAME@REVISION. "
        "slots=N keeps places for N that are loaded while serving, rank=N for their largest rank (16).",
        "list"
    ),
    _tgi(
        "max-total-tokens", "engine.max_total_tokens",
        "Most tokens of one request, prompt and output; default the model's context.", "int", at_least=2
    ),
    _tgi(
        "max-input-tokens", "engine.max_input_tokens", "Most prompt tokens; default --max-total-tokens - 1.", "int",
        at_least=1, also=("max-input-length",)
    ),
    _tgi("max-batch-size", "engine.lanes", "Most sequences that decode at once (lanes).", "int", at_least=1),
    _tgi(
        "max-batch-prefill-tokens", "engine.prefill_chunk_tokens",
        "Most prompt tokens computed in one launch.", "int", at_least=1
    ),
    _tgi(
        "watermark-gamma", "engine.watermark_gamma", "Share of the tokens that a request's watermark favours.", "float",
        at_least=0.01, at_most=0.99
    ),
    _tgi("watermark-delta", "engine.watermark_delta", "What a watermark adds to their logits.", "float", at_least=0),
    _own(
        "target-itl-ms", "engine.target_itl_ms",
        "Longest that a stream shall wait for its next token while other prompts are computed: decides how much of them a "
        "turn takes. Default: twice what it waits without them, four times while several are to be computed.", "float", at_least=0.001
    ),
    _tgi(
        "speculate", "engine.speculate",
        "Most tokens guessed at a time, from what the request said before, and verified in one step; 0 guesses none.",
        "int", at_least=0, at_most=MAX_SPECULATE
    ),
    _own(
        "draft-model", "engine.draft_model",
        "Draft heads that xlane train-draft made for this model: they guess where the text so far gives no hint."
    ),
    _own("max-queued", "engine.max_queued", "Requests that may wait for a lane; more get 429.", "int", at_least=0),
)  # fmt: skip

DEVICE = (
    _tgi(
        "num-shard", "engine.model_parallel", "Devices one copy of the model is split over; default all that are left.",
        "int", at_least=1
    ),
    _tgi("sharded", "sharded", "`false` is --num-shard 1.", "bool", hidden=True),
    _own("data-parallel", "engine.data_parallel", "Groups of devices the lanes are split over.", "int", at_least=1),
    _own(
        "coordinator", "engine.coordinator",
        "HOST:PORT of process 0, where the processes that serve one model together meet. Private networks only."
    ),
    _own("num-processes", "engine.processes", "Processes that serve one model together, one a host.", "int", at_least=1),
    _own(
        "process-id", "engine.process_id", "Which of them this is: 0 serves, `xlane engine` runs the others.", "int",
        at_least=0
    ),
    _own(
        "group-port", "engine.group_port",
        "Where process 0 tells the others what to launch; default the coordinator's port + 1.", "int", at_least=1,
        at_most=65535
    ),
    _own(
        "memory-fraction", "engine.memory_fraction", "Share of the device's memory to use in all.", "float",
        at_least=0.01, at_most=1, also=("cuda-memory-fraction",)
    ),
    _own(
        "kv-bytes", "engine.kv_bytes", "Memory for the KV pool; default what weights and temporaries leave.", "int",
        at_least=1
    ),
    _own(
        "page-tokens", "engine.page_tokens",
        "Tokens per KV page; default 32, on TPUs 128 or so many more as the longest context takes.", "int", at_least=1
    ),
    _own(
        "prefix-cache-path", "engine.prefix_cache_path",
        "File that keeps the prefix cache over a restart: written at an orderly end, read at the start."
    ),
    _own(
        "prefix-cache-bytes", "engine.prefix_cache_bytes", "Most bytes of pages in that file; what was used last is kept.",
        "int", at_least=1
    ),
    _own(
        "kernels", "engine.kernels", "Who computes attention and matmul; `native` is for CPUs, `pallas` for GPUs and TPUs.",
        choices=("auto", "xla", "native", "pallas")
    ),
    _own(
        "cache-dir", "engine.cache_dir",
        "Where compiled programs and the demo are kept; default ~/.cache/xlane, `none` keeps no programs."
    ),
)  # fmt: skip

HTTP = (
    _tgi("hostname", "server.host", "Address to listen on."),
    _tgi("port", "server.port", "0 takes a free one.", "int", short="p", at_least=0, at_most=65535),
    _tgi("api-key", "server.api_key", "Bearer key every POST must carry. The variable does not show in `ps`.", secret=True),
    _own(
        "api-key-file", "server.api_key_file",
        "More keys: lines NAME KEY [requests_per_min=N] [tokens_per_min=N] [concurrency=N] [weight=N] [admin]. Read anew when it changes."
    ),
    _own("ssl-certfile", "server.ssl_certfile", "Speak HTTPS with this certificate (PEM). Read anew when it changes."),
    _own("ssl-keyfile", "server.ssl_keyfile", "Its key, if it lies in a file of its own."),
    _own("insecure", "server.insecure", "Let in everybody who reaches the address, without a key.", "bool"),
    _tgi("cors-allow-origin", "server.cors_allow_origins", "Origins whose pages may call this server.", "list"),
    Flag(
        "vertex-predict-route", "server.predict_route", "One more path for POST /vertex.", env="AIP_PREDICT_ROUTE",
        must_start="/", hidden=True
    ),
    Flag(
        "vertex-health-route", "server.health_route", "One more path for GET /health.", env="AIP_HEALTH_ROUTE",
        must_start="/", hidden=True
    ),
    _tgi(
        "tokenizer-config-path", "server.tokenizer_config_path",
        "A tokenizer_config.json whose chat template goes before the model's own."
    ),
    _own(
        "more-models", "server.more_models",
        "Models beside --model-id, as ID or NAME=ID: each is loaded when a request asks for it.", "list"
    ),
    _own(
        "loaded-models", "server.loaded_models",
        "Most models in memory at once; each gets its part of it, and the one not used the longest leaves.", "int", at_least=1
    ),
    _own("served-model-name", "server.served_model_name", "Name of the model in replies; default its id."),
    _own(
        "reasoning-parser", "server.reasoning_parser",
        "`auto` parts a model's thinking (<think> … </think>) from its answers; `none` leaves it in the text.",
        choices=("auto", "none")
    ),
    _tgi(
        "disable-grammar-support", "server.disable_grammar_support",
        "Refuse requests that need a grammar: JSON schemas, regular expressions, calls that have to be made.", "bool"
    ),
    _tgi("payload-limit", "server.payload_limit", "Largest request body, bytes.", "int", at_least=1),
    _tgi(
        "max-concurrent-requests", "server.max_concurrent_requests", "Most sequences in flight, waiting ones included.",
        "int", at_least=1
    ),
    _tgi(
        "enable-prefill-logprobs", "server.prompt_logprobs",
        "Let requests ask for the log-probabilities of their prompt; unlike TGI, on by default.", "bool"
    ),
    _tgi("validation-workers", "server.validation_workers", "Threads that tokenise.", "int", at_least=1),
    _tgi(
        "graceful-termination-timeout", "server.graceful_termination_timeout_s",
        "Seconds that running requests have to finish after a stop is asked for.", "float", short="g", at_least=0
    ),
    _own(
        "drain-delay", "server.drain_delay_s",
        "Seconds for which requests are still taken after a stop is asked for, while /health says no already: as long as a load "
        "balancer needs to see it.", "float", at_least=0
    ),
    _own(
        "limit", "limit",
        f"NAME=VALUE: move a bound that few need to. {', '.join(bound.name for bound in BOUNDS)}.", "list", members=BOUNDS
    ),
    *(
        _tgi(bound.name.replace("_", "-"), bound.to, f"{bound.help} The same as --limit {bound.name}=N.", "int",
             at_least=bound.at_least, at_most=bound.at_most, hidden=True)
        for bound in BOUNDS if bound.name in OF_TGI
    ),
    _tgi("otlp-endpoint", "server.otlp_endpoint", "Send traces there, by OTLP over gRPC; needs the extra `otel`."),
    _tgi("otlp-service-name", "server.otlp_service_name", "Who the traces are from."),
)  # fmt: skip

DRY_RUN = Flag(
    "dry-run", "dry_run", "Say what would be done, and why; load nothing, listen to nobody.", "bool"
)

SHOW = (Flag("origin", "origin", "Also say where each value is from.", "bool"),)

LOG = (
    _tgi("json-output", "run.json_output", "Log and report progress as JSON lines.", "bool"),
    Flag(
        "log-level", "run.log_level", "How much is logged.", env="LOG_LEVEL", choices=("debug", "info", "warning", "error")
    ),
)  # fmt: skip

RUN = (
    *LOG,
    _tgi(
        "shard-uds-path", "run.uds_path", "Unix socket between front and engine; default a private one.", hidden=True
    ),
    _own(
        "engine", "run.engines",
        "Start no engine: use those that run at unix:/PATH, HOST:PORT or dns:///NAME:PORT (all of its addresses), as `xlane "
        "engine` does. They decide all that is of the model.", "list"
    ),
    Flag("env", "run.show_env", "Also say which versions and devices are here.", "bool", short="e"),
)  # fmt: skip

JSON = (Flag("json", "json", "Print one JSON object.", "bool"),)

ENGINE = (
    *LOG,
    Flag("uds", "uds", "Serve gRPC on this Unix socket."),
    Flag(
        "listen", "listen", "Serve gRPC on this HOST:PORT, which asks for no password: private networks only."
    ),
    Flag(
        "drain",
        "drain_s",
        "Seconds that running requests have after SIGTERM; the rest goes on in other engines, if there are any.",
        "float",
        default=25.0,
        at_least=0,
    ),
    Flag("model-path", "model_path", "Where the model lies, if it need not be looked for."),
    Flag("model-sha", "model_sha", "The commit it was fetched at."),
    Flag(
        "progress-fd",
        "progress_fd",
        "Write progress as JSON lines to this file descriptor.",
        "int",
        at_least=0,
    ),
)

API_KEY = tuple(flag for flag in HTTP if flag.name == "api-key")

PLAN = (
    *LOG,
    Flag("topology", "topology", "Plan for these chips (v6e-8, v5e-4, h200, h100-8, ...), which need not be here."),
    Flag("compile", "compile", "Compile the largest programs and check what the compiler made of them: minutes.", "bool"),
    *JSON,
)  # fmt: skip

TRAIN = (
    *LOG,
    Flag("output", "output", "Folder to write the heads to, for --draft-model.", default="draft-heads"),
    Flag("text", "text", "Learn from the text in this file; default what the model writes by itself, which suits it best."),
    Flag("tokens", "tokens", "How much it writes, in tokens.", "int", default=60_000, at_least=2_000),
    Flag("heads", "heads", "Tokens to guess at a time.", "int", default=3, at_least=1, at_most=MAX_SPECULATE),
    Flag("epochs", "epochs", "How often all of it is gone through.", "int", default=4, at_least=1),
)  # fmt: skip

BENCH = (
    *LOG,
    Flag("prompt-tokens", "prompt_tokens", "Length of each prompt.", "int", default=512, at_least=1),
    Flag("output-tokens", "output_tokens", "Tokens generated for each.", "int", default=128, at_least=2),
    Flag(
        "concurrency",
        "concurrency",
        "Sequences at once; several runs with commas.",
        "ints",
        default=(1, 8),
        at_least=1,
    ),
    Flag("json", "json", "Print the JSON line only.", "bool"),
)

BENCH_SERVE = (
    Flag("url", "url", "The server.", default="http://127.0.0.1:3000"),
    Flag(
        "api", "api", "Which streaming endpoint.", default="openai", choices=("openai", "chat", "tgi", "llama.cpp"),
        why="/v1/completions, /v1/chat/completions, /generate_stream or /completion"
    ),
    Flag("model", "model", "Name of the model in requests; default the first the server lists."),
    Flag("prompt-tokens", "prompt_tokens", "Length of each prompt, exactly; default 128.", "int", at_least=1),
    Flag("output-tokens", "output_tokens", "Tokens generated for each, exactly; default 128.", "int", at_least=1),
    Flag(
        "workload", "workload",
        "A file of requests to choose from: JSON objects with prompt_tokens and output_tokens, with prompt and "
        "output_tokens, or ShareGPT's conversations; one a line, or an array."
    ),
    Flag("concurrency", "concurrency", "Clients that each wait for their answer; several runs with commas; default 1,8.",
         "ints", at_least=1),
    Flag("rate", "rate", "Requests a second at random moments (Poisson), instead of waiting clients; several runs with "
         "commas.", "floats", at_least=0.001),
    Flag("requests", "requests", "Requests a run; default 4 for each client, at least 16; 64 at a rate.", "int",
         at_least=1),
    Flag("warmup", "warmup", "Requests before the clock starts.", "int", default=1, at_least=0),
    Flag("shared-prefix", "shared_prefix", "Tokens at the start that all prompts share.", "int", default=0, at_least=0),
    Flag("slo", "slo", "What a request must keep to for goodput: ttft_ms=500,itl_ms=50; also tpot_ms and e2e_ms. itl_ms "
         "is of a stream's longest pause.", "list"),
    Flag("extra-body", "extra_body", "A JSON object merged into every request; null takes a field away."),
    Flag("seed", "seed", "Of prompts and arrivals; default a new one each time.", "int"),
    Flag("api-key", "api_key", "Bearer key.", env="API_KEY"),
    Flag("plot", "plot", "Draw the runs into this .png or .svg; needs the extra `plot`."),
    Flag("json", "json", "Print the JSON line only.", "bool"),
)  # fmt: skip

SERVER = (
    Flag("url", "url", "The server.", default="http://127.0.0.1:3000"),
    Flag("api-key", "api_key", "Bearer key.", env="API_KEY"),
)
TOP = (
    *SERVER,
    Flag("interval", "interval", "Seconds between two looks.", "float", default=0.5, at_least=0.05),
    Flag("once", "once", "Print one look and leave.", "bool"),
)
BATCH = (
    *LOG,
    Flag("input", "input", "Requests, as OpenAI's batches have them: a line of JSON each.", short="i"),
    Flag("output", "output", "Where answers go, a line each; those it has are not asked for again.", short="o"),
    Flag("url", "url", "Ask this server; default the model is loaded for the batch."),
    Flag("api-key", "api_key", "Its bearer key.", env="API_KEY"),
    Flag(
        "concurrency", "concurrency", "Requests at once; default twice the lanes, or 64 with --url.", "int", at_least=1
    ),
)  # fmt: skip
CHAT = (*SERVER, Flag("system", "system", "What the model is told before the conversation."))

_NO_MEANING = {
    "trust-remote-code": "code that comes with a model is never run",
    "waiting-served-ratio": "prompts are computed between decode steps, nothing waits for a batch",
    "max-waiting-tokens": "prompts are computed between decode steps, nothing waits for a batch",
    "max-batch-total-tokens": "the KV pool takes the memory that is left; --kv-bytes sets it",
    "cuda-graphs": "every program is compiled ahead by XLA",
    "disable-custom-kernels": "--kernels xla takes XLA's own",
    "prometheus-port": "/metrics is on the main port",
    "master-addr": "the engine's processes find each other by themselves",
    "master-port": "the engine's processes find each other by themselves",
    "ngrok-authtoken": "there is no tunnel",
    "ngrok-edge": "there is no tunnel",
    "usage-stats": "nothing is sent anywhere",
}
_REFUSED = {
    "rope-scaling": "positions scale as the model's config.json says",
    "rope-factor": "positions scale as the model's config.json says",
    "weights-cache-override": "give the directory itself as --model-id",
    "ngrok": "there is no tunnel; put a proxy in front",
}
_BOOLEAN = {
    "trust-remote-code",
    "disable-custom-kernels",
    "ngrok",
}


def _foreign(name: str, fate: Literal["no meaning", "refused"], why: str) -> Flag:
    kind = "bool" if name in _BOOLEAN else "text"
    return _tgi(name, "", "", kind, fate=fate, why=why)


NO_MEANING = tuple(_foreign(name, "no meaning", why) for name, why in _NO_MEANING.items())
REFUSED = tuple(_foreign(name, "refused", why) for name, why in _REFUSED.items())
FOREIGN = NO_MEANING + REFUSED

_NO_SUCH_KERNELS = "--kernels chooses, and there are no such kernels"
ENV_WITHOUT_MEANING = {
    "PREFIX_CACHING": "prefixes are always cached",
    "PREFILL_CHUNKING": "prompts are always computed in chunks",
    "ATTENTION": "--kernels chooses",
    "USE_FLASH_ATTENTION": "--kernels chooses",
    "TGI_WIGGLE_ROOM": "memory is measured, not estimated; --memory-fraction sets the share",
    "XPU_MEMORY_FRACTION": "--memory-fraction sets the share",
    "COMPUTE_TYPE": "the header x-compute-type names the device",
    "LOG_COLORIZE": "colours are for terminals; NO_COLOR=1 switches them off",
    "MAX_IMAGE_FETCH_SIZE": "no images are fetched",
    "HF_KERNELS_CACHE": "kernels come with the package",
    "DISABLE_EXLLAMA": _NO_SUCH_KERNELS,
    "EXLLAMA_VERSION": _NO_SUCH_KERNELS,
    "USE_CUTLASS_W8A8": _NO_SUCH_KERNELS,
}
"""Variables of TGI that never were flags."""

TGI_DEFAULTS: Mapping[str, Any] = {
    "hostname": "0.0.0.0",
    "cors-allow-origin": ("*",),
    "otlp-service-name": "text-generation-inference.router",
    "max-stop-sequences": 4,
    "max-client-batch-size": 4,
}
"""Where `text-generation-launcher` differs from `xlane serve`, which opens nothing to strangers unless told to, and takes
what OpenAI's clients send."""


def engine_arguments(config: EngineConfig) -> list[str]:
    """The arguments that make `xlane engine` build this config: the table read backwards."""
    values = dataclasses.asdict(config)
    found: list[str] = []
    for flag in (*MODEL, *LIMITS, *DEVICE):
        room, _, name = flag.to.partition(".")
        if room == "engine" and name in values:  # The first of several names of one field.
            value = values.pop(name)
            if name == "cache_dir" and value is None:
                value = "none"
            if isinstance(value, tuple):
                value = ",".join(value) or None
            if value is not None:
                found.append(f"{flag.option}={value}")
    return found
