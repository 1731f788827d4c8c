"""Webhooks: an org's endpoints are told when its jobs end, in signed messages (https://www.standardwebhooks.com).

The dispatcher's process delivers, in threads of its own, at least once: a message that was taken and not marked before a crash
comes again, under the same id.
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import hmac
import secrets
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus

import structlog

from serve_app import endpoints
from serve_app.errors import field_error, invalid
from serve_app.outbound import Poster, Unreached, target_of
from serve_app.secrets import SecretVault
from serve_app.settings import Settings
from serve_app.store.audit import By
from serve_app.store.jobs import Conflict, JobStore, utc_now
from serve_app.store.webhooks import Message, Webhook, WebhookStore, message_body, new_message_id
from train_loop.errors import DatasetError

log = structlog.get_logger()
MAX_PER_ORG = 20
SECRET_BYTES = 32
PREFIX = "whsec_"
TEST = "webhook.test"
FIRST_WAIT_S, LONGEST_WAIT_S = 5.0, 6 * 3600.0
GIVE_UP_AFTER = dt.timedelta(days=1)
AT_ONCE, AT_ONCE_PER_ORG = 32, 2  # an org whose endpoints don't answer holds two threads


class Webhooks:
    """The endpoints of organisations."""

    def __init__(self, store: JobStore, vault: SecretVault, allowed_hosts: Sequence[str], poster: Poster) -> None:
        self._kept, self._vault, self._allowed, self._poster = WebhookStore(store), vault, allowed_hosts, poster

    @classmethod
    def of(cls, store: JobStore, vault: SecretVault, settings: Settings) -> Webhooks:
        """Those of this service."""
        return cls(store, vault, settings.allowed_webhook_hosts, Poster())

    def create(self, org_id: str, url: str, events: Sequence[str], by: By | None = None) -> tuple[Webhook, str]:
        """Store an endpoint; and its secret, which is shown this once. Raises ApiError 422, Conflict."""
        if fault := self.fault_of(url):
            raise invalid([field_error("url", fault)])
        secret = PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()
        webhook = Webhook(str(uuid.uuid4()), org_id, url, list(events), self._vault.seal(secret), utc_now())
        if not self._kept.add(webhook, MAX_PER_ORG, by):
            raise Conflict(f"this org has {MAX_PER_ORG} webhooks, as many as it may: delete one first")
        return webhook, secret

    def fault_of(self, url: str) -> str | None:
        """Why nothing can be posted to this URL, in words that say what to mend."""
        try:
            target_of(url, self._allowed)
        except ValueError as error:
            return str(error)
        return None

    def list(self, org_id: str) -> list[Webhook]:
        """The org's, newest first."""
        return self._kept.of_org(org_id)

    def find(self, org_id: str, webhook_id: str) -> Webhook | None:
        """The webhook, or None when the org has no such one."""
        return self._kept.find(org_id, webhook_id)

    def delete(self, org_id: str, webhook_id: str, by: By | None = None) -> bool:
        """Remove it; False when the org has no such one."""
        return self._kept.remove(org_id, webhook_id, by)

    def test(self, webhook: Webhook) -> str | None:
        """Send a message of type webhook.test at once; why the endpoint didn't take it, or None."""
        now = utc_now()
        return self.send(webhook, new_message_id(), message_body(TEST, now, {"webhook_id": webhook.webhook_id}))

    def send(self, webhook: Webhook, message_id: str, body: str) -> str | None:
        """Make one try to deliver; why it failed, or None."""
        try:
            target = target_of(webhook.url, self._allowed)  # the operator's list may be another one by now
            headers = signed(self._vault.unseal(webhook.sealed), message_id, int(time.time()), body)
            status = self._poster.post(target, headers, body.encode())
        except (Unreached, ValueError) as error:
            return str(error)
        except DatasetError as error:
            return error.message
        return None if HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES else f"it answered with status {status}"


def signed(secret: str, message_id: str, timestamp: int, body: str) -> dict[str, str]:
    """The headers of a message, its signature among them."""
    key = base64.b64decode(secret.removeprefix(PREFIX))
    digest = hmac.new(key, f"{message_id}.{timestamp}.{body}".encode(), hashlib.sha256).digest()
    return {
        "content-type": "application/json",
        "user-agent": "tuneyard",
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
    }


class Deliverer:
    """Sends what is due. One at a time to an endpoint, AT_ONCE_PER_ORG to an org's, so that those that hang delay no other's.

    Nothing that it keeps outlives the process: what was under way then is due still.
    """

    def __init__(self, store: JobStore, webhooks: Webhooks, now: Callable[[], dt.datetime] = utc_now) -> None:
        self._kept, self._webhooks, self._now = WebhookStore(store), webhooks, now
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="webhook")
        self._lock = threading.Lock()
        self._busy: dict[str, str] = {}  # by webhook_id, its org

    def run(self) -> None:
        """Start what is due and has a place; waits for none of it."""
        with self._lock:
            busy = dict(self._busy)
        held = Counter(busy.values())
        if held.total() >= AT_ONCE:
            return
        for message in self._kept.due(self._now(), busy.keys()):
            org_id = message.webhook.org_id
            if held[org_id] < AT_ONCE_PER_ORG and held.total() < AT_ONCE:
                held[org_id] += 1
                with self._lock:
                    self._busy[message.webhook.webhook_id] = org_id
                self._pool.submit(self._deliver, message)

    def _deliver(self, message: Message) -> None:
        try:
            self._mark(message, self._try(message))
        except Exception:
            log.warning("a webhook's message can't be marked; it will be sent again", exc_info=True)
        finally:
            with self._lock:
                del self._busy[message.webhook.webhook_id]

    def _try(self, message: Message) -> str | None:
        try:
            return self._webhooks.send(message.webhook, message.message_id, message.body)
        except Exception:
            log.exception("a webhook's message can't be sent", webhook_id=message.webhook.webhook_id)
            return "of an unexpected error of this service"

    def _mark(self, message: Message, why: str | None) -> None:
        """The next try comes after as long again as the message is old: soon at first, then ever more rarely."""
        if why is None:
            self._kept.delivered(message)
            return
        now, about = self._now(), {"webhook_id": message.webhook.webhook_id, "request_id": message.request_id}
        age = now - message.created_at
        if age >= GIVE_UP_AFTER:
            log.warning("a webhook's message is given up", why=why, **about)
            host = endpoints.host_of(message.webhook.url)
            self._kept.give_up(message, f"The webhook at {host} wasn't told that the job ended, for a day of tries: {why}.")
        else:
            wait_s = min(max(FIRST_WAIT_S, age.total_seconds()), LONGEST_WAIT_S)
            log.info("a webhook's message isn't delivered yet", why=why, next_try_s=round(wait_s), **about)
            self._kept.postpone(message, now + dt.timedelta(seconds=wait_s))
