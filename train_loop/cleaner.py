"""Ray Train's cleaner of placement groups, which takes a silent state API for a dead controller, mended.

A detached actor beside each run asks Ray's dashboard every second whether the run's controller lives, and removes the placement
group once it doesn't: then all workers die. In Ray 2.60 an answer without the controller counts as dead, which a busy dashboard
may give, and that of another cluster on the same machine always gives. See the review of ray-project/ray pull request 65447.

A module of its own, without torch: the actor's process loads it.
"""

from __future__ import annotations

from typing import Any

from ray.train.v2._internal.callbacks import placement_group_callback
from ray.train.v2._internal.execution.controller import placement_group_cleaner


class Cleaner(placement_group_cleaner.PlacementGroupCleaner):
    """Removes the placement group only once Ray says that the controller is dead."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        placement_group_cleaner.is_actor_alive = may_live  # in the process of this actor alone


class CleanerCallback(placement_group_callback.PlacementGroupCleanerCallback):
    """Starts that cleaner."""

    def after_controller_start(self, train_run_context: Any) -> None:
        placement_group_callback.PlacementGroupCleaner = Cleaner  # in the process of the controller alone
        super().after_controller_start(train_run_context)


def may_live(actor_id: str, timeout: int) -> bool:
    """Whether an actor isn't known to be dead. `timeout` in seconds."""
    import ray
    from ray.exceptions import RayError
    from ray.util import state
    from ray.util.state.exception import RayStateApiException

    try:
        # By default Ray asks the cluster that was started last on this machine, which may be another one.
        actor = state.get_actor(actor_id, address=ray.get_runtime_context().gcs_address, timeout=timeout)
    except (RayStateApiException, RayError, OSError, ValueError):  # Ray's own class lets the last three end its watch
        return True
    return actor is None or actor.state != "DEAD"
