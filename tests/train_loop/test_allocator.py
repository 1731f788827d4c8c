"""The allocator of workers on CPUs."""

import os
import subprocess
import sys
from pathlib import Path

from train_loop.allocator import environment


def test_a_process_started_with_it_allocates_with_jemalloc(monkeypatch):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    names = "import pathlib; print(pathlib.Path('/proc/self/maps').read_text())"
    maps = subprocess.run(
        [sys.executable, "-c", names], env=os.environ | environment(), check=True, capture_output=True, text=True
    )
    assert environment()["LD_PRELOAD"] in maps.stdout
    assert maps.stderr == ""  # jemalloc tells of a setting that it doesn't know
    assert Path(environment()["LD_PRELOAD"]).is_file()


def test_an_operators_own_choice_stays(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libtcmalloc.so")
    assert environment() == {}
