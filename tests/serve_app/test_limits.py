"""The operator's limits on their way from the settings to those who keep them."""

from serve_app.dispatcher import Passes
from serve_app.scheduler import Limits


def test_each_limit_reaches_the_scheduler_under_its_own_name(settings, store):
    settings.max_running_jobs, settings.max_running_jobs_per_org = 11, 12
    settings.max_workers, settings.max_gpus_per_org = 13, 14
    limits = Passes(settings, store, cluster=None)._limits()
    assert limits == Limits(max_running_jobs=11, max_running_jobs_per_org=12, max_workers=13, max_workers_per_org=14)
