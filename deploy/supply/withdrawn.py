"""Whether its authors have withdrawn (yanked, PEP 592) a version that a lock names: `python withdrawn.py requirements.lock`.

Any package index tells this, also one that passes no advisories on. The index is pip's: PIP_INDEX_URL, else its default.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from lock import pins

if TYPE_CHECKING:
    from pypi_simple import DistributionPackage

REQUESTS = 8  # at once


def fault(version: str, packages: Iterable[DistributionPackage]) -> str | None:
    """Why that version of what the index has shouldn't be used any more."""
    files = [p for p in packages if (p.version or "").partition("+")[0] == version]
    if not files:
        return "is not in the index any more"
    reasons = {p.yanked_reason or "no reason given" for p in files if p.is_yanked}
    return f"was withdrawn: {'; '.join(sorted(reasons))}" if all(p.is_yanked for p in files) else None


def withdrawn(lock: Path) -> list[str]:
    """Each line that shouldn't be used, and why."""
    from pypi_simple import PYPI_SIMPLE_ENDPOINT, PyPISimple

    with PyPISimple(os.environ.get("PIP_INDEX_URL", PYPI_SIMPLE_ENDPOINT)) as index, ThreadPoolExecutor(REQUESTS) as pool:
        asked = list(pins(lock.read_text()))
        pages = pool.map(lambda pin: index.get_project_page(pin.name).packages, asked)
        said = (fault(pin.version, packages) for pin, packages in zip(asked, pages, strict=True))
        return [f"{pin.line} {why}" for pin, why in zip(asked, said, strict=True) if why]


if __name__ == "__main__":
    sys.exit("\n".join(withdrawn(Path(sys.argv[1]))) or 0)
