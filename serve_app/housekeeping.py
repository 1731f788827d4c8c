"""What faults leave behind and nothing else cleans up. The dispatcher has it done now and then; again is harmless.

Actors, workers and placement groups aren't here: they end with their owner, and the dispatcher's passes end owners.
"""

from __future__ import annotations

import datetime as dt

import structlog

from serve_app.settings import Settings
from serve_app.storage import abandoned_uploads, abort_upload, storage_credentials
from serve_app.store.jobs import JobStore
from train_loop.data.cache import trim
from train_loop.data.sources import filesystem_for

log = structlog.get_logger()
UPLOAD_AGE = dt.timedelta(days=1)  # the longest upload takes minutes


def clean(settings: Settings, store: JobStore) -> dict[str, int]:
    """Remove what is out of date; how much there was of each kind."""
    storage, root = filesystem_for(settings.storage_uri, storage_credentials(settings))
    done = {
        "idempotency_keys": store.forget_expired_keys(),
        "uploads": 0,
        "cached_datasets": trim(storage, root, settings.data_cache_bytes),
    }
    for upload in abandoned_uploads(settings, older_than=dt.datetime.now(dt.UTC) - UPLOAD_AGE):
        abort_upload(settings, upload)
        done["uploads"] += 1
    if any(done.values()):
        log.info("cleaned up", **done)
    return done
