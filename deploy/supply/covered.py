"""Whether an SBOM has every line of a lock, at its version: `python covered.py requirements.lock sbom.json`."""

import json
import re
import sys
from pathlib import Path

from lock import pins


def canonical(name: str) -> str:
    """A package's name as all of its spellings are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def missing(lock: str, sbom: str) -> list[str]:
    """The lines of the lock that the CycloneDX document doesn't have; builds for a device (2.13.0+cpu) are of their release."""
    found = {(canonical(c["name"]), c.get("version", "").partition("+")[0]) for c in json.loads(sbom)["components"]}
    return [pin.line for pin in pins(lock) if (canonical(pin.name), pin.version) not in found]


if __name__ == "__main__":
    lacking = missing(*(Path(path).read_text() for path in sys.argv[1:]))
    sys.exit(f"the SBOM lacks {', '.join(lacking)}" if lacking else 0)
