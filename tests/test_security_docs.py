"""docs/security.md names tests that are there, and the example of docs/webhooks.md verifies what the service sends."""

import re
import time
from pathlib import Path

import pytest

from serve_app.webhooks import signed

ROOT = Path(__file__).parent.parent
SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="


def test_every_mitigation_names_tests_that_are_there():
    text = (ROOT / "docs" / "security.md").read_text()
    table = text.partition("## Assets, entry points, mitigations")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| asset")]
    assert len(rows) > 15
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, row
        for path, test in named:
            assert f"\ndef {test}(" in (ROOT / path).read_text(), f"{path} has no {test}"


def test_the_example_verifies_what_the_service_sends():
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "webhooks.md").read_text(), re.DOTALL)
    found = {}
    exec(compile(example, "docs/webhooks.md", "exec"), found)
    verify, body = found["verify"], '{"type":"job.completed","data":{"name":"näme"}}'
    headers, old = signed(SECRET, "msg_1", int(time.time()), body), signed(SECRET, "msg_1", int(time.time()) - 999, body)
    verify(SECRET, headers, body.encode())
    for changed in (
        (SECRET, headers, b"{}"),
        (SECRET, headers | {"webhook-id": "msg_2"}, body.encode()),
        (SECRET, old, body.encode()),
        (SECRET.replace("MDEy", "MDEz"), headers, body.encode()),
    ):
        with pytest.raises(ValueError, match=r"not signed|too old"):
            verify(*changed)
