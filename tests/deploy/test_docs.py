"""The pages about deployment name options, files and links that exist; TGI's page has every option of TGI."""

import re
from pathlib import Path

import pytest

from tests.server.test_flag_audit import LISTED, VARIABLES_NOTED
from xlane.server.cli import COMMANDS

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = ("deploy.md", "from-tgi.md", "from-vllm.md")
OPTIONS = {flag.option for command in COMMANDS for group in command.groups.values() for flag in group}


def text(name: str) -> str:
    return (DOCS / name).read_text()


def first_column(page: str) -> list[str]:
    return re.findall(r"^\| `(?:--)?([\w-]+)` \|", page, re.MULTILINE)


def test_tgis_page_has_every_option_once():
    assert sorted(first_column(text("from-tgi.md"))) == sorted([*LISTED, "log-level", *VARIABLES_NOTED])


def test_vllms_options_lead_to_ours():
    rows = re.findall(r"^\| `-.*\| (.*) \|.*\|$", text("from-vllm.md"), re.MULTILINE)
    assert len(rows) > 25
    ours = [option for row in rows for option in re.findall(r"--[\w-]+", row)]
    assert [option for option in ours if option not in OPTIONS] == []
    assert [row for row in rows if row != "none" and "--" not in row] == []


def test_deploys_commands_use_options_that_exist():
    lines = re.findall(r"xlane (?:serve|engine|warmup|download) [^\n`]*|(?<=`)--[\w-]+", text("deploy.md"))
    options = {option for line in lines for option in re.findall(r"--[\w-]+", line)}
    assert {"--cache-dir", "--graceful-termination-timeout"} <= options
    others = {"--port", "--user", "--build-arg"}  # docker's
    assert options - others - OPTIONS == set()


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str):
    targets = [link for link in re.findall(r"\]\(([^)#]+)\)", text(name)) if "://" not in link]
    assert targets
    assert [target for target in targets if not (DOCS / target).exists()] == []


def test_files_that_are_named_are_there():
    named = re.findall(r"tpu/[\w-]+\.(?:yaml|sh)", text("deploy.md"))
    assert {"tpu/startup.sh", "tpu/gke.yaml", "tpu/gke-multihost.yaml", "tpu/gke-replicas.yaml"} == set(named)
    assert all((DOCS.parent / name).is_file() for name in named)
