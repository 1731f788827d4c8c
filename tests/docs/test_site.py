"""The site as it is read: no link leads nowhere, and nothing comes from elsewhere."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent.parent
LOADED = {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src"), ("source", "src")}


class Page(HTMLParser):
    """What a page links to, what it loads, and the anchors that it has."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.anchors = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id":
                self.anchors.add(value)
            elif (tag, name) in LOADED:
                self.loads.append(value)
            elif name == "href" and value:
                self.links.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages by their paths, built as `make check` does."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder)))
    return {path: Page(path.read_text()) for path in folder.rglob("*.html")}


def leads_nowhere(site, page, link):
    url = urlsplit(link)
    target = (page.parent / unquote(url.path)).resolve() if url.path else page
    if target in site:
        return bool(url.fragment) and unquote(url.fragment) not in site[target].anchors
    return not target.is_file()


def test_every_link_of_the_site_leads_somewhere(site):
    assert len(site) > 20
    for path, page in site.items():
        if path.name != "404.html":  # its links are from the root, wherever that is
            inside = [link for link in page.links if not urlsplit(link).scheme]
            assert [link for link in inside if leads_nowhere(site, path, link)] == [], path.name
            assert inside


def test_every_file_that_a_page_includes_is_in_it(site):
    assert not [path.name for path in site if "--8" in path.read_text()]


def test_nothing_is_loaded_from_elsewhere(site):
    for path, page in site.items():
        assert [url for url in page.loads if urlsplit(url).netloc] == [], path.name
        assert page.loads
    styles = [css.read_text() for css in next(iter(site)).parent.rglob("*.css")]
    assert styles
    assert [url for css in styles for url in re.findall(r"url\((https?:[^)]+|//[^)]+)\)", css)] == []


def test_the_links_of_the_readmes_lead_somewhere(site):
    folder = next(iter(site)).parent
    for readme in (ROOT / "README.md", ROOT / "examples" / "README.md"):
        links = re.findall(r"\]\(([^)]+)\)", readme.read_text())
        assert links
        for link in (link for link in links if not urlsplit(link).scheme):
            target = readme.parent / urlsplit(link).path
            assert target.exists(), f"{readme.name}: {link}"
            if anchor := urlsplit(link).fragment:
                assert anchor in site[folder / f"{target.stem}.html"].anchors, f"{readme.name}: {link}"
