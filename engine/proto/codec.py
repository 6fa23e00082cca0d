"""The seam's values to wire messages and back, field for field. Knows both forms; not how messages travel.

Written out by hand rather than by reflection: a batch is encoded and decoded once a step, on the hot path.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import (
    DeadlineExceeded,
    EngineError,
    EngineLost,
    EngineStopped,
    InvalidRequest,
    Overloaded,
    PlanError,
    RequestFailed,
)
from ..local import Delivery, RequestError
from ..request import (
    EngineInfo,
    EngineStats,
    FinishReason,
    Histogram,
    LaneStats,
    LaunchStats,
    LogprobsMode,
    ProgramInfo,
    Request,
    SamplingParams,
    StepOutput,
    Timing,
    TokenOutput,
)
from . import xlane_pb2 as pb

ERROR_CODES: dict[type[EngineError], pb.ErrorCode] = {
    EngineError: pb.ERROR_CODE_UNSPECIFIED,
    InvalidRequest: pb.ERROR_CODE_INVALID_REQUEST,
    Overloaded: pb.ERROR_CODE_OVERLOADED,
    RequestFailed: pb.ERROR_CODE_REQUEST_FAILED,
    DeadlineExceeded: pb.ERROR_CODE_DEADLINE_EXCEEDED,
    EngineLost: pb.ERROR_CODE_ENGINE_LOST,
    EngineStopped: pb.ERROR_CODE_ENGINE_STOPPED,
    PlanError: pb.ERROR_CODE_PLAN_ERROR,
}
"""One code per class."""

_ERROR_TYPES = {code: kind for kind, code in ERROR_CODES.items()}
_FINISH_CODES: dict[FinishReason | None, pb.FinishReason] = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
}
_FINISH_REASONS = {code: reason for reason, code in _FINISH_CODES.items()}
_MODE_CODES = {
    LogprobsMode.RAW: pb.LOGPROBS_MODE_RAW,
    LogprobsMode.PROCESSED: pb.LOGPROBS_MODE_PROCESSED,
}
_MODES = {code: mode for mode, code in _MODE_CODES.items()}

_SAME_SAMPLING = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "seed",
    "logprobs",
    "top_logprobs",
    "min_tokens",
    "watermark",
)
_SAME_PROGRAM = ("name", "compile_s", "argument_bytes", "alias_bytes", "temp_bytes", "flops")
_SAME_INFO = (
    "model_id",
    "dtype",
    "platform",
    "device_kind",
    "device_count",
    "vocab_size",
    "max_total_tokens",
    "max_input_tokens",
    "lanes",
    "pages",
    "page_tokens",
    "max_queued",
    "kernels",
    "warning",
    "memory_bytes",
    "quantize",
    "kv_dtype",
    "parameters",
    "weights_bytes",
    "kv_bytes",
    "temp_bytes",
    "speculate",
    "version",
)
_SAME_STATS = (
    "lanes_active",
    "queued",
    "pages_free",
    "pages_remembered",
    "pages_total",
    "steps",
    "prefill_tokens",
    "decode_tokens",
    "preemptions",
    "compiles_after_ready",
    "step_ms",
    "queue_wait_s",
    "host_ms",
    "gap_ms",
    "joins",
    "guessed_tokens",
)
_LANE_STATS = (
    "lane",
    "prefill",
    "prompt_tokens",
    "cached_tokens",
    "generated_tokens",
    "computed_tokens",
    "most_tokens",
    "pages",
    "age_s",
)
_LAUNCH_STATS = ("whole_s", "device_s", "emit_s")


def _fields(source: object, names: Iterable[str]) -> dict[str, Any]:
    """Fields with the same name and meaning on both sides (off the hot path only)."""
    return {name: getattr(source, name) for name in names}


def encode_request(request: Request) -> pb.Request:
    """Raises InvalidRequest if a number does not fit its wire type: negative ids, a seed of more than 64 bits."""
    sampling = request.sampling
    try:
        return pb.Request(
            id=request.id,
            prompt_ids=request.prompt_ids,
            sampling=pb.SamplingParams(
                stop_ids=sampling.stop_ids,
                logprobs_mode=_MODE_CODES[sampling.logprobs_mode],
                bias_ids=[token for token, _ in sampling.logit_bias],
                biases=[bias for _, bias in sampling.logit_bias],
                **_fields(sampling, _SAME_SAMPLING),
            ),
            resume_ids=request.resume_ids,
            priority=request.priority,
            deadline_s=request.deadline_s,
            grammar=request.grammar,
            cache_salt=request.cache_salt,
            owner=request.owner,
            weight=request.weight,
            adapter=request.adapter,
            prompt_logprobs=request.prompt_logprobs,
        )
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"the request cannot be sent to the engine: {error}") from error


def decode_request(message: pb.Request) -> Request:
    """The inverse of `encode_request`."""
    sampling = message.sampling
    return Request(
        id=message.id,
        prompt_ids=tuple(message.prompt_ids),
        sampling=SamplingParams(
            stop_ids=tuple(sampling.stop_ids),
            logprobs_mode=_MODES.get(sampling.logprobs_mode, LogprobsMode.RAW),
            logit_bias=tuple(zip(sampling.bias_ids, sampling.biases, strict=True)),
            **_fields(sampling, _SAME_SAMPLING),
        ),
        resume_ids=tuple(message.resume_ids),
        priority=message.priority,
        deadline_s=message.deadline_s if message.HasField("deadline_s") else None,
        grammar=message.grammar if message.HasField("grammar") else None,
        cache_salt=message.cache_salt,
        owner=message.owner,
        weight=message.weight or 1,  # not said
        adapter=message.adapter,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
    )


def encode_batch(batch: Sequence[Delivery]) -> pb.StepBatch:
    """All entries in one message."""
    outputs, errors = [], []
    for item in batch:
        if isinstance(item, StepOutput):
            outputs.append(_encode_output(item))
        else:
            errors.append(encode_error(item))
    return pb.StepBatch(outputs=outputs, errors=errors)


def decode_batch(message: pb.StepBatch) -> list[Delivery]:
    """The inverse of `encode_batch`; errors come last, which is where they are in every request's stream."""
    batch: list[Delivery] = [_decode_output(output) for output in message.outputs]
    batch.extend(decode_error(error) for error in message.errors)
    return batch


def _encode_output(output: StepOutput) -> pb.StepOutput:
    message = pb.StepOutput(request_id=output.request_id)
    _encode_tokens(output.tokens, message)
    if output.prompt:
        _encode_tokens(output.prompt, message.prompt)
    if output.cached_tokens:
        message.cached_tokens = output.cached_tokens
    if output.finish_reason is not None:
        message.finish_reason = _FINISH_CODES[output.finish_reason]
    if (timing := output.timing) is not None:
        message.timing.queue_s = timing.queue_s
        message.timing.first_token_s = timing.first_token_s
        message.timing.total_s = timing.total_s
        message.timing.SetInParent()  # all zeros is still a timing
    return message


def _encode_tokens(tokens: Sequence[TokenOutput], message: pb.StepOutput | pb.PromptLogprobs) -> None:
    message.token_ids.extend([token.id for token in tokens])
    if tokens and tokens[0].logprob is not None:  # asked for, so every token has one
        message.logprobs.extend([token.logprob for token in tokens])  # pyright: ignore[reportArgumentType]
        if any(token.top for token in tokens):
            message.tops.extend([_encode_top(token.top) for token in tokens])


def _encode_top(top: tuple[tuple[int, float], ...]) -> pb.TopLogprobs:
    return pb.TopLogprobs(ids=[id for id, _ in top], logprobs=[logprob for _, logprob in top])


def _decode_output(message: pb.StepOutput) -> StepOutput:
    finish = message.finish_reason
    timing = None
    if message.HasField("timing"):
        timing = Timing(message.timing.queue_s, message.timing.first_token_s, message.timing.total_s)
    return StepOutput(
        message.request_id,
        _decode_tokens(message),
        _FINISH_REASONS[finish] if finish else None,
        message.cached_tokens,
        timing,
        _decode_tokens(message.prompt) if message.HasField("prompt") else (),
    )


def _decode_tokens(message: pb.StepOutput | pb.PromptLogprobs) -> tuple[TokenOutput, ...]:
    ids, logprobs, tops = message.token_ids, message.logprobs, message.tops
    if not logprobs:
        return tuple([TokenOutput(id) for id in ids])
    if not tops:
        return tuple([TokenOutput(id, logprob) for id, logprob in zip(ids, logprobs, strict=True)])
    return tuple(
        TokenOutput(id, logprob, tuple(zip(top.ids, top.logprobs, strict=True)))
        for id, logprob, top in zip(ids, logprobs, tops, strict=True)
    )


def encode_error(failed: RequestError) -> pb.RequestError:
    """A class outside the table travels as its nearest base in it."""
    error = failed.error
    return pb.RequestError(
        request_id=failed.request_id,
        code=next(ERROR_CODES[kind] for kind in type(error).__mro__ if kind in ERROR_CODES),
        message=str(error),
        retry_after_s=error.retry_after_s if isinstance(error, Overloaded) else 0.0,
    )


def decode_error(message: pb.RequestError) -> RequestError:
    """The inverse of `encode_error`."""
    kind = _ERROR_TYPES.get(message.code, EngineError)
    if kind is Overloaded:
        return RequestError(message.request_id, Overloaded(message.message, message.retry_after_s))
    return RequestError(message.request_id, kind(message.message))


def encode_info(info: EngineInfo) -> pb.EngineInfo:
    """What is served, as a message."""
    programs = [pb.ProgramInfo(**_fields(program, _SAME_PROGRAM)) for program in info.programs]
    return pb.EngineInfo(
        model_sha=info.model_sha, programs=programs, adapters=info.adapters, **_fields(info, _SAME_INFO)
    )


def decode_info(message: pb.EngineInfo) -> EngineInfo:
    """The inverse of `encode_info`."""
    return EngineInfo(
        model_sha=message.model_sha if message.HasField("model_sha") else None,
        programs=tuple(ProgramInfo(**_fields(program, _SAME_PROGRAM)) for program in message.programs),
        adapters=tuple(message.adapters),
        **_fields(message, _SAME_INFO),
    )


def encode_stats(stats: EngineStats) -> pb.EngineStats:
    """Counters, as a message."""
    return pb.EngineStats(
        prefill=_encode_launches(stats.prefill),
        decode=_encode_launches(stats.decode),
        prefill_rows=_encode_histogram(stats.prefill_rows),
        accepted=_encode_histogram(stats.accepted),
        taken_lanes=[pb.LaneStats(**_fields(lane, _LANE_STATS)) for lane in stats.taken_lanes],
        **_fields(stats, _SAME_STATS),
    )


def decode_stats(message: pb.EngineStats) -> EngineStats:
    """The inverse of `encode_stats`."""
    return EngineStats(
        prefill=_decode_launches(message.prefill),
        decode=_decode_launches(message.decode),
        prefill_rows=_decode_histogram(message.prefill_rows),
        accepted=_decode_histogram(message.accepted),
        taken_lanes=tuple(LaneStats(**_fields(lane, _LANE_STATS)) for lane in message.taken_lanes),
        **_fields(message, _SAME_STATS),
    )


def _encode_launches(stats: LaunchStats) -> pb.LaunchStats:
    return pb.LaunchStats(**{name: _encode_histogram(getattr(stats, name)) for name in _LAUNCH_STATS})


def _decode_launches(message: pb.LaunchStats) -> LaunchStats:
    return LaunchStats(**{name: _decode_histogram(getattr(message, name)) for name in _LAUNCH_STATS})


def _encode_histogram(histogram: Histogram) -> pb.Histogram:
    return pb.Histogram(counts=histogram.counts, sum=histogram.sum)


def _decode_histogram(message: pb.Histogram) -> Histogram:
    return Histogram(tuple(message.counts), message.sum)
