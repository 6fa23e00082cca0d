"""The page's files and what its lanes are drawn from. What the page does with them: test_ui_browser.py."""

import re
from importlib import resources
from typing import Any

import pytest

from xlane.engine import LaneStats
from xlane.server.config import ServerConfig
from xlane.server.ui.routes import SCRIPTS, STYLE

from .conftest import Rig

FILES = ("index.html", STYLE, *SCRIPTS)


def source(name: str) -> str:
    return (resources.files("xlane.server.ui") / name).read_text()


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_served_as_it_is_and_may_run_nothing_else(rig: Rig, name: str):
    response = rig.client.get("/ui" if name == "index.html" else f"/ui/{name}")
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
    assert response.text == source(name)
    assert response.headers["content-type"] == f"{kinds[name.rpartition('.')[2]]}; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"


def test_every_file_that_is_there_is_served():
    there = {item.name for item in resources.files("xlane.server.ui").iterdir() if item.is_file()}
    assert {name for name in there if not name.endswith(".py")} == set(FILES)


def test_the_files_name_each_other_only():
    named = set(re.findall(r'(?:src|href)="(?!data:)([^"#]+)"', source("index.html")))
    assert named == {f"ui/{STYLE}", "ui/main.js", "docs"}
    imported = {name for script in SCRIPTS for name in re.findall(r'from "\./([^"]+)"', source(script))}
    assert imported | {"main.js"} == set(SCRIPTS)
    assert [name for name in FILES if "://" in source(name).replace("http://www.w3.org/2000/svg", "")] == []
    assert [name for name in FILES if re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|<script>", source(name))] == []  # fmt: skip


def test_a_last_slash_leads_to_the_page(rig: Rig):
    assert str(rig.client.get("/ui/").url).endswith("/ui")


def test_the_lanes_are_as_the_engine_says(rig: Rig):
    lane = LaneStats(
        lane=2, prefill=True, prompt_tokens=9, cached_tokens=4, generated_tokens=0, computed_tokens=6,
        most_tokens=30, pages=1, age_s=0.5,
    )  # fmt: skip
    rig.engine.lanes[2] = lane
    rig.generate()
    told: dict[str, Any] = rig.client.get("/ui/lanes").json()
    assert told["lanes"] == [{name: getattr(lane, name) for name in LaneStats.__dataclass_fields__}]
    assert (told["model"], told["device"], told["lanes_total"]) == ("fake/alphabet", "1 x fake", 8)
    assert (told["pages_total"], told["pages_free"], told["pages_remembered"]) == (64, 60, 6)
    assert (told["ttft"]["count"], told["itl"]["count"]) == (1, 3)  # of four tokens
    assert rig.client.get("/ui/lanes?model=fake/alphabet").json()["lanes"] == told["lanes"]
    assert rig.client.get("/ui/lanes?model=another").status_code == 404


@pytest.mark.parametrize("config", [ServerConfig(api_key="k")])
def test_lanes_ask_for_the_key_and_the_page_does_not(rig: Rig):
    assert rig.client.get("/ui").status_code == 200
    for headers, status in (({}, 401), ({"authorization": "Bearer x"}, 401), ({"authorization": "Bearer k"}, 200)):  # fmt: skip
        assert rig.client.get("/ui/lanes", headers=headers).status_code == status
        assert rig.client.head("/ui/lanes", headers=headers).status_code == status
