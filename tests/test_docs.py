"""Links between pages lead somewhere, and every solver has a page that says what a reader looks for."""

import re
from pathlib import Path

import pytest

from dpnp_inference import baselines

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "priors").rglob("*.md")])
SOLVERS = sorted((ROOT / "docs" / "solvers").glob("*.md"))
SECTIONS = {  # what a page must tell, and the headings that do
    "idea": ("## Idea", "## The idea", "## Idea and equations"),
    "equations": ("## Equations", "## The idea", "## Idea and equations"),
    "what it assumes": ("## Assumes", "## What it assumes", "## What it assumes, and when to use it"),
    "when to use it": ("## When to use it", "## What it assumes, and when to use it"),
    "what was measured": ("## Measured", "## What was measured"),
}


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name}: {target} does not exist"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target} has no such heading"


@pytest.mark.parametrize("page", SOLVERS, ids=lambda page: page.stem)
def test_page_of_a_solver_says_what_a_reader_looks_for(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    for subject, headings in SECTIONS.items():
        assert set(headings) & set(lines), f"{page.name} has no section on {subject}"


def test_every_solver_has_a_page_which_the_table_leads_to():
    names = {name for name in baselines.__all__ if isinstance(getattr(baselines, name), type)}
    names = {name for name in names if issubclass(getattr(baselines, name), baselines.Baseline)} - {"Baseline"}
    table = (ROOT / "docs" / "solvers.md").read_text(encoding="utf-8")
    linked = dict(re.findall(r"^\| \[`(\w+)`\]\(solvers/(\w+)\.md\)", table, re.MULTILINE))
    assert {"DPnP", "FunctionSpaceLangevin", "PCN"} | names == set(linked)
    assert set(linked.values()) == {page.stem for page in SOLVERS}
