import re
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
PAGES = [
    *CHECKOUT.glob("*.md"),
    *(CHECKOUT / "docs").rglob("*.md"),
    CHECKOUT / "tests/README.md",
]
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_links_of_a_page_lead_somewhere(page):
    targets = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    assert [link for link in targets if not (page.parent / link).exists()] == []


@pytest.mark.parametrize(
    "page", sorted((CHECKOUT / "docs/decisions").glob("*.md")), ids=lambda page: page.name
)
def test_decision_is_in_the_list_of_decisions(page):
    index = CHECKOUT / "docs/decisions/README.md"
    assert page == index or f"({page.name})" in index.read_text()
