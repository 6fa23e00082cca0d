"""`GET /ui` and what belongs to it: the page's files, and `/ui/lanes`, which tells what every lane does now.

The files are data; nothing in them is put together here. Knows no prompt and no answer: a lane tells numbers only.
"""

from functools import lru_cache
from importlib import resources

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..front import Front, front_named
from ..metrics import Histogram
from .shapes import Lane, Lanes, Spread

SCRIPTS = ("main.js", "api.js", "chat.js", "dom.js", "lanes.js", "options.js", "text.js", "tokens.js")
STYLE = "style.css"

# No script and no style but these files, no request to anybody else, and nobody may put the page in a frame.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # the next version's files must not meet this one's
}


async def page(request: HttpRequest) -> Response:
    """`GET /ui`."""
    if request.scope.get("asked_path", "").endswith("/"):
        # The page names its files relative to itself, so that it also works behind a proxy's prefix.
        return Response(status_code=307, headers={"location": "../ui"})
    return _file("index.html", "text/html")


async def script(request: HttpRequest) -> Response:
    """`GET /ui/*.js`."""
    return _file(request.scope["path"].rpartition("/")[2], "text/javascript")


async def style(request: HttpRequest) -> Response:
    """`GET /ui/style.css`."""
    return _file(STYLE, "text/css")


async def lanes(request: HttpRequest) -> Response:
    """`GET /ui/lanes`, or of one of several models `?model=NAME`. Raises NoSuchModel, NotReady, EngineLost."""
    front = front_named(request, request.query_params.get("model"))
    return Response(msgspec.json.encode(await _lanes(front)), media_type="application/json")


async def _lanes(front: Front) -> Lanes:
    serving = front.backend.serving()
    stats, info = await serving.engine.stats(), serving.info
    return Lanes(
        model=front.model_name,
        device=f"{info.device_count} x {info.device_kind}",
        precision=info.precision,
        lanes_total=info.lanes,
        lanes=[Lane.of(lane) for lane in stats.taken_lanes],
        queued=stats.queued,
        page_tokens=info.page_tokens,
        pages_total=stats.pages_total,
        pages_free=stats.pages_free,
        pages_remembered=stats.pages_remembered,
        max_total_tokens=info.max_total_tokens,
        steps=stats.steps,
        prefill_tokens=stats.prefill_tokens,
        decode_tokens=stats.decode_tokens,
        step_ms=stats.step_ms,
        ttft=_spread(front.metrics.first_token),
        itl=_spread(front.metrics.inter_token),
    )


def _spread(histogram: Histogram) -> Spread:
    return Spread(count=histogram.count, sum_s=histogram.sum)


def _file(name: str, media_type: str) -> Response:
    return Response(_bytes(name), media_type=media_type, headers=_HEADERS)


@lru_cache(maxsize=16)
def _bytes(name: str) -> bytes:
    return (resources.files(__package__ or "") / name).read_bytes()
