"""What the dispatcher can see and do of the cluster: job actors, nodes, the autoscaler. Ray's version of it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil
import ray
import yaml
from ray.exceptions import RayError

from serve_app.scheduler import Bundle, Room
from serve_app.settings import Profile
from serve_app.store.jobs import Job
from train_loop.faults import machines_lost

DISPATCHER = "dispatcher"
ACCELERATOR = "accelerator_type:"
CONFIG_OPTION = "--autoscaling-config="
# An actor that takes nothing doesn't keep the autoscaler from its node; the head stays.
ON_HEAD = {"node:__internal_head__": 0.001}


@dataclass(frozen=True)
class Node:
    """One alive machine."""

    node_id: str
    resources: Mapping[str, float]  # in all, whoever uses them
    free: Mapping[str, float]  # held by nobody: neither by us nor by others who use the same Ray
    draining: bool  # will go soon: takes no new work


@dataclass(frozen=True)
class Growth:
    """What the autoscaler may have besides the head: kinds of node with how many of each, and how many in all."""

    kinds: Sequence[tuple[Mapping[str, float], int]]
    max_nodes: int

    def count(self, bundle: Bundle) -> int:
        """How many such bundles all those nodes have room for."""
        most = sorted(((_on_one(resources, bundle), number) for resources, number in self.kinds), reverse=True)
        count, left = 0, self.max_nodes
        for fitting, number in most:
            count += fitting * min(number, left)
            left -= min(number, left)
        return count


def _on_one(resources: Mapping[str, float], bundle: Bundle) -> int:
    if not any(name.startswith(ACCELERATOR) for name in resources):  # only the node itself will know
        bundle = {name: amount for name, amount in bundle.items() if not name.startswith(ACCELERATOR)}
    return Room.of([resources]).count(bundle)


Attempt = tuple[str, int]  # request_id, attempt


class Cluster(Protocol):
    """The cluster, as far as scheduling goes. Every effect may be repeated, and raises nothing when it isn't needed any more."""

    def attempts(self) -> set[Attempt]:
        """The job actors that are alive."""
        ...

    def start(self, job: Job) -> None:
        """Have an actor for the job's newest attempt; it runs by itself."""
        ...

    def ask_to_stop(self, attempt: Attempt) -> None:
        """Have the run save and stop at its next step boundary."""
        ...

    def end(self, attempt: Attempt) -> None:
        """Kill the actor, and with it all that its run has started."""
        ...

    def leftovers(self, request_id: str) -> int:
        """Actors and placement groups that the job's runs made and that are still there."""
        ...

    def nodes(self) -> list[Node]:
        """The machines that are alive."""
        ...

    def unreachable(self, node_ids: Collection[str]) -> set[str]:
        """Those of these machines that don't answer, which Ray may not have noticed yet."""
        ...

    def growth(self) -> Growth | None:
        """What the autoscaler may have; None where there is none or nobody can tell."""
        ...

    def ask_for(self, bundles: Sequence[Bundle]) -> None:
        """Have the autoscaler keep at least room for these, instead of what it was asked for before. It outlives who asks."""
        ...


def actor_name(request_id: str, attempt: int) -> str:
    """The name under which Ray knows the actor of a job's attempt.

    With the attempt in it, a dispatcher that was asleep while another one acted can neither end nor replace a newer attempt's.
    """
    return f"job-{request_id}-{attempt}"


def _attempt_of(name: str) -> Attempt | None:
    prefix, _, rest = name.partition("-")
    request_id, _, attempt = rest.rpartition("-")
    return (request_id, int(attempt)) if prefix == "job" and attempt.isdecimal() else None


def poke_dispatcher(namespace: str) -> None:
    """Have it look now. Never raises: it polls anyway."""
    with contextlib.suppress(ValueError, RayError):
        ray.get_actor(DISPATCHER, namespace=namespace).poke.remote()


def dispatcher_answers(namespace: str, timeout_s: float) -> bool:
    """Whether it is there and answers in time."""
    try:
        ray.get(ray.get_actor(DISPATCHER, namespace=namespace).ping.remote(), timeout=timeout_s)
    except (ValueError, RayError):
        return False
    return True


def bundle_of(profile: Profile) -> dict[str, float]:
    """The Ray resources that one worker takes."""
    kind = profile.accelerator_type
    return dict(profile.resources) | ({f"{ACCELERATOR}{kind}": 0.001} if kind else {})


class RayCluster:
    """Through the Ray that this process is connected to."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace

    def attempts(self) -> set[Attempt]:
        named = ray.util.list_named_actors(all_namespaces=True)
        found = (_attempt_of(entry["name"]) for entry in named if entry["namespace"] == self._namespace)
        return {attempt for attempt in found if attempt is not None}

    def start(self, job: Job) -> None:
        from serve_app.job_actor import JobActor  # it imports this module for the name

        options = {
            "name": actor_name(job.request_id, job.attempt),
            "namespace": self._namespace,
            "lifetime": "detached",
            "get_if_exists": True,
            "resources": ON_HEAD,
        }
        ray.remote(num_cpus=0, max_concurrency=1000)(JobActor).options(**options).remote(job.request_id, job.attempt)

    def ask_to_stop(self, attempt: Attempt) -> None:
        with contextlib.suppress(ValueError, RayError):
            ray.get_actor(actor_name(*attempt), namespace=self._namespace).cancel.remote()

    def end(self, attempt: Attempt) -> None:
        with contextlib.suppress(ValueError, RayError):
            ray.kill(ray.get_actor(actor_name(*attempt), namespace=self._namespace))

    def leftovers(self, request_id: str) -> int:
        from ray._private import state  # the public state API goes through the dashboard, which may be away or slow

        table = state.actors().values()
        made = {group.creator_actor_id.hex() for group in _placement_groups() if group.state != group.REMOVED}
        own = {_address(a["Address"]) for a in table if (_attempt_of(a["Name"]) or ("", 0))[0] == request_id}
        count, seen = 0, {NOWHERE}
        # Whoever they started, and whoever those started (the Train controller and its workers).
        while own := own - seen:
            seen |= own
            children = [a for a in table if _address(a["OwnerAddress"]) in own and not a["IsDetached"]]
            count += sum((a["State"] != "DEAD") + (a["ActorID"] in made) for a in children)
            own = {_address(a["Address"]) for a in children}
        return count

    def nodes(self) -> list[Node]:
        from ray._private.state import state

        draining, free = state.get_draining_nodes(), state.available_resources_per_node()
        alive = [(node["NodeID"], node["Resources"]) for node in ray.nodes() if node["Alive"]]
        return [Node(node_id, resources, free.get(node_id, {}), node_id in draining) for node_id, resources in alive]

    def unreachable(self, node_ids: Collection[str]) -> set[str]:
        return machines_lost(node_ids) if node_ids else set()

    def growth(self) -> Growth | None:
        # Ray tells nobody what its autoscaler was given; on the head, where the dispatcher is, its process has it. Another Ray of
        # the machine may have one, too.
        commands = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
        found = [c for c in commands if any(word.endswith("monitor.py") and "autoscaler" in word for word in c)]
        ours = [c for c in found if f"--gcs-address={ray.get_runtime_context().gcs_address}" in c] or found
        paths = [word.removeprefix(CONFIG_OPTION) for c in ours for word in c if word.startswith(CONFIG_OPTION)]
        return _growth_of(Path(paths[0])) if paths and paths[0] else None

    def ask_for(self, bundles: Sequence[Bundle]) -> None:
        from ray.autoscaler.sdk import request_resources

        request_resources(bundles=[dict(bundle) for bundle in bundles])


NOWHERE = ("", 0)


def _growth_of(path: Path) -> Growth | None:
    """From the autoscaler's own configuration, as `ray up` leaves it on the head; None where resources aren't filled in."""
    try:
        config = yaml.safe_load(path.expanduser().read_text())
        kinds, head = config["available_node_types"], config["head_node_type"]
        max_nodes = int(config["max_workers"])
        workers = {name: kind for name, kind in kinds.items() if name != head or kind.get("max_workers")}
        if not all(kind.get("resources") for kind in workers.values()):
            return None
        return Growth([(k["resources"], int(k.get("max_workers", max_nodes))) for k in workers.values()], max_nodes)
    except (OSError, KeyError, TypeError, ValueError, AttributeError, yaml.YAMLError):
        return None


def _address(address: Mapping[str, Any]) -> tuple[str, int]:
    return address["IPAddress"], address["Port"]


def _placement_groups() -> list[Any]:
    """Ray's own records: what Ray hands out elsewhere doesn't say whose they are."""
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData

    table = state._connect_and_get_accessor().get_placement_group_table()
    return [PlacementGroupTableData.FromString(entry) for entry in table]
