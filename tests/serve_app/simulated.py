"""A cluster that exists only in memory, for the real dispatcher to work on."""

import datetime as dt

from serve_app.cluster import Node

NODES = 2
GPUS = 2


class World:
    """The simulated cluster and its clock."""

    def __init__(self):
        self.now = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
        self.seconds_awake = 0.0
        self.actors = {}  # (request_id, attempt) → whether it has started to work
        self.told_to_stop = set()
        self.unseen = {}  # actors on a machine that the cluster thinks dead: they may still act
        self.nodes_up = NODES
        self.stuck = 0  # processes of ended actors that are still there
        self.asked = []
        self.growth = None
        self.draining = set()  # machines that will go
        self.silent = set()  # machines that are gone and that the cluster hasn't missed yet
        self.others = [0] * NODES  # GPUs of each machine that somebody else holds
        self.placed = {}  # attempts → how many workers of theirs hold a GPU each

    def free(self):
        """GPUs of each machine that nobody holds."""
        left = [GPUS - self.others[i] for i in range(self.nodes_up)]
        for workers in (count for attempt, count in self.placed.items() if attempt in self.actors):
            for i, gpus in enumerate(left):
                here = min(workers, gpus)
                left[i], workers = gpus - here, workers - here
        return left

    def place(self, attempt, workers):
        """Give its workers their GPUs; whether there were as many."""
        if sum(self.free()) < workers:
            return False
        self.placed[attempt] = workers
        return True

    def clock(self):
        return self.now

    def awake_s(self):
        return self.seconds_awake

    def later(self, seconds):
        self.now += dt.timedelta(seconds=seconds)
        self.seconds_awake += seconds


class SimCluster:
    """serve_app.cluster.Cluster over a World."""

    def __init__(self, world):
        self.world = world

    def attempts(self):
        return set(self.world.actors)

    def start(self, job):
        self.world.actors.setdefault((job.request_id, job.attempt), False)

    def ask_to_stop(self, attempt):
        self.world.told_to_stop.add(attempt)

    def end(self, attempt):
        self.world.actors.pop(attempt, None)

    def leftovers(self, request_id):
        return self.world.stuck

    def nodes(self):
        free = [{"GPU": float(gpus)} if gpus else {} for gpus in self.world.free()]
        names = [f"node-{i}" for i in range(len(free))]
        return [Node(n, {"GPU": float(GPUS)}, gpus, n in self.world.draining) for n, gpus in zip(names, free, strict=True)]

    def unreachable(self, node_ids):
        return self.world.silent & set(node_ids)

    def growth(self):
        return self.world.growth

    def ask_for(self, bundles):
        self.world.asked = list(bundles)
