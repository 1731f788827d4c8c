"""How processes hold memory. The allocator of workers that train on CPUs is jemalloc, which Ray brings along.

glibc can't give back, nor often reuse, what lies freed between tensors that live on: recomputing activations it held a quarter
more memory than jemalloc does (docs/benchmarks.md), and how much depends on chance.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from importlib.util import find_spec
from pathlib import Path

# Freed pages are kept for the next step and not given back to the system: that would have each step fault them in again. What is
# freed side by side becomes one piece, and jemalloc by itself takes nothing under a 64th of a piece from it, but fresh pages: of
# a micro-batch's gigabyte hardly anything would be used again, and a process would grow with each step.
SETTINGS = "oversize_threshold:0,dirty_decay_ms:-1,muzzy_decay_ms:-1,lg_extent_max_active_fit:32"
# oneDNN compiles a product of bf16 for each size that it meets, and it and torch's layer above it each hold the last 1,024, which
# are 0.6 GiB after some forty rows of different lengths. A micro-batch takes 100 to 300 sizes.
PRODUCTS_HELD = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "512", "LRU_CACHE_CAPACITY": "512"}

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def environment() -> dict[str, str]:
    """The variables that a process is started with: less what whoever runs this has set, and without jemalloc where it isn't
    there or another allocator was chosen."""
    products = {name: value for name, value in PRODUCTS_HELD.items() if name not in os.environ}
    ray = find_spec("ray")
    library = Path(ray.origin).parent / "core" / "libjemalloc.so" if ray and ray.origin else None
    if library is None or not library.is_file() or "LD_PRELOAD" in os.environ:
        return products
    return products | {"LD_PRELOAD": str(library), "MALLOC_CONF": SETTINGS}


def keep_freed() -> None:
    """Have glibc, in this process from now on, keep what is freed for what is made next.

    By itself it gives large pieces back to the system, and faults their pages in again for the next batch of rows. Where there is
    another allocator nothing happens.
    """
    with contextlib.suppress(AttributeError):  # a system without glibc
        set_option = ctypes.CDLL(None).mallopt
        set_option(M_MMAP_THRESHOLD, 32 << 20)  # the most that it takes
        set_option(M_TRIM_THRESHOLD, 2**31 - 1)
