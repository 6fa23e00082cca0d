"""Every choice the HTTP front is run with, in one frozen value. Knows no engine: model limits come from EngineInfo."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """How the front listens, whom it lets in and what it refuses before the engine hears of it."""

    host: str = "127.0.0.1"
    """Address to listen on; the default is reachable from this machine only."""
    port: int = 3000
    """TCP port; 0 takes a free one."""
    api_key: str | None = None
    """Key every POST must carry; None asks for none."""
    api_key_file: str | None = None
    """More keys, with a name and limits each, as `keys.py` says; read anew when it changes."""
    ssl_certfile: str | None = None
    """Certificates to speak HTTPS with, PEM, and maybe the key; read anew when it changes. None speaks HTTP."""
    ssl_keyfile: str | None = None
    """The certificate's key, if it lies elsewhere."""
    insecure: bool = False
    """Let everybody in who reaches the address, though no key is asked for."""
    cors_allow_origins: tuple[str, ...] = ()
    """Origins whose pages may call this server; `("*",)` is any, as TGI does by default; empty sends no CORS header, so
    that a stranger's page cannot use a server on the visitor's own machine."""
    served_model_name: str | None = None
    """Name shown in replies and model lists, and accepted as `model`; None shows the engine's model id."""

    more_models: tuple[str, ...] = ()
    """Other models on the same port, each an id or NAME=ID; loaded when they are asked for."""
    loaded_models: int = 1
    """Most of all of them in memory at once; each has its part of the engines' memory."""
    model_wait_s: float = 60.0
    """Seconds a request waits for its model to be loaded; then it is told to come back. A stream is told how far it is instead."""
    model_turn_s: float = 30.0
    """Seconds a model that is in use all the time keeps its place while another one waits for it."""

    tokenizer_config_path: str | None = None
    """A tokenizer_config.json whose chat template goes before the model's own."""
    predict_route: str | None = None
    """One more path for `POST /vertex`, as Vertex AI wants to choose it."""
    health_route: str | None = None
    """One more path for `GET /health`, likewise."""

    reasoning_parser: str = "auto"
    """`auto` parts the thinking of a model that thinks from its answers; `none` leaves it in their text."""

    disable_grammar_support: bool = False
    """Refuse requests that a grammar is needed for: JSON schemas, regular expressions, calls that have to be made."""
    max_grammar_bytes: int = 500_000
    """Largest grammar of a request, the schemas of its tools included, UTF-8 bytes."""

    payload_limit: int = 2_000_000
    """Largest request body, bytes."""
    bodies_limit: int = 256_000_000
    """Most bytes of request bodies that are held at a time: as many as all permits need at their largest."""
    url_limit: int = 8_192
    """Longest path and query of a request, bytes."""
    header_limit: int = 32_768
    """Most bytes of a request's headers together."""
    header_count_limit: int = 100
    """Most header lines of a request."""
    header_timeout_s: float = 10.0
    """Seconds a client has to send a whole request head."""
    body_timeout_s: float = 30.0
    """Seconds a client has to send a request's body after its head."""
    max_connections: int = 4_096
    """Most open connections, idle ones included; fewer where the process may not have as many files."""
    keep_alive_timeout_s: int = 75
    """Seconds an idle connection is kept; longer than the pools of common clients, so that they close first."""

    max_concurrent_requests: int = 128
    """Most sequences in flight, waiting ones included; beyond it the answer is 429."""
    max_best_of: int = 2
    """Most sequences of one native request (`best_of`)."""
    max_choices: int = 16
    """Most sequences per prompt of one OpenAI request (`n`, `best_of`)."""
    max_stop_sequences: int = 64
    """Most stop strings of one request."""
    max_stop_chars: int = 1_000
    """Longest stop string, characters."""
    max_top_n_tokens: int = 5
    """Most alternatives per token of one native request."""
    prompt_logprobs: bool = True
    """Whether a request may ask for the log-probabilities of its prompt, which cost a prefill that skips no cached page."""
    max_client_batch_size: int = 64
    """Most prompts of one `/v1/completions` request."""
    max_token_bytes: int = 512
    """Longest text one token may stand for, UTF-8 bytes. A prompt longer than the token limit times this is refused
    without being tokenised."""

    validation_workers: int = 2
    """Threads that tokenise and render chat templates."""
    template_timeout_s: float = 5.0
    """Seconds of a processor that the rendering of one chat template may take."""
    template_memory_bytes: int = 256_000_000
    """Memory that it may take, beside the messages."""
    grammar_timeout_s: float = 5.0
    """Seconds a request waits for its grammar to be checked, other grammars before it included."""
    sse_keep_alive_s: float = 15.0
    """Seconds of silence after which a stream gets a comment, so that proxies keep it."""
    write_timeout_s: float = 60.0
    """Seconds a client may leave its answer unread, once buffers are full, before it is cut off and its lane freed."""
    drain_delay_s: float = 0.0
    """Seconds between a stop's asking, from when on /health says no, and the refusal of new requests."""
    graceful_termination_timeout_s: float = 90.0
    """Seconds running requests have to finish after a stop is asked for."""
    otlp_endpoint: str | None = None
    """Where traces are sent, by OTLP over gRPC; None makes none."""
    otlp_service_name: str = "xlane"
    """Who they are from."""

    @property
    def keyed(self) -> bool:
        """Whether a key is asked for."""
        return self.api_key is not None or self.api_key_file is not None
