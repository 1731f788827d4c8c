"""What faults leave behind and nothing else cleans up, and what is kept no longer. The dispatcher has it done now and then, an
operator with `tuneyard admin gc`; again is harmless, and so are both at once.

Actors, workers and placement groups aren't here: they end with their owner, and the dispatcher's passes end owners.
"""

from __future__ import annotations

import datetime as dt

from serve_app.retention import remove_checkpoints, remove_journals
from serve_app.settings import Settings
from serve_app.storage import abandoned_uploads, abort_upload, storage_credentials
from serve_app.store.jobs import JobStore
from train_loop.data.cache import trim
from train_loop.data.sources import filesystem_for

UPLOAD_AGE = dt.timedelta(days=1)  # the longest upload takes minutes


def clean(settings: Settings, store: JobStore, *, dry_run: bool = False) -> dict[str, int]:
    """Remove what is out of date, or only look for it; how much there was of each kind."""
    storage, root = filesystem_for(settings.storage_uri, storage_credentials(settings))
    done = {
        "idempotency_keys": store.forget_expired_keys(dry_run=dry_run),
        "journals": remove_journals(settings, store, dry_run=dry_run),
        "uploads": 0,
        "cached_datasets": trim(storage, root, settings.data_cache_bytes, dry_run=dry_run),
        "checkpoints": remove_checkpoints(settings, store, dry_run=dry_run),
    }
    for upload in abandoned_uploads(settings, older_than=dt.datetime.now(dt.UTC) - UPLOAD_AGE):
        if not dry_run:
            abort_upload(settings, upload)
        done["uploads"] += 1
    return done
