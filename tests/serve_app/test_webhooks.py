"""Webhooks: what is told, to whom, how often, and what of it anyone else can see; on both databases."""

import datetime as dt
import json

import pytest
import sqlalchemy as sa
from standardwebhooks import Webhook as Verifier
from standardwebhooks import WebhookVerificationError

from serve_app.auth import mint_token
from serve_app.lifecycle import Status
from serve_app.outbound import Poster
from serve_app.secrets import SecretVault
from serve_app.store.jobs import utc_now
from serve_app.store.tables import webhook_messages, webhooks
from serve_app.webhooks import AT_ONCE_PER_ORG, MAX_PER_ORG, Deliverer, Webhooks
from tests.conftest import DOCUMENTED, ORG, OTHER_ORG, fields, with_fields
from tests.serve_app.receivers import receiving, until
from train_loop.errors import Cause
from train_loop.spec import JobSpec


def pytest_generate_tests(metafunc):
    """Everything here holds on both databases."""
    if "store" in metafunc.fixturenames:
        metafunc.parametrize("store", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def hooks(store, settings):
    return Webhooks.of(store, SecretVault.from_settings(store, settings), settings)


@pytest.fixture
def receiver():
    with receiving() as receiver:
        yield receiver


ALL = ["job.completed", "job.failed", "job.canceled"]


def submit(store, name="job", org=ORG):
    return store.insert(JobSpec.model_validate(with_fields(DOCUMENTED, {"experiment_name": name, "org": org})), "queued")[
        0
    ].request_id


def complete(store, name="job", org=ORG):
    request_id = submit(store, name, org)
    store.start_attempt(request_id, 0, 1)
    return store.finish(request_id, 1, Status.COMPLETED, message="Adapter saved.", output_model_path="s3://b/a").request_id


def waiting(store):
    with store.read() as tx:
        return tx.execute(sa.select(webhook_messages)).all()


def failed_by_itself(store, request_id):
    store.start_attempt(request_id, 0, 1)
    store.finish(request_id, 1, Status.FAILED, message="no rows", error_code="dataset_empty", error_message="no rows")


def failed_by_faults(store, request_id):
    store.start_attempt(request_id, 0, 1)
    for attempt in range(1, 5):
        store.record_fault(request_id, attempt, Cause.HANG, "No step.")
        store.start_attempt(request_id, attempt, 1)


def refused(store, request_id):
    store.refuse(request_id, "too_large", "too large")


def canceled_while_queued(store, request_id):
    store.request_cancel(request_id)
    store.request_cancel(request_id)


def canceled_while_running(store, request_id):
    store.start_attempt(request_id, 0, 1)
    store.request_cancel(request_id)
    for _ in range(2):
        store.cancel_ended(request_id, 1, "Canceled on request.")


def completed(store, request_id):
    store.start_attempt(request_id, 0, 1)
    for _ in range(2):
        store.finish(request_id, 1, Status.COMPLETED, message="ok")


ENDINGS = {
    completed: "job.completed",
    failed_by_itself: "job.failed",
    failed_by_faults: "job.failed",
    refused: "job.failed",
    canceled_while_queued: "job.canceled",
    canceled_while_running: "job.canceled",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_way_to_end_is_told_once_to_those_who_asked(store, hooks, receiver, ending):
    event = ENDINGS[ending]
    told, _ = hooks.create(ORG, receiver.url, [event])
    hooks.create(ORG, receiver.url, [e for e in ALL if e != event])
    hooks.create(OTHER_ORG, receiver.url, ALL)
    request_id = submit(store)
    assert waiting(store) == []
    ending(store, request_id)
    (message,) = waiting(store)
    assert message.webhook_id == told.webhook_id
    body = json.loads(message.body)
    assert (body["type"], body["data"]["request_id"], body["data"]["status"]) == (
        event,
        request_id,
        event.removeprefix("job.").upper(),
    )


def test_a_job_that_ends_again_after_a_resume_is_told_again(store, hooks, receiver):
    hooks.create(ORG, receiver.url, ALL)
    request_id = submit(store)
    canceled_while_queued(store, request_id)
    store.resume(request_id)
    completed(store, request_id)
    assert [json.loads(m.body)["type"] for m in waiting(store)] == ["job.canceled", "job.completed"]
    assert len({m.message_id for m in waiting(store)}) == 2


def test_the_specifications_own_verifier_takes_what_is_sent(store, hooks, receiver):
    _, secret = hooks.create(ORG, receiver.url, ALL)
    request_id = complete(store)
    Deliverer(store, hooks).run()
    until(lambda: not waiting(store), "not delivered")
    ((headers, body),) = receiver.got
    told = Verifier(secret).verify(body, headers)
    assert told["type"] == "job.completed"
    assert told["timestamp"] == told["data"]["completed_at"]
    expected = {"request_id": request_id, "org": ORG, "status": "COMPLETED", "output_model_path": "s3://b/a", "error_code": None}
    assert told["data"].items() >= expected.items()
    assert headers["content-type"] == "application/json"
    with pytest.raises(WebhookVerificationError):
        Verifier(secret).verify(body + b" ", headers)
    other = hooks.create(ORG, receiver.url, ALL)[1]
    with pytest.raises(WebhookVerificationError):
        Verifier(other).verify(body, headers)


def test_a_crash_between_delivery_and_its_mark_delivers_again_under_the_same_id(store, hooks, receiver, monkeypatch):
    hooks.create(ORG, receiver.url, ALL)
    complete(store)
    dies = Deliverer(store, hooks)
    monkeypatch.setattr(dies, "_mark", lambda *_: 1 / 0)
    dies.run()
    until(lambda: len(receiver.got) == 1 and not dies._busy, "not sent")
    assert len(waiting(store)) == 1
    Deliverer(store, hooks).run()
    until(lambda: not waiting(store), "not sent again")
    assert len(receiver.got) == 2
    assert len(set(receiver.ids())) == 1
    assert receiver.got[0][1] == receiver.got[1][1]


def test_an_endpoint_that_fails_is_tried_ever_more_rarely_for_a_day_and_then_given_up(store, hooks, receiver):
    receiver.status = 500
    hooks.create(ORG, receiver.url, ALL)
    request_id = complete(store)
    start = clock = utc_now()
    deliverer = Deliverer(store, hooks, lambda: clock)
    gaps = []
    while waiting(store):
        before = len(receiver.got)
        deliverer.run()
        until(lambda count=before: len(receiver.got) > count and not deliverer._busy, "not tried")
        if left := waiting(store):
            gaps.append((left[0].next_at - clock).total_seconds())
            deliverer.run()
            assert not deliverer._busy  # not before its time
            clock = left[0].next_at + dt.timedelta(milliseconds=1)
    assert len(set(receiver.ids())) == 1
    assert 5 <= gaps[0] < 10
    assert gaps == sorted(gaps)
    assert max(gaps) <= 6 * 3600
    assert 10 < len(gaps) < 25
    assert dt.timedelta(hours=24) <= clock - start < dt.timedelta(hours=31)
    (event,) = [e for e in store.journal.events(request_id) if e.kind == "webhook_failed"]
    assert "127.0.0.1" in event.message
    assert "status 500" in event.message
    assert "hook" not in event.message.replace("webhook", "")  # paths hold tokens


def test_an_endpoint_that_is_back_gets_everything(store, hooks, receiver):
    receiver.status = 503
    hooks.create(ORG, receiver.url, ALL)
    ids = {complete(store, f"job-{i}") for i in range(4)}
    clock = utc_now()
    deliverer = Deliverer(store, hooks, lambda: clock)
    deliverer.run()
    until(lambda: receiver.got and not deliverer._busy, "not tried")
    deliverer.run()
    assert not deliverer._busy  # the others wait with the first
    assert len(receiver.got) == 1
    receiver.status = 200
    clock += dt.timedelta(minutes=1)
    receiver.got.clear()

    def all_told():
        deliverer.run()
        return not waiting(store)

    until(all_told, "not all delivered")
    assert {json.loads(body)["data"]["request_id"] for _, body in receiver.got} == ids
    assert len(receiver.got) == 4


def test_endpoints_that_hang_hold_two_places_and_delay_nobody_else(store, hooks, receiver):
    with receiving() as hangs:
        hangs.free.clear()
        for _ in range(AT_ONCE_PER_ORG + 2):
            hooks.create(ORG, hangs.url, ALL)
        hooks.create(OTHER_ORG, receiver.url, ALL)
        for i in range(3):
            complete(store, f"job-{i}")
        complete(store, "theirs", OTHER_ORG)
        deliverer = Deliverer(store, hooks)
        for _ in range(3):
            deliverer.run()
        until(lambda: receiver.got, "delayed by another org")
        assert len(deliverer._busy) <= AT_ONCE_PER_ORG + 1
        until(lambda: len(hangs.got) == AT_ONCE_PER_ORG, "not tried")
        hangs.free.set()
        until(lambda: not deliverer._busy, "hangs")


def test_a_webhook_of_another_key_is_not_told_and_says_so(store, settings, receiver):
    from cryptography.fernet import Fernet

    old, new = (Fernet.generate_key().decode() for _ in range(2))
    sealing = Webhooks(store, SecretVault(store, old, []), settings.allowed_webhook_hosts, Poster())
    webhook, secret = sealing.create(ORG, receiver.url, ALL)
    lost = Webhooks(store, SecretVault(store, new, []), settings.allowed_webhook_hosts, Poster())
    assert "TUNEYARD_SECRET_KEY" in lost.test(webhook)
    assert receiver.got == []
    rotated = Webhooks(store, SecretVault(store, f"{new},{old}", []), settings.allowed_webhook_hosts, Poster())
    assert rotated.test(webhook) is None
    ((headers, body),) = receiver.got
    assert Verifier(secret).verify(body, headers)["type"] == "webhook.test"


# --- over HTTP ---


def add(http, url, **more):
    return http.post("/webhook/", json={"org": ORG, "url": url, **more})


def test_a_secret_is_shown_once_and_stored_encrypted(http, store, receiver):
    made = add(http, receiver.url).json()
    assert made["events"] == sorted(ALL)
    assert made["secret"].startswith("whsec_")
    (listed,) = http.get("/webhook/list/", params={"org_id": ORG}).json()["webhooks"]
    assert listed == {k: v for k, v in made.items() if k != "secret"}
    with store.read() as tx:
        (row,) = tx.execute(sa.select(webhooks)).all()
    assert made["secret"].removeprefix("whsec_").encode() not in row.ciphertext


def test_a_test_message_says_whether_it_was_taken_and_nothing_of_the_answer(http, receiver):
    made = add(http, receiver.url).json()
    ask = f"/webhook/{made['webhook_id']}/test"
    assert http.post(ask, params={"org_id": ORG}).json() == {
        "webhook_id": made["webhook_id"],
        "delivered": True,
        "error": None,
    }
    ((headers, body),) = receiver.got
    assert Verifier(made["secret"]).verify(body, headers)["type"] == "webhook.test"
    receiver.answer = lambda handler: handler.wfile.write(b"HTTP/1.1 404 canary\r\nx: canary\r\n\r\ncanary")
    answer = http.post(ask, params={"org_id": ORG})
    assert (answer.json()["delivered"], answer.json()["error"]) == (False, "it answered with status 404")
    assert "canary" not in answer.text


def test_deleting_a_webhook_forgets_what_it_was_still_to_be_told(http, store, receiver):
    made = add(http, receiver.url).json()
    complete(store)
    assert len(waiting(store)) == 1
    assert http.delete(f"/webhook/{made['webhook_id']}", params={"org_id": ORG}).json()["deleted"] is True
    assert waiting(store) == []
    assert http.delete(f"/webhook/{made['webhook_id']}", params={"org_id": ORG}).status_code == 404
    assert http.get("/webhook/list/", params={"org_id": ORG}).json() == {"webhooks": []}


def test_an_org_sees_and_touches_its_own_webhooks_only(http, settings, hooks, receiver):
    theirs, _ = hooks.create(OTHER_ORG, receiver.url, ALL)
    assert http.get("/webhook/list/", params={"org_id": ORG}).json() == {"webhooks": []}
    assert http.get("/webhook/list/", params={"org_id": OTHER_ORG}).status_code == 403
    for org, status in ((ORG, 404), (OTHER_ORG, 403)):
        assert http.delete(f"/webhook/{theirs.webhook_id}", params={"org_id": org}).status_code == status
        assert http.post(f"/webhook/{theirs.webhook_id}/test", params={"org_id": org}).status_code == status
    assert http.post("/webhook/", json={"org": OTHER_ORG, "url": receiver.url}).status_code == 403
    assert receiver.got == []
    http.headers["Authorization"] = f"Bearer {mint_token(settings, ORG, 'x', 60, 'jobs:read jobs:write')}"
    assert add(http, receiver.url).status_code == 403
    assert http.get("/webhook/list/", params={"org_id": ORG}).status_code == 403


def test_an_org_has_only_so_many_webhooks(http, receiver):
    for _ in range(MAX_PER_ORG):
        assert add(http, receiver.url).status_code == 200
    refused = add(http, receiver.url)
    assert refused.status_code == 409
    assert "delete one" in refused.json()["detail"]


@pytest.mark.parametrize(
    "url", ["http://hooks.example/", "https://169.254.169.254/latest", "https://10.1.2.3/", "nonsense", "", 7]
)
def test_a_url_that_will_not_do_is_a_422(http, url):
    assert set(fields(add(http, url))) == {"url"}


@pytest.mark.parametrize("events", [[], ["job.exploded"], ["job.failed", "job.failed"], "job.failed", [["job.failed"]], {}])
def test_events_that_will_not_do_are_a_422_that_lists_those_that_are_there(http, receiver, events):
    assert fields(add(http, receiver.url, events=events))["events"]["allowed"] == sorted(ALL)


def test_all_that_is_wrong_comes_at_once(http):
    wrong = {"org": "x", "url": "http://hooks.example/", "events": [1], "secret": "x"}
    assert fields(http.post("/webhook/", json=wrong)).keys() == wrong.keys()
    assert fields(http.post("/webhook/", json={})).keys() == {"org", "url"}
