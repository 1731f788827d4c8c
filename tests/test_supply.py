"""The check that the SBOM has all of the lock, and the tools that make it."""

import json
import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent
missing = runpy.run_path(str(ROOT / "deploy" / "supply" / "covered.py"))["missing"]
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


def test_tools_and_lock_are_pinned_line_by_line():
    for name in ("requirements.lock", "deploy/supply/tools.lock"):
        lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
        assert len(lines) > 20
        assert [line for line in lines if "==" not in line] == []
