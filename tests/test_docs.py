"""What the README and docs/ say that can be looked up: links, options, commands; and that the README is one page."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from sagecompile import cli
from sagecompile.cli.bench import BENCHMARKS
from sagecompile.settings import ENVIRONMENT_PREFIX, OPTION_PREFIX, Settings

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS, *sorted((ROOT / "examples").glob("*/README.md"))]

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`[^`]+`")
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
OPTION_ROW = re.compile(r"^\| `sage\.\w+` \|.*\|$", re.MULTILINE)


def text_of(page: Path) -> str:
    """Without its fenced code."""
    return FENCED.sub("", page.read_text())


def code_of(page: Path) -> str:
    """What stands in a code block or between backticks."""
    return "\n".join([*FENCED.findall(page.read_text()), *INLINE.findall(text_of(page))])


def links_of(page: Path) -> list[tuple[Path, str]]:
    """Its links to files: (file, anchor), the anchor empty where there is none."""
    found = []
    for link in LINK.findall(INLINE.sub("", text_of(page))):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            found.append(((page.parent / path).resolve() if path else page, anchor))
    return found


def anchors_of(page: Path) -> set[str]:
    """As GitHub names headings: small letters, no punctuation, a hyphen for each space."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_one_page():
    assert len(README.read_text().splitlines()) <= 120


def test_readme_links_every_page():
    assert {file for file, _ in links_of(README)} >= {*DOCS}


@each_page
def test_links_lead_somewhere(page):
    links = links_of(page)
    assert not [str(file) for file, _ in links if not file.exists()]
    assert not [f"{file.name}#{anchor}" for file, anchor in links if anchor and anchor not in anchors_of(file)]


def test_options_table_is_settings():
    rows = OPTION_ROW.findall((ROOT / "docs" / "options.md").read_text())
    cells = [[cell.strip().strip("`") for cell in row.split("|")[1:4]] for row in rows]
    names = [field.name for field in fields(Settings)]
    named = [(OPTION_PREFIX + name, ENVIRONMENT_PREFIX + name.upper()) for name in names]
    assert [(option, variable) for option, variable, _ in cells] == named
    for name, (option, _, default) in zip(names, cells, strict=True):
        assert Settings().updated({name: default}, "") == Settings(), option


@each_page
def test_options_are_real_ones(page):
    names = {field.name for field in fields(Settings)}
    code = code_of(page)
    assert set(re.findall(r"\bsage\.(\w+)", code)) <= names
    assert {name.lower() for name in re.findall(r"\bSAGECOMPILE_([A-Z_]+)", code)} <= names


@each_page
def test_commands_are_real_ones(page):
    commands = {command.__name__.rpartition(".")[2] for command in cli.COMMANDS}
    said = re.findall(r"(?<![\w./-])sagecompile +([a-z]\w*)(?: +([a-z]\w*))?", code_of(page))
    assert {command for command, _ in said} <= commands
    assert {what for command, what in said if command == "bench"} - {""} <= set(BENCHMARKS)
