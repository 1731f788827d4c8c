"""The checks that the SBOM has all of the lock and that none of it was withdrawn, and the tools that make them."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
SUPPLY = ROOT / "deploy" / "supply"
sys.path.insert(0, str(SUPPLY))  # as it is when one of its scripts is run
missing = runpy.run_path(str(SUPPLY / "covered.py"))["missing"]
fault = runpy.run_path(str(SUPPLY / "withdrawn.py"))["fault"]
sys.path.remove(str(SUPPLY))
LOCK = """# made by hand

torch==2.13.0
SQLAlchemy==2.1.9
jaraco.context==6.0
ray[default]==2.60.0
x==1 ; python_version < '3.12'
"""


def sbom(**versions):
    return json.dumps({"components": [{"name": name, "version": version} for name, version in versions.items()]})


def test_an_sbom_has_every_line_of_the_lock():
    whole = {"torch": "2.13.0+cpu", "sqlalchemy": "2.1.9", "jaraco_context": "6.0", "ray": "2.60.0", "x": "1"}
    assert missing(LOCK, sbom(**whole)) == []
    assert missing(LOCK, sbom(**(whole | {"SQLAlchemy": "2.1.8", "sqlalchemy": "2.1.8"}))) == ["SQLAlchemy==2.1.9"]
    assert missing(LOCK, sbom(torch="2.13.0")) == ["SQLAlchemy==2.1.9", "jaraco.context==6.0", "ray[default]==2.60.0", "x==1"]


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("1.0", None),
        ("1.1", "was withdrawn: it loses data; no reason given"),
        ("1.2", None),  # of which a file is left
        ("1.3", "is not in the index any more"),
    ],
)
def test_a_version_that_its_authors_have_withdrawn_is_told(version, said):
    files = [
        ("1.0", None, False),
        ("1.1", "it loses data", True),
        ("1.1+cpu", None, True),
        ("1.2", "", True),
        ("1.2", None, False),
    ]
    packages = [SimpleNamespace(version=v, yanked_reason=why, is_yanked=yanked) for v, why, yanked in files]
    assert fault(version, packages) == said


def test_tools_and_lock_are_pinned_line_by_line():
    for name in ("requirements.lock", "deploy/supply/tools.lock"):
        lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
        assert len(lines) > 20
        assert [line for line in lines if "==" not in line] == []
