"""Where the kernel counts the processes that it ended for want of memory, and what a worker notes of it."""

import subprocess
import sys
import time

import pytest

from tests.train_loop.memory_group import memory_group
from train_loop import memory_kills
from train_loop.memory_kills import Place, counter, kills_in, noted

EVENTS = "low 0\nhigh 3\nmax 12\noom 2\noom_kill 2\noom_group_kill 0\n"
CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n"
VMSTAT = "nr_free_pages 1234\noom_kill 7\ndrop_pagecache 0\n"
V1 = "12:cpuset:/\n4:memory:/docker/1f\n0::/docker/1f\n"
V2 = "0::/system.slice/ray.service\n"
WATCH = """
import sys, time
from train_loop import memory_kills
memory_kills.NOTE_S = 0.2
with memory_kills.noted("node", lambda place: print(place.counter, place.kills, flush=True)):
    time.sleep(60)
"""
HOG = "held = [b'x' * 1_000_000 for _ in range(10_000)]"


@pytest.mark.parametrize(
    ("files", "found", "kills"),
    [
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/system.slice/ray.service/memory.events": EVENTS}, "memory.events", 2),
        ({"proc/self/cgroup": V1, "sys/fs/cgroup/memory/docker/1f/memory.oom_control": CONTROL}, "memory.oom_control", 5),
        # A container: its own group is at the top, whatever it is called outside.
        ({"proc/self/cgroup": V1, "sys/fs/cgroup/memory/memory.oom_control": CONTROL}, "memory.oom_control", 5),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.events": EVENTS}, "memory.events", 2),
        # The topmost group of a machine, an old kernel, no groups: the machine's own count.
        ({"proc/self/cgroup": "0::/\n"}, "vmstat", 7),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/system.slice/ray.service/memory.events": "low 0\noom 2\n"}, "vmstat", 7),
        ({}, "vmstat", 7),
    ],
)
def test_the_count_of_the_own_group_goes_before_that_of_the_machine(tmp_path, files, found, kills):
    for name, text in ({"proc/vmstat": VMSTAT} | files).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    file = counter(tmp_path)
    assert (file.name, kills_in(file)) == (found, kills)


def test_a_system_that_counts_no_kills_has_no_counter(tmp_path):
    told = []
    assert counter(tmp_path) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_kills, "counter", lambda: None)
        with noted("node", told.append):
            pass
    assert told == [Place("node", None)]


def test_a_kill_that_a_worker_outlives_is_noted_and_the_newest_ones_are_not(tmp_path, monkeypatch):
    file, told = tmp_path / "memory.events", []
    file.write_text("oom_kill 1\n")
    monkeypatch.setattr(memory_kills, "counter", lambda: file)
    monkeypatch.setattr(memory_kills, "NOTE_S", 0.2)
    with noted("node", told.append):
        time.sleep(0.5)
        file.write_text("oom_kill 2\n")
        deadline = time.monotonic() + 10
        while len(told) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert [place.kills for place in told] == [1, 2]
    with noted("node", told.append):
        file.write_text("oom_kill 3\n")
    assert told[-1].kills == 2


def test_the_kernel_counts_a_kill_where_the_killed_process_said_it_would():
    with memory_group() as group:
        watch = subprocess.Popen([sys.executable, "-c", WATCH], stdout=subprocess.PIPE, text=True, preexec_fn=group.enter)
        file, kills = watch.stdout.readline().split()
        group.limit(64 << 20)
        hog = subprocess.Popen([sys.executable, "-c", HOG], preexec_fn=group.enter)
        assert hog.wait(60) == -9
        assert watch.stdout.readline().split() == [file, str(int(kills) + 1)]  # it was another process
        watch.kill()
        watch.wait()
