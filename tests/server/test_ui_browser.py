"""The page in a real browser, over a fake engine that generates the alphabet. Skipped where there is no Chromium."""

import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from xlane.server import stream
from xlane.server.backend import Backend
from xlane.server.config import ServerConfig

from ..support.byte_tokenizer import ByteTokenizer
from ..support.fake_engine import FakeEngine, fake_info
from ..support.live_server import live_server
from .test_models import made

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra `dev`)")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (Debian: `apt-get install chromium`)")  # fmt: skip

KEY = "k-1"


@dataclass
class Opened:
    """The page, the engine behind it, and what the browser complained of."""

    page: Any
    engine: FakeEngine
    complaints: list[str]

    def send(self, text: str) -> None:
        self.page.fill("#message", text)
        self.page.press("#message", "Enter")

    def expect(self, selector: str) -> Any:
        return playwright.expect(self.page.locator(selector))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        sandbox = [] if sys.platform != "linux" else ["--no-sandbox"]
        opened = driver.chromium.launch(executable_path=BROWSER, args=sandbox)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, FakeEngine]]:
    engine, backend = FakeEngine(fake_info(4096, 4000)), Backend()
    backend.ready(engine, ByteTokenizer(), engine.info_value)
    with live_server(backend, ServerConfig(api_key=KEY)) as server:
        yield server.url, engine


@pytest.fixture
def opened(browser: Any, served: tuple[str, FakeEngine]) -> Iterator[Opened]:
    """The page as it is once the key was given."""
    url, engine = served
    engine.delay_s, engine.reply, engine.obeys = 0.0, None, False
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    context.set_default_timeout(20_000)
    page, complaints = context.new_page(), []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    page.goto(f"{url}/ui")
    page.fill("#key", KEY)
    page.press("#key", "Enter")
    playwright.expect(page.locator("#served")).to_have_text("fake/alphabet · 1 x fake · float32")
    # A browser itself reports the 401 that made the page ask.
    complaints[:] = [each for each in complaints if "401" not in each]
    yield Opened(page, engine, complaints)
    assert complaints == []
    context.close()


def test_tokens_arrive_and_a_stop_frees_the_lane(opened: Opened):
    opened.engine.delay_s = 0.05
    opened.page.click("#toggle-options")
    opened.page.fill("#temperature", "0")
    opened.expect("#rows tr.idle").to_have_count(8)
    opened.send("xyz")
    opened.expect("#rows tr:first-child td:nth-child(3)").to_have_text("decode")
    opened.expect(".answer .words").to_have_text(re.compile("^abcde"))
    opened.page.press("body", "Escape")
    opened.expect("#rows tr.idle").to_have_count(8)
    opened.expect(".answer .foot").to_have_text(re.compile("stopped"))
    text = opened.page.inner_text(".answer .words")
    assert text == "abcdefghijklmnopqrstuvwxyz"[: len(text)]
    assert len(opened.engine.cancelled) == 1
    opened.engine.delay_s = 0.0
    opened.send("more")
    opened.expect(".answer >> nth=1").to_contain_text("512 tokens")
    sent = bytes(opened.engine.submitted[-1].prompt_ids).decode()
    assert "xyz" in sent
    assert text in sent


def test_parameters_reach_the_engine_and_wrong_ones_do_not(opened: Opened):
    page = opened.page
    page.click("#toggle-options")
    for name, value in (("temperature", "0.5"), ("top_p", "0.9"), ("max_tokens", "7"), ("seed", "11")):
        page.fill(f"#{name}", value)
    page.fill("#system", "be brief")
    opened.send("a")
    opened.expect(".answer .foot").to_contain_text("7 tokens")
    asked = opened.engine.submitted[-1]
    sampling = asked.sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.seed) == (0.5, 0.9, 7, 11)
    assert "be brief" in bytes(asked.prompt_ids).decode()
    page.fill("#temperature", "9")
    opened.send("a")
    opened.expect("#options-error").to_contain_text("Temperature")
    opened.expect(".answer").to_have_count(1)


def test_log_probabilities_are_told_under_the_pointer_and_the_arrow_keys(opened: Opened):
    page = opened.page
    page.click("#toggle-options")
    for name, value in (("temperature", "0"), ("max_tokens", "6")):
        page.fill(f"#{name}", value)
    page.check("#logprobs")
    opened.send("q")
    opened.expect(".tokens span").to_have_count(6)
    page.hover(".tokens span:nth-child(2)")
    opened.expect("#tip p").to_contain_text("77.9 % · log -0.250")  # e^-0.25
    page.focus(".tokens")
    page.press(".tokens", "ArrowRight")
    opened.expect("#tip p").to_contain_text("log -0.375")
    opened.expect("#tip tbody tr").to_have_count(5)


def test_an_answer_is_text_and_never_markup(opened: Opened):
    opened.engine.reply = "<img src=x onerror=alert(1)> **b** `c`\n\n```py\n<b>1</b>\n```"
    opened.send("<script>alert(1)</script>")
    opened.expect(".answer .foot").to_contain_text("stop")
    opened.expect(".words p").to_have_text("<img src=x onerror=alert(1)> b c")
    opened.expect(".words pre").to_have_text("<b>1</b>")
    opened.expect(".user").to_have_text("<script>alert(1)</script>")
    assert opened.page.locator("#log img, #log script, .words pre b").count() == 0


def test_json_and_tools_are_asked_for_and_results_go_back(opened: Opened):
    page = opened.page
    opened.engine.obeys = True
    page.click("#toggle-options")
    page.select_option("#mode", "json")
    page.fill("#schema", "{")
    opened.send("a")
    opened.expect("#options-error").to_contain_text("This is no JSON")
    page.fill("#schema", '{"const": 7}')
    opened.send("a")
    opened.expect(".words >> nth=0").to_have_text("7")
    page.select_option("#mode", "tools")
    page.select_option("#tool_choice", "required")
    opened.send("b")
    opened.expect(".call b").to_have_text("weather")
    opened.engine.obeys, opened.engine.reply = False, "dry"
    page.select_option("#tool_choice", "auto")
    page.fill(".call input", "sunny there")
    page.press(".call input", "Enter")
    opened.expect(".words >> nth=2").to_have_text("dry")
    assert "sunny there" in bytes(opened.engine.submitted[-1].prompt_ids).decode()


def test_a_model_is_chosen_and_its_loading_is_told(browser: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stream, "TELL_S", 0.05)
    models, stands = made()
    b = stands["b"]
    b.gate.clear()
    with live_server(stands["a"].backend, models=models) as server:
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        page.goto(f"{server.url}/ui")
        expect = playwright.expect
        expect(page.locator("#served")).to_have_text("a · 1 x fake · float32")
        expect(page.locator("#model option")).to_have_text(["a", "b", "c"])
        page.select_option("#model", "b")
        expect(page.locator("#served")).to_have_text(re.compile("it is loaded when it is asked for"))
        page.fill("#message", "xyz")
        page.press("#message", "Enter")
        expect(page.locator(".foot")).to_contain_text("loading b: ")
        server.loop.call_soon_threadsafe(b.backend.say, "weights 40 %")
        expect(page.locator(".foot")).to_have_text("loading b: weights 40 %")
        expect(page.locator("#served")).to_have_text("The model is not loaded: weights 40 %")
        server.loop.call_soon_threadsafe(b.gate.set)
        expect(page.locator(".foot")).to_contain_text("tokens")
        expect(page.locator("#served")).to_have_text("b · 1 x fake · float32")
        expect(page.locator("#rows tr")).to_have_count(8)
        page.close()
    assert [len(stand.engine.submitted) for stand in stands.values()] == [0, 1, 0]


def test_a_narrow_page_shows_one_view_and_fits(opened: Opened):
    page = opened.page
    page.set_viewport_size({"width": 360, "height": 700})
    opened.expect("#lanes").to_be_hidden()
    page.click("#show-lanes")
    opened.expect("#lanes").to_be_visible()
    opened.expect("#chat").to_be_hidden()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


CONTRASTS = """
() => {
  const mix = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (c) => c.slice(0, 3).map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => { for (; e; e = e.parentElement) { const c = mix(getComputedStyle(e).backgroundColor); if ((c[3] ?? 1) > 0) return c; } };
  const own = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  return [...document.querySelectorAll("body *")].filter((e) => own(e) && e.checkVisibility()).map((e) => {
    const [a, b] = [light(mix(getComputedStyle(e).color)), light(behind(e))];
    return [e.tagName + "." + e.className + " " + e.textContent.slice(0, 20), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
  });
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(opened: Opened, scheme: str):
    opened.page.emulate_media(color_scheme=scheme)
    opened.engine.delay_s = 0.05
    opened.page.click("#toggle-options")
    opened.send("a")
    opened.expect("#rows tr.decode").to_have_count(1)
    contrasts = opened.page.evaluate(CONTRASTS)
    assert len(contrasts) > 40
    assert [(what, round(ratio, 2)) for what, ratio in contrasts if ratio < 4.5] == []
    opened.page.click("#stop")
