"""Every flag and variable of `text-generation-launcher`: it works, or is noted, or is refused by name. None is lost.

The list is TGI 3.3's. A name that changes its category changes here, where it can be seen.
"""

from typing import Any

import pytest

from tests.deploy import from_tgi
from xlane.server import flags
from xlane.server.cli import Settings, choose, settle
from xlane.server.options import UsageError

WORKS: dict[str, tuple[str, str, Any]] = {
    "model-id": ("o/m", "engine.model_id", "o/m"),
    "revision": ("refs/pr/3", "engine.revision", "refs/pr/3"),
    "validation-workers": ("3", "server.validation_workers", 3),
    "sharded": ("false", "engine.model_parallel", 1),
    "num-shard": ("4", "engine.model_parallel", 4),
    "dtype": ("bfloat16", "engine.dtype", "bfloat16"),
    "kv-cache-dtype": ("int8", "engine.kv_dtype", "int8"),
    "quantize": ("int4", "engine.quantize", "int4"),
    "max-concurrent-requests": ("9", "server.max_concurrent_requests", 9),
    "max-best-of": ("3", "server.max_best_of", 3),
    "max-stop-sequences": ("6", "server.max_stop_sequences", 6),
    "max-top-n-tokens": ("7", "server.max_top_n_tokens", 7),
    "max-input-tokens": ("100", "engine.max_input_tokens", 100),
    "max-input-length": ("100", "engine.max_input_tokens", 100),
    "max-total-tokens": ("512", "engine.max_total_tokens", 512),
    "max-batch-prefill-tokens": ("4096", "engine.prefill_chunk_tokens", 4096),
    "max-batch-size": ("16", "engine.lanes", 16),
    "hostname": ("127.0.0.1", "server.host", "127.0.0.1"),
    "port": ("8080", "server.port", 8080),
    "shard-uds-path": ("/tmp/x", "run.uds_path", "/tmp/x"),
    "huggingface-hub-cache": ("/hub", "run.hub_cache", "/hub"),
    "cuda-memory-fraction": ("0.5", "engine.memory_fraction", 0.5),
    "json-output": ("true", "run.json_output", True),
    "otlp-endpoint": ("http://c:4317", "server.otlp_endpoint", "http://c:4317"),
    "otlp-service-name": ("x", "server.otlp_service_name", "x"),
    "cors-allow-origin": ("http://a,http://b", "server.cors_allow_origins", ("http://a", "http://b")),
    "api-key": ("k", "server.api_key", "k"),
    "watermark-gamma": ("0.25", "engine.watermark_gamma", 0.25),
    "watermark-delta": ("4", "engine.watermark_delta", 4.0),
    "lora-adapters": ("a=/a,o/b", "engine.lora_adapters", ("a=/a", "o/b")),
    "speculate": ("4", "engine.speculate", 4),
    "env": ("true", "run.show_env", True),
    "tokenizer-config-path": ("/t", "server.tokenizer_config_path", "/t"),
    "max-client-batch-size": ("5", "server.max_client_batch_size", 5),
    "enable-prefill-logprobs": ("false", "server.prompt_logprobs", False),
    "disable-grammar-support": ("true", "server.disable_grammar_support", True),
    "payload-limit": ("1000", "server.payload_limit", 1000),
    "graceful-termination-timeout": ("30", "server.graceful_termination_timeout_s", 30.0),
}
"""Flag -> a value, the field it sets, what that is then."""

NOTED = {
    "trust-remote-code": "true", "waiting-served-ratio": "0.3", "max-waiting-tokens": "20", "cuda-graphs": "1,2",
    "max-batch-total-tokens": "16000", "disable-custom-kernels": "true", "prometheus-port": "9000",
    "master-addr": "localhost", "master-port": "29500",
    "ngrok-authtoken": "t", "ngrok-edge": "e", "usage-stats": "on",
}  # fmt: skip
"""Taken, and told that it has no meaning here: no answer differs for want of it."""

REFUSED = {
    "rope-scaling": "linear",
    "rope-factor": "2.0", "weights-cache-override": "/w", "ngrok": "true",
}  # fmt: skip
"""Answers would differ from what was asked for."""

REFUSED_VALUES = {
    "kv-cache-dtype": ["fp8_e4m3fn", "fp8_e5m2"],
    "quantize": "eetq exl2 marlin bitsandbytes bitsandbytes-nf4 bitsandbytes-fp4".split(),  # noqa: SIM905
}
"""TGI's values of a flag that has others here."""

VARIABLES_NOTED = """PREFIX_CACHING ATTENTION PREFILL_CHUNKING TGI_WIGGLE_ROOM USE_FLASH_ATTENTION LOG_COLORIZE COMPUTE_TYPE
    MAX_IMAGE_FETCH_SIZE HF_KERNELS_CACHE XPU_MEMORY_FRACTION DISABLE_EXLLAMA EXLLAMA_VERSION
    USE_CUTLASS_W8A8""".split()  # noqa: SIM905
VARIABLES_OF_OTHERS = """HF_API_TOKEN HF_TOKEN HUGGING_FACE_HUB_TOKEN HF_HUB_OFFLINE HF_HUB_ENABLE_HF_TRANSFER
    HF_HUB_USER_AGENT_ORIGIN OMP_NUM_THREADS CUDA_VISIBLE_DEVICES NVIDIA_VISIBLE_DEVICES ZE_AFFINITY_MASK DEBUG RANK
    WORLD_SIZE REQUEST_LOGPROBS SAFETENSORS_FAST_GPU ROCM_PATH PYTORCH_TUNABLEOP_ENABLED""".split()  # noqa: SIM905
"""Read by the Hub's client, the drivers or the numerics libraries themselves, or set by TGI's launcher for its shards."""

LISTED = """model-id revision validation-workers sharded num-shard quantize speculate dtype kv-cache-dtype
    trust-remote-code max-concurrent-requests max-best-of max-stop-sequences max-top-n-tokens max-input-tokens
    max-input-length max-total-tokens waiting-served-ratio max-batch-prefill-tokens max-batch-total-tokens
    max-waiting-tokens max-batch-size cuda-graphs hostname port prometheus-port shard-uds-path master-addr master-port
    huggingface-hub-cache weights-cache-override disable-custom-kernels cuda-memory-fraction rope-scaling rope-factor
    json-output otlp-endpoint otlp-service-name cors-allow-origin api-key watermark-gamma watermark-delta ngrok
    ngrok-authtoken ngrok-edge tokenizer-config-path disable-grammar-support env max-client-batch-size lora-adapters
    usage-stats payload-limit enable-prefill-logprobs graceful-termination-timeout""".split()  # noqa: SIM905


def read(*argv: str, **environ: str) -> Settings:
    command, rest = choose(["serve", *argv])
    return settle(command, rest, environ, flags.TGI_DEFAULTS)


def variable(flag: str) -> str:
    return flag.upper().replace("-", "_")


def field(settings: Settings, target: str) -> Any:
    config, _, name = target.partition(".")
    return getattr(getattr(settings, config), name)


def test_every_flag_has_one_category():
    categories = [*WORKS, *NOTED, *REFUSED]
    assert sorted(categories) == sorted(LISTED)
    assert set(NOTED) == {flag.name for flag in flags.NO_MEANING}
    assert set(REFUSED) == {flag.name for flag in flags.REFUSED}
    assert set(VARIABLES_NOTED) == set(flags.ENV_WITHOUT_MEANING)


@pytest.mark.parametrize("name", WORKS)
def test_it_works(name: str):
    raw, target, value = WORKS[name]
    assert field(read(), target) != value
    typed = read(f"--{name}", raw)
    assert field(typed, target) == value
    assert typed.options.notes == []
    if name != "env":  # The one flag without a variable.
        assert field(read(**{variable(name): raw}), target) == value


@pytest.mark.parametrize("name", NOTED)
def test_it_is_noted(name: str):
    typed, set_ = read(f"--{name}", NOTED[name]), read(**{variable(name): NOTED[name]})
    for settings, origin in ((typed, f"--{name}"), (set_, variable(name))):
        [note] = settings.options.notes
        assert note.startswith(f"{origin} has no meaning here: ")
    assert typed.engine == set_.engine == read().engine


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name(name: str):
    for argv, environ, origin in (
        ([f"--{name}", REFUSED[name]], {}, f"--{name}"),
        ([], {variable(name): REFUSED[name]}, variable(name)),
    ):
        with pytest.raises(UsageError, match=f"^{origin}={REFUSED[name]} is not supported: .{{10,}}"):
            read(*argv, **environ)


@pytest.mark.parametrize(
    ("name", "raw"), [(name, raw) for name, all in REFUSED_VALUES.items() for raw in all]
)
def test_a_value_is_refused_by_name(name: str, raw: str):
    for argv, environ, origin in (
        ([f"--{name}={raw}"], {}, f"--{name}"),
        ([], {variable(name): raw}, variable(name)),
    ):
        with pytest.raises(UsageError, match=f"^{origin}={raw} is not supported: .{{10,}}"):
            read(*argv, **environ)


@pytest.mark.parametrize("name", VARIABLES_NOTED)
def test_a_variable_is_noted(name: str):
    [note] = read(**{name: "1"}).options.notes
    assert note.startswith(f"{name} has no meaning here: ")


def test_variables_of_others_are_left_to_them():
    settings = read(**dict.fromkeys(VARIABLES_OF_OTHERS, "1"))
    assert settings.options.notes == []
    assert settings.engine == read().engine


def test_the_prompts_log_probabilities_are_on_with_tgis_flag_and_without():
    assert read().server.prompt_logprobs
    assert read("--enable-prefill-logprobs").server.prompt_logprobs


def test_log_level_works():
    assert read(LOG_LEVEL="debug").run.log_level == "debug"


def test_the_short_flags():
    settings = read("-p", "8080", "-e", "-g", "5")
    assert (settings.server.port, settings.run.show_env) == (8080, True)
    assert settings.server.graceful_termination_timeout_s == 5


def test_the_page_for_those_who_come_from_tgi_is_up_to_date():
    page = from_tgi.PAGE.read_text()
    assert from_tgi.page(page) == page, "run `python -m tests.deploy.from_tgi`"
