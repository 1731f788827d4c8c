"""Whether the kernel has ended a process of a run for want of memory. It tells nobody, but it counts such kills.

It counts them for a control group or, where there is none, for the machine, so the process that was ended may be somebody else's.
A worker therefore notes the count again and again: evidence is a kill in the last seconds before the worker was gone.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

NOTE_S = 10.0  # a worker ends sooner after a child of its own was killed
ASK_S = 30.0  # a node that is asked may have to start a process first


@dataclass(frozen=True)
class Place:
    """Where a worker runs: its Ray node, the file that would count its own kill, and how many that counted when last noted."""

    node_id: str
    counter: str | None  # None where the kernel doesn't count
    kills: int = 0


def counter(root: Path = Path("/")) -> Path | None:
    """The file in which the kernel counts kills in this process's control group, else those of the machine."""
    groups, files = root / "sys/fs/cgroup", list[Path]()
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                files.append(groups / path.strip("/") / "memory.events")
            elif "memory" in controllers.split(","):  # version 1
                files.append(groups / "memory" / path.strip("/") / "memory.oom_control")
    # A container may see its own group at the top while its path is the one outside.
    files += [groups / "memory.events", groups / "memory/memory.oom_control", root / "proc/vmstat"]
    return next((file for file in files if kills_in(file) is not None), None)


def kills_in(file: Path) -> int | None:
    """The count in such a file; None when it has none."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


@contextlib.contextmanager
def noted(node_id: str, tell: Callable[[Place], object]) -> Iterator[None]:
    """Inside, `tell` hears where this process is: at once, and again whenever it has outlived further kills for a while."""
    file, done = counter(), threading.Event()
    place = Place(node_id, None) if file is None else Place(node_id, str(file), kills_in(file) or 0)
    tell(place)

    def loop(file: Path) -> None:
        told = seen = place.kills
        while not done.wait(NOTE_S):
            if seen != told:
                told = seen
                tell(replace(place, kills=told))
            seen = kills_in(file) or 0

    if file is None:
        yield
        return
    thread = threading.Thread(target=loop, args=(file,), name="memory-kills", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def any_killed(places: Collection[Place]) -> bool:
    """Whether a count has grown since a worker there last noted it. Each node is asked on Ray; one that is silent has nothing."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0, max_retries=0)(kills_in)
    before = dict[tuple[str, str], int]()  # as the worker knew it that went first: one that lives on notes its end
    for place in places:
        if place.counter is not None:
            at = (place.node_id, place.counter)
            before[at] = min(place.kills, before.get(at, place.kills))
    asked = {
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(Path(file)): kills
        for (node, file), kills in before.items()
    }
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=ASK_S) if asked else ([], [])
    for ref in silent:
        ray.cancel(ref)
    for ref in answered:
        with contextlib.suppress(RayError):
            if (ray.get(ref) or 0) > asked[ref]:
                return True
    return False
