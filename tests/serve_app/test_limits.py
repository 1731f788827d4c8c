"""The operator's limits on their way from the settings to those who keep them."""

from serve_app.dispatcher import Passes
from serve_app.scheduler import Limits
from serve_app.store.quotas import Quota


def test_each_limit_reaches_the_scheduler_under_its_own_name(settings, store):
    settings.max_running_jobs, settings.max_running_jobs_per_org = 11, 12
    settings.max_workers, settings.max_gpus_per_org = 13, 14
    passes = Passes(settings, store, cluster=None)
    limits = passes._limits()
    assert limits == Limits(max_running_jobs=11, max_running_jobs_per_org=12, max_workers=13, max_workers_per_org=14)
    passes._quotas = {"a": Quota(max_gpus=21), "b": Quota(max_running_jobs=22, max_gpus=23, max_queued_jobs=24)}
    assert passes._limits().of_orgs == {"a": (12, 21), "b": (22, 23)}
