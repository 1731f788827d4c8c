"""Which waiting jobs start now: a pure function of the queue, the running jobs and what is free on the cluster's nodes.

Order: effective priority (a step up for every AGING_S waited), then the org that has had least, then age. An org's use is the
worker-seconds of its recent past, halved every HALF_LIFE_S, so shares even out over time and not only over what runs this moment.
No start counts for less than LEAST_S: a worker takes longer than that to come up, so only jobs that fail or are canceled before
they train hold their room for less, and how much less is chance. Counted by the second, an org whose jobs all fail at once would
start dozens of them for each that another org runs; this way they cost it its turn.

Gangs are whole: a job starts when all its workers (elastic: those of at least min_node_count nodes) have room, or not at all.
A job that has no room is passed by later ones that have, until it has waited for RESERVE_AFTER_S: from then on nothing that
takes the same resources starts before it, so small jobs can't starve a large one. (Backfilling proper, as in EASY, needs run
times, which nobody knows here.)
"""

from __future__ import annotations

import datetime as dt
import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

AGING_S = 1800.0
RESERVE_AFTER_S = 600.0
HALF_LIFE_S = 3600.0
LEAST_S = 10.0  # what each worker of a start counts as at least
QUANTUM_S = 60.0  # what a worker just started counts as, so that the orgs take turns within a pass
EPSILON = 1e-6

Bundle = Mapping[str, float]  # Ray resources of one worker


@dataclass(frozen=True)
class Gang:
    """A job's workers, all alike."""

    request_id: str
    org_id: str
    seq: int  # order of submission
    priority: int
    waiting_since: dt.datetime
    bundle: Bundle
    per_node: int  # workers of one node
    min_nodes: int
    max_nodes: int


@dataclass(frozen=True)
class Run:
    """An attempt under way."""

    gang: Gang
    num_nodes: int
    placed: bool = False  # its workers hold what they need; before that it looks free on the nodes


@dataclass(frozen=True)
class Limits:
    """The operator's; None is no limit."""

    max_running_jobs: int
    max_running_jobs_per_org: int | None = None
    max_workers: int | None = None
    max_workers_per_org: int | None = None
    # Of single orgs: jobs and workers, in place of the two that are for every org.
    of_orgs: Mapping[str, tuple[int | None, int | None]] = field(default_factory=dict)

    def of(self, org_id: str) -> tuple[int | None, int | None]:
        """The org's running jobs and workers."""
        return self.of_orgs.get(org_id, (self.max_running_jobs_per_org, self.max_workers_per_org))


@dataclass(frozen=True)
class Decision:
    """What to do now, and what everybody is told."""

    starts: list[tuple[Gang, int]]  # with how many nodes
    positions: dict[str, int]  # place in the queue of those that go on waiting, from 1
    lacking: list[tuple[Gang, int]]  # wait for nothing but room, in order; nodes that are asked for


class Shares:
    """Worker-seconds that each org has had lately."""

    def __init__(self) -> None:
        self._had: dict[str, float] = defaultdict(float)

    def add(self, org_id: str, workers: int, seconds: float, ago_s: float = 0.0) -> None:
        """Count that many workers for `seconds` that ended `ago_s` seconds ago, as faded as they are by now."""
        mean_life_s = HALF_LIFE_S / math.log(2)
        left = -math.expm1(-seconds / mean_life_s) * mean_life_s  # of each worker, by the end: the first second is the most faded
        self._had[org_id] += workers * left * 0.5 ** (ago_s / HALF_LIFE_S)

    def pass_time(self, seconds: float) -> None:
        """Let what was counted fade."""
        fade = 0.5 ** (seconds / HALF_LIFE_S)
        self._had = defaultdict(float, {org: had * fade for org, had in self._had.items() if had * fade > 1e-3})

    def of(self, org_id: str) -> float:
        """Worker-seconds, faded."""
        return self._had.get(org_id, 0.0)


@dataclass
class Room:
    """Free resources, node by node."""

    free: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def of(cls, nodes: Iterable[Mapping[str, float]], promised: Iterable[tuple[Bundle, int]] = ()) -> Room:
        """What nobody holds on the nodes, less the promised bundles, each put where it fits. Ray may put it elsewhere: this
        doesn't matter for whole devices, the common case; with odd sizes the estimate may be off, and the gang comes back."""
        room = cls([dict(node) for node in nodes])
        for bundle, count in promised:
            room.take(bundle, count)
        return room

    def count(self, bundle: Bundle) -> int:
        """How many such bundles fit."""
        return sum(_fits(node, bundle) for node in self.free)

    def take(self, bundle: Bundle, count: int) -> None:
        """Use up `count` bundles, or as many as fit, on the fullest nodes that take them (so whole nodes stay free)."""
        for node in sorted(self.free, key=lambda node: _fits(node, bundle)):
            here = min(count, _fits(node, bundle))
            for name, amount in bundle.items():
                node[name] = node.get(name, 0.0) - here * amount
            count -= here


def _fits(node: Mapping[str, float], bundle: Bundle) -> int:
    wanted = [(node.get(name, 0.0), amount) for name, amount in bundle.items() if amount > 0]
    return min((max(0, int((free + EPSILON) / amount)) for free, amount in wanted), default=1_000_000)


def order(waiting: Sequence[Gang], shares: Shares, workers: Mapping[str, int], now: dt.datetime) -> Iterator[Gang]:
    """Everyone's turn, as if each in its turn could start. O(n log n)."""
    ranks: dict[int, dict[str, list[Gang]]] = defaultdict(lambda: defaultdict(list))
    for gang in sorted(waiting, key=lambda g: g.seq):
        aged = int((now - gang.waiting_since).total_seconds() // AGING_S)
        ranks[gang.priority + aged][gang.org_id].append(gang)
    use = defaultdict(float, {org: count * QUANTUM_S for org, count in workers.items()})
    for rank in sorted(ranks, reverse=True):
        queues = {org: iter(gangs) for org, gangs in ranks[rank].items()}
        heads = [(shares.of(org) + use[org], head.seq, org, head) for org, queue in queues.items() if (head := next(queue))]
        heapq.heapify(heads)
        while heads:
            _, _, org, gang = heapq.heappop(heads)
            yield gang
            use[org] += gang.per_node * gang.max_nodes * QUANTUM_S
            if (following := next(queues[org], None)) is not None:
                heapq.heappush(heads, (shares.of(org) + use[org], following.seq, org, following))


def decide(
    waiting: Sequence[Gang],
    running: Sequence[Run],
    free: Iterable[Mapping[str, float]],
    limits: Limits,
    shares: Shares,
    now: dt.datetime,
) -> Decision:
    """Who starts now. `free` is what nobody holds, neither we nor others, on each node that takes new work."""
    jobs_of, workers_of = defaultdict[str, int](int), defaultdict[str, int](int)
    for run in running:
        jobs_of[run.gang.org_id] += 1
        workers_of[run.gang.org_id] += run.gang.per_node * run.num_nodes
    room = Room.of(free, [(run.gang.bundle, run.gang.per_node * run.num_nodes) for run in running if not run.placed])
    decision = Decision([], {}, [])
    reserved: set[str] = set()  # resources that a job which has waited long is to have first
    full = False
    for gang in order(waiting, shares, dict(workers_of), now):
        org, at_least = gang.org_id, gang.per_node * gang.min_nodes
        most_jobs, most_workers = limits.of(org)
        place = len(decision.positions) + 1
        full = full or sum(jobs_of.values()) >= limits.max_running_jobs
        total = sum(workers_of.values())
        # An org at its quota waits for jobs of its own; nobody else waits for that.
        if full or _over(jobs_of[org] + 1, most_jobs) or _over(workers_of[org] + at_least, most_workers):
            decision.positions[gang.request_id] = place
            continue
        has_waited_long = (now - gang.waiting_since).total_seconds() > RESERVE_AFTER_S
        left = [
            limit - used for limit, used in ((limits.max_workers, total), (most_workers, workers_of[org])) if limit is not None
        ]
        allowed = min([gang.max_nodes, *(workers // gang.per_node for workers in left)])
        if allowed < gang.min_nodes:  # no machine more would help
            decision.positions[gang.request_id] = place
            full = has_waited_long
            continue
        fitting = min(allowed, room.count(gang.bundle) // gang.per_node)
        if fitting < gang.min_nodes or reserved & set(gang.bundle):
            decision.positions[gang.request_id] = place
            decision.lacking.append((gang, allowed))
            if has_waited_long:
                reserved |= set(gang.bundle)
            continue
        decision.starts.append((gang, fitting))
        jobs_of[org] += 1
        workers_of[org] += gang.per_node * fitting
        room.take(gang.bundle, gang.per_node * fitting)
    return decision


def _over(asked: int, limit: int | None) -> bool:
    return limit is not None and asked > limit
