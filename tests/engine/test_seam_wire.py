"""The wire form: nothing is lost on the way, the generated code is that of the .proto, one message carries a whole turn."""

import asyncio
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

from tests.support.fake_core import FakeCore
from xlane.engine import (
    DeadlineExceeded,
    EngineError,
    EngineInfo,
    EngineLost,
    EngineStats,
    EngineStopped,
    FinishReason,
    Histogram,
    InvalidRequest,
    LaneStats,
    LaunchStats,
    LogprobsMode,
    Overloaded,
    PlanError,
    ProgramInfo,
    Request,
    RequestFailed,
    SamplingParams,
    StepOutput,
    Timing,
    TokenOutput,
    errors,
)
from xlane.engine import proto as proto_package
from xlane.engine import rpc_server as server_module
from xlane.engine.local import Delivery, RequestError, Streams
from xlane.engine.proto import codec
from xlane.engine.proto import xlane_pb2 as pb
from xlane.engine.request import MAX_PROMPT_LOGPROBS
from xlane.engine.rpc_server import MAX_BATCH_ENTRIES, MAX_MESSAGE_BYTES

PROTO = Path(proto_package.__file__ or "").with_name("xlane.proto")

SAMPLING = SamplingParams(
    max_tokens=1,
    temperature=0.1,
    top_k=2,
    top_p=0.3,
    min_p=0.4,
    typical_p=0.5,
    repetition_penalty=1.6,
    frequency_penalty=-0.7,
    presence_penalty=0.8,
    seed=2**64 - 1,
    stop_ids=(9, 10),
    logprobs=True,
    top_logprobs=11,
    logprobs_mode=LogprobsMode.PROCESSED,
    min_tokens=3,
    logit_bias=((4, -100.0), (200_000, 0.5)),
    watermark=True,
)
REQUEST = Request(
    id="é",
    prompt_ids=(1, 200_000),
    sampling=SAMPLING,
    resume_ids=(3,),
    priority=-4,
    deadline_s=0.0,
    grammar='start: "é"',
    prompt_logprobs=0,
    cache_salt="ü",
    owner="ö",
    weight=3,
    adapter="ä",
)
TOKEN = TokenOutput(7, -1.5, ((7, -1.5), (8, -2.25)))


def through_the_wire(message):
    return type(message).FromString(message.SerializeToString())


@pytest.mark.parametrize(
    "request_",
    [
        REQUEST,
        replace(REQUEST, deadline_s=None, grammar=None, prompt_logprobs=None),
        replace(REQUEST, sampling=SamplingParams(max_tokens=5)),
    ],
)
def test_a_request_arrives_as_it_left(request_: Request):
    assert codec.decode_request(through_the_wire(codec.encode_request(request_))) == request_


def test_every_field_of_the_example_differs_from_its_default():
    plain = SamplingParams(max_tokens=0)
    assert [f.name for f in fields(SAMPLING) if getattr(SAMPLING, f.name) == getattr(plain, f.name)] == []


@pytest.mark.parametrize(
    "bad",
    [
        replace(REQUEST, prompt_ids=(-1,)),
        replace(REQUEST, sampling=replace(SAMPLING, seed=2**64)),
        replace(REQUEST, sampling=replace(SAMPLING, stop_ids=(2**32,))),
    ],
)
def test_numbers_that_do_not_fit_are_the_requests_fault(bad: Request):
    with pytest.raises(InvalidRequest, match="cannot be sent"):
        codec.encode_request(bad)


BATCH: list[Delivery] = [
    StepOutput("a", (TokenOutput(0),)),
    StepOutput("b", (TOKEN, replace(TOKEN, top=())), None, 12, Timing(0.5, 1.0, 1.0)),
    StepOutput("c", (TokenOutput(5, 0.0),), FinishReason.STOP, 0, Timing(0.0, 0.0, 0.0)),
    StepOutput("d", (), FinishReason.ABORT, 0, Timing(0.5, 1.5, 2.5)),
    StepOutput("a", (TokenOutput(1), TokenOutput(2)), FinishReason.LENGTH),
    StepOutput("e", (TokenOutput(3),), prompt=(TOKEN, replace(TOKEN, top=()))),
    StepOutput("f", (TokenOutput(3, -2.0),), prompt=(TokenOutput(6, -0.5),)),
]


def test_a_batch_arrives_as_it_left():
    assert codec.decode_batch(through_the_wire(codec.encode_batch(BATCH))) == BATCH


def subclasses(kind: type[EngineError]) -> list[type[EngineError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in subclasses(child))]


def test_every_error_has_a_code_of_its_own():
    drawn = [kind for kind in subclasses(EngineError) if kind.__module__ == errors.__name__]
    assert set(codec.ERROR_CODES) == set(drawn)
    assert sorted(codec.ERROR_CODES.values()) == sorted(pb.ErrorCode.values())


@pytest.mark.parametrize(
    "kind",
    [EngineError, InvalidRequest, RequestFailed, DeadlineExceeded, EngineLost, EngineStopped, PlanError],
)
def test_an_error_arrives_as_it_left(kind: type[EngineError]):
    arrived = codec.decode_error(through_the_wire(codec.encode_error(RequestError("r", kind("why")))))
    assert (arrived.request_id, type(arrived.error), str(arrived.error)) == ("r", kind, "why")


def test_overload_says_when_to_come_back():
    arrived = codec.decode_error(codec.encode_error(RequestError("r", Overloaded("full", 2.5)))).error
    assert isinstance(arrived, Overloaded)
    assert arrived.retry_after_s == 2.5


def test_an_error_of_another_room_travels_as_its_base():
    class Local(RequestFailed):
        """Only known here."""

    assert type(codec.decode_error(codec.encode_error(RequestError("r", Local("x")))).error) is RequestFailed


@pytest.mark.parametrize("sha", [None, "abc"])
def test_info_and_stats_arrive_as_they_left(sha: str | None):
    numbers = iter(range(1, 200))
    kinds = {
        "int": lambda: next(numbers),
        "str": lambda: f"s{next(numbers)}",
        "float": lambda: next(numbers) / 8,
    }

    def filled(kind: type) -> dict:
        return {
            f.name: kinds[str(getattr(f.type, "__name__", f.type))]()
            for f in fields(kind)
            if f.name not in odd
        }

    def histogram() -> Histogram:
        return Histogram(tuple(next(numbers) for _ in range(3)), next(numbers) / 8)

    odd = {
        "model_sha",
        "programs",
        "adapters",
        "prefill",
        "decode",
        "prefill_rows",
        "accepted",
        "taken_lanes",
    }
    programs = (ProgramInfo(**filled(ProgramInfo)), ProgramInfo(**filled(ProgramInfo)))
    info = EngineInfo(**filled(EngineInfo), model_sha=sha, programs=programs, adapters=("a", "b"))
    assert codec.decode_info(through_the_wire(codec.encode_info(info))) == info
    prefill, decode = (LaunchStats(*(histogram() for _ in range(3))) for _ in range(2))
    spreads = {"prefill": prefill, "decode": decode, "prefill_rows": histogram(), "accepted": histogram()}
    lanes = (LaneStats(**filled(LaneStats), prefill=True), LaneStats(**filled(LaneStats), prefill=False))
    stats = EngineStats(**filled(EngineStats), **spreads, taken_lanes=lanes)
    assert codec.decode_stats(through_the_wire(codec.encode_stats(stats))) == stats


def test_the_largest_batch_fits_a_message():
    top = tuple((200_000 + i, -float(i)) for i in range(20))
    largest = StepOutput(
        "x" * 36, (TokenOutput(200_000, -1.0, top),) * 8, FinishReason.STOP, 10**6, Timing(1, 1, 1)
    )
    assert len(codec.encode_batch([largest] * MAX_BATCH_ENTRIES).SerializeToString()) < MAX_MESSAGE_BYTES


def test_the_largest_batch_and_a_prompt_of_most_log_probabilities_fit_a_message():
    top = tuple((200_000 + i, -float(i)) for i in range(20))
    token = TokenOutput(200_000, -1.0, top)
    scored = StepOutput("x" * 36, (token,), prompt=(token,) * (MAX_PROMPT_LOGPROBS // 21))
    largest = StepOutput("x" * 36, (token,) * 8, FinishReason.STOP, 10**6, Timing(1, 1, 1))
    size = sum(
        len(codec.encode_batch(entries).SerializeToString())
        for entries in ([largest] * MAX_BATCH_ENTRIES, [scored])
    )
    assert size < MAX_MESSAGE_BYTES


def test_a_message_tells_of_one_prompt_at_most():
    token = TokenOutput(1, -1.0)
    plain, scored = StepOutput("a", (token,)), StepOutput("b", (token,), prompt=(token, token))

    async def scenario() -> list[list[str]]:
        connection = connection_of(FakeCore())
        connection.deliver([plain, scored, scored, plain, plain])
        await asyncio.sleep(0)  # it takes them on the loop
        connection.end()
        return [[one.request_id for one in message.outputs] async for message in connection.batches()]

    assert asyncio.run(scenario()) == [["a", "b"], ["b"], ["a", "a"]]


def connection_of(core: FakeCore):
    return server_module._Connection(core)


def test_a_turn_is_one_message_and_a_late_reader_gets_several_turns_in_one():
    async def scenario() -> list[int]:
        connection = connection_of(FakeCore())
        turn: list[Delivery] = [StepOutput(f"r{n}", (TokenOutput(n),)) for n in range(16)]
        batches = connection.batches()
        sizes = []
        for turns in (1, 3, 300):
            for _ in range(turns):
                await asyncio.to_thread(connection.deliver, list(turn))
            sizes.append(len((await anext(batches)).outputs))
        connection.end()
        return [*sizes, *[len(batch.outputs) async for batch in batches]]

    assert asyncio.run(scenario()) == [16, 48, MAX_BATCH_ENTRIES, 300 * 16 - MAX_BATCH_ENTRIES]


def test_what_is_made_sooner_than_the_pace_goes_together(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server_module, "PACE_S", 0.5)

    async def scenario() -> list[int]:
        connection = connection_of(FakeCore())
        batches = connection.batches()
        connection.deliver([StepOutput("a", (TokenOutput(0),))])
        first = await anext(batches)
        following = asyncio.ensure_future(anext(batches))
        for n in range(1, 6):
            await asyncio.sleep(0)
            connection.deliver([StepOutput("a", (TokenOutput(n),))])
        return [len(first.outputs), len((await following).outputs)]

    assert asyncio.run(scenario()) == [1, 5]


def test_who_reads_late_gets_what_waits_as_one_output():
    async def scenario() -> None:
        first = StepOutput(
            "a", (TokenOutput(1, -0.5),), None, 3, Timing(1.0, 2.0, 2.0), prompt=(TokenOutput(9, -1.0),)
        )
        last = StepOutput("a", (TokenOutput(3),), FinishReason.STOP, timing=Timing(1.0, 2.0, 3.0))
        streams = Streams()
        streams.open("a")
        reader = streams.read("a")
        streams.deliver([first])
        assert await anext(reader) == first
        streams.deliver([StepOutput("a", (TokenOutput(2),)), StepOutput("b", (TokenOutput(7),))])
        streams.deliver([last])
        assert [output async for output in reader] == [replace(last, tokens=(TokenOutput(2), TokenOutput(3)))]
        streams.open("b")
        streams.deliver([replace(first, request_id="b"), StepOutput("b", (TokenOutput(5),))])
        streams.fail("gone")
        reader = streams.read("b")
        assert await anext(reader) == replace(first, request_id="b", tokens=(*first.tokens, TokenOutput(5)))
        with pytest.raises(EngineLost, match="gone"):
            await anext(reader)

    asyncio.run(scenario())


def test_a_reader_that_never_reads_is_cut_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server_module, "MAX_UNREAD_ENTRIES", 10)

    async def scenario() -> list[pb.StepBatch]:
        connection = connection_of(FakeCore())
        connection.deliver([StepOutput("r", (TokenOutput(1),))] * 11)
        return [batch async for batch in connection.batches()]

    assert asyncio.run(scenario()) == []


SCALARS = {
    name.removeprefix("TYPE_").lower(): number
    for name, number in vars(FieldDescriptor).items()
    if name.startswith("TYPE_") and name != "TYPE_MESSAGE"
}


def read_proto(text: str) -> tuple[dict, dict, dict]:
    """Messages, enums and methods of a .proto of our plain kind: no nesting but oneofs, no options."""
    text = re.sub(r"//.*", "", text)
    text = re.sub(r"oneof \w+ \{(.*?)\}", r"\1", text, flags=re.DOTALL)
    blocks = re.findall(r"(message|enum|service) (\w+) \{(.*?)\}", text, flags=re.DOTALL)
    found: dict[str, dict] = {"message": {}, "enum": {}, "service": {}}
    for kind, name, body in blocks:
        if kind == "message":
            # A map is, on the wire and in the descriptor, repeated entries of a message named after the field.
            body = re.sub(
                r"map<[^>]*> (\w)(\w*) =",
                lambda m: f"repeated {m[1].upper()}{m[2]}Entry {m[1]}{m[2]} =",
                body,
            )
            rows = re.findall(r"(repeated |optional )?(\w+) (\w+) = (\d+);", body)
            found[kind][name] = {
                (field, int(number), label.strip(), type_) for label, type_, field, number in rows
            }
        elif kind == "enum":
            found[kind][name] = {
                (value, int(number)) for value, number in re.findall(r"(\w+) = (\d+);", body)
            }
        else:
            found[kind][name] = set(
                re.findall(r"rpc (\w+)\((stream )?(\w+)\) returns \((stream )?(\w+)\);", body)
            )
    return found["message"], found["enum"], found["service"]


def described_message(message: Descriptor) -> set:
    def label(field: FieldDescriptor) -> str:
        if field.is_repeated:
            return "repeated"
        return "optional" if field.has_presence and not field.message_type and not real_oneof(field) else ""

    def real_oneof(field: FieldDescriptor) -> bool:
        return field.containing_oneof is not None and not field.containing_oneof.name.startswith("_")

    def type_(field: FieldDescriptor) -> str:
        named: Descriptor | EnumDescriptor | None = field.message_type or field.enum_type
        return named.name if named else next(name for name, number in SCALARS.items() if number == field.type)

    return {(field.name, field.number, label(field), type_(field)) for field in message.fields}


def test_the_generated_code_is_that_of_the_proto():
    messages, enums, services = read_proto(PROTO.read_text())
    file = pb.DESCRIPTOR
    assert file.package == "xlane.engine.v1"
    assert {name: described_message(m) for name, m in file.message_types_by_name.items()} == messages
    assert {
        name: {(value.name, value.number) for value in enum.values}
        for name, enum in file.enum_types_by_name.items()
    } == enums
    methods = {
        name: {
            (
                m.name,
                "stream " * m.client_streaming,
                m.input_type.name,
                "stream " * m.server_streaming,
                m.output_type.name,
            )
            for m in service.methods
        }
        for name, service in file.services_by_name.items()
    }
    assert methods == services


def test_the_generator_was_the_oldest_we_support():
    generated = PROTO.with_name("xlane_pb2.py").read_text()
    assert "# Protobuf Python Version: 6.31.1\n" in generated
    assert "GRPC_GENERATED_VERSION = '1.76.0'\n" in PROTO.with_name("xlane_pb2_grpc.py").read_text()
