"""The allocator of workers on CPUs."""

import os
import subprocess
import sys
from pathlib import Path

from train_loop.allocator import PRODUCTS_HELD, environment


def test_a_process_started_with_it_allocates_with_jemalloc(monkeypatch):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    names = "import pathlib; print(pathlib.Path('/proc/self/maps').read_text())"
    maps = subprocess.run(
        [sys.executable, "-c", names], env=os.environ | environment(), check=True, capture_output=True, text=True
    )
    assert environment()["LD_PRELOAD"] in maps.stdout
    assert maps.stderr == ""  # jemalloc tells of a setting that it doesn't know
    assert Path(environment()["LD_PRELOAD"]).is_file()


def test_small_pieces_take_the_place_of_large_ones_that_were_freed(monkeypatch):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    code = """
import pathlib

def held(number, size):
    pieces = [b"x" * size for _ in range(number)]
    return int(pathlib.Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0])

print(held(64, 1 << 20), held(512, 1 << 16))
"""
    said = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment(), check=True, capture_output=True, text=True
    )
    of_large, then_of_small = (int(kib) >> 10 for kib in said.stdout.split())  # 64 MiB, then 32
    assert of_large > 64
    assert then_of_small < of_large + 8


def test_products_of_ever_new_sizes_take_no_ever_new_memory():
    code = """
import pathlib
import torch

weight = torch.ones(64, 64, dtype=torch.bfloat16)
for first in (64, 64 + 640):
    for n in range(first, first + 640):
        torch.ones(n, 64, dtype=torch.bfloat16) @ weight
    print(pathlib.Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0])
"""
    said = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment(), check=True, capture_output=True, text=True
    )
    of_some, of_twice_as_many = (int(kib) >> 10 for kib in said.stdout.split())
    assert of_twice_as_many < of_some + 16


def test_an_operators_own_choice_stays(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libtcmalloc.so")
    assert environment() == PRODUCTS_HELD
    for name in PRODUCTS_HELD:
        monkeypatch.setenv(name, "64")
    assert environment() == {}


def test_what_was_freed_is_not_faulted_in_again(monkeypatch):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    code = """
import resource
from train_loop.allocator import keep_freed

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        held = [b"x" * (16 << 20) for _ in range(5)]
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
keep_freed()
faults()
print(given_back, faults())
"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    given_back, kept = map(int, said.stdout.split())
    assert kept < given_back / 5  # how many that is hangs on the size of pages
