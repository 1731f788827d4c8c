"""Who did what: written with what was done, never changed, without secrets' values."""

import pytest
import sqlalchemy as sa

from serve_app.auth import mint_token
from serve_app.store.audit import By, add_entry, read_entries
from tests.conftest import CANARY, DOCUMENTED, ORG, OTHER_ORG, with_fields
from train_loop.spec import JobSpec


def pytest_generate_tests(metafunc):
    """Everything here holds on both databases."""
    if "store" in metafunc.fixturenames:
        metafunc.parametrize("store", ["sqlite", "postgresql"], indirect=True)


def entries(store, **which):
    with store.read() as tx:
        return read_entries(tx, **which)


def short(found):
    return [(e.who, e.action, e.object, e.outcome) for e in found]


def test_what_is_done_by_http_is_in_the_log_once_with_who_and_from_where(http, job, secret_id, store):
    headers = {"Idempotency-Key": "once"}
    made = [http.post("/job/", json=job, headers=headers).json()["request_id"] for _ in range(2)]
    named = {"org_id": ORG, "request_id": made[0]}
    for call in ("cancel", "cancel", "resume"):
        assert http.post(f"/job/{call}/", json=named).status_code == 200
    assert http.delete(f"/secret/{secret_id}", params={"org_id": ORG}).status_code == 200
    webhook_id = http.post("/webhook/", json={"org": ORG, "url": "https://example.com/told"}).json()["webhook_id"]
    assert http.delete(f"/webhook/{webhook_id}", params={"org_id": ORG}).status_code == 200
    assert made[0] == made[1]
    found = entries(store)
    assert short(found) == [
        ("tester", "secret.add", secret_id, "done"),
        ("tester", "job.submit", made[0], "done"),
        ("tester", "job.cancel", made[0], "done"),
        ("tester", "job.resume", made[0], "done"),
        ("tester", "secret.delete", secret_id, "done"),
        ("tester", "webhook.add", webhook_id, "done"),
        ("tester", "webhook.delete", webhook_id, "done"),
    ]
    assert {(e.org_id, e.address) for e in found} == {(ORG, "testclient")}
    assert CANARY not in repr(found)


def test_what_was_refused_to_somebody_is_in_the_log_and_mistakes_are_not(http, job, settings, store):
    request_id = http.post("/job/", json=job).json()["request_id"]
    named = {"org_id": ORG, "request_id": request_id}
    http.post("/job/cancel/", json=named)
    http.post("/job/resume/", json=named)
    http.post("/job/resume/", json=named)  # 409: it waits again
    http.headers["Authorization"] = f"Bearer {mint_token(settings, OTHER_ORG, 'stranger', 600)}"
    answers = [
        http.post("/job/", json=job),
        http.post("/job/cancel/", json=named),
        http.post(f"/job/{request_id}/cancel"),
        http.delete(f"/secret/{request_id}", params={"org_id": OTHER_ORG}),
        http.post("/job/", json={"org": OTHER_ORG}),
        http.post("/job/cancel/", json={"org_id": OTHER_ORG}),
    ]
    assert [a.status_code for a in answers] == [403, 403, 404, 404, 422, 422]
    refused = [(e.who, e.action, e.object, e.org_id) for e in entries(store) if e.outcome.startswith("refused: ")]
    assert refused == [
        ("tester", "job.resume", request_id, ORG),
        ("stranger", "job.submit", None, ORG),
        ("stranger", "job.cancel", request_id, ORG),
        ("stranger", "job.cancel", request_id, None),
        ("stranger", "secret.delete", request_id, OTHER_ORG),
    ]


def test_where_the_entry_can_not_be_written_nothing_is_done(store, monkeypatch):
    spec = JobSpec.model_validate(DOCUMENTED)
    made = store.insert(spec, "queued", by=By("me"))[0]

    def fails(*arguments, **more):
        raise RuntimeError("no")

    monkeypatch.setattr("serve_app.store.jobs.add_entry", fails)
    other = JobSpec.model_validate(with_fields(DOCUMENTED, {"experiment_name": "other"}))
    for call in (lambda: store.insert(other, "queued", by=By("me")), lambda: store.request_cancel(made.request_id, By("me"))):
        with pytest.raises(RuntimeError, match="no"):
            call()
    assert store.list_jobs(ORG)[0] == [made]
    assert short(entries(store)) == [("me", "job.submit", made.request_id, "done")]


def test_an_entry_is_never_changed_or_removed(store):
    with store.write() as tx:
        add_entry(tx, By("me"), "admin.pause")
    for statement in ("UPDATE audit SET who = 'you'", "DELETE FROM audit"):
        with pytest.raises(sa.exc.DBAPIError, match="never changed or removed"), store.write() as tx:
            tx.execute(sa.text(statement))
    assert short(entries(store)) == [("me", "admin.pause", None, "done")]


def test_whatever_an_issuer_calls_somebody_can_be_written_down(http, job, settings, store):
    http.headers["Authorization"] = f"Bearer {mint_token(settings, ORG, 'a' + chr(0) + chr(0xD800) + 'x' * 9000, 600)}"
    answer = http.post("/job/", json=job)
    assert answer.status_code == 200, answer.text
    assert entries(store)[-1].who.startswith("a\N{REPLACEMENT CHARACTER}?xxx")
    assert len(entries(store)[-1].who) == 500


def test_entries_are_found_by_org_and_time_oldest_first(store):
    for org in (ORG, OTHER_ORG, ORG):
        with store.write() as tx:
            add_entry(tx, By("me"), "job.submit", org_id=org)
    first, second, third = entries(store)
    assert entries(store, org_id=ORG) == [first, third]
    assert entries(store, since=second.time) == [second, third]
    assert entries(store, limit=2) == [second, third]
