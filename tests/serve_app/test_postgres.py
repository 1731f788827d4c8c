"""Connections to PostgreSQL: what a request makes of them, and that the database may go away and come back."""

import contextlib
import os
import socket
import threading

import pytest
import sqlalchemy as sa
from starlette.testclient import TestClient

from serve_app.app import build_app
from serve_app.auth import mint_token
from serve_app.store import jobs
from serve_app.store.jobs import JobStore
from tests.conftest import DOCUMENTED, ORG, Idle
from train_loop.spec import JobSpec

SPEC = JobSpec.model_validate(DOCUMENTED)


class Counted:
    """A way to the server that counts what clients say: each time they wait for an answer."""

    def __init__(self, server: str) -> None:
        self.asked, self._server = 0, server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"postgresql+psycopg://postgres:@127.0.0.1:{self._listener.getsockname()[1]}/postgres"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, server = self._listener.accept()[0], socket.socket(socket.AF_UNIX)
            server.connect(self._server)
            threading.Thread(target=self._pass_on, args=(client, server, 1), daemon=True).start()
            threading.Thread(target=self._pass_on, args=(server, client, 0), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, counts: int) -> None:
        with contextlib.suppress(OSError), source, target:
            while data := source.recv(1 << 20):
                self.asked += counts
                target.sendall(data)


@pytest.mark.parametrize("store", ["postgresql"], indirect=True)
def test_the_status_of_a_job_is_one_question_to_the_database(store, settings, postgres):
    job = store.insert(SPEC, "queued")[0]
    store.set_queue_positions({job.request_id: 1})
    way = Counted(sa.make_url(postgres).query["host"] + "/.s.PGSQL.5432")
    counted = JobStore.open(way.url)
    with TestClient(build_app(settings, counted, Idle())) as http:
        http.headers["Authorization"] = f"Bearer {mint_token(settings, ORG, 'tester', 600)}"

        def status():
            return http.get("/job/get/", params={"org_id": ORG, "request_id": job.request_id})

        # After some times psycopg prepares the statement, once for each connection.
        assert [status().json()["queue_position"] for _ in range(10)] == [1] * 10
        before = way.asked
        assert all(status().status_code == 200 for _ in range(10))
        assert way.asked - before == 10
    counted.engine.dispose()


def cut_all(store):
    """End the server's side of every connection but the one that asks for it, as a restart does."""
    with store.engine.connect() as other:
        others = sa.text(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = 'postgres'"
        )
        assert all(other.execute(others).scalars())


@pytest.mark.parametrize("store", ["postgresql"], indirect=True)
def test_connections_that_the_database_has_cut_are_replaced(store, postgres, monkeypatch):
    mine = JobStore.open(postgres)
    job = mine.insert(SPEC, "queued")[0]
    with mine.read() as one, mine.read() as two:  # two in the pool
        assert one.execute(sa.text("SELECT 1")).scalar() == two.execute(sa.text("SELECT 1")).scalar()
    cut_all(store)
    monkeypatch.setattr(jobs, "PROVEN_S", -1.0)  # as if they had been idle for a while
    mine.set_queue_positions({job.request_id: 3})
    assert mine.get(job.request_id).queue_position == 3
    mine.engine.dispose()


@pytest.mark.parametrize("store", ["postgresql"], indirect=True)
def test_connections_cut_while_they_are_in_use_cost_one_request(store, postgres):
    mine = JobStore.open(postgres)
    job = mine.insert(SPEC, "queued")[0]
    with mine.read() as one, mine.read() as two:
        assert one.execute(sa.text("SELECT 1")).scalar() == two.execute(sa.text("SELECT 1")).scalar()
    cut_all(store)
    with pytest.raises(jobs.STORE_AWAY):
        mine.get(job.request_id)
    assert mine.get(job.request_id) == job
    mine.engine.dispose()


@pytest.mark.parametrize("store", ["postgresql"], indirect=True)
def test_a_database_that_takes_no_writes_for_a_while_is_away(settings, store, postgres):
    def have_new_connections(mode):
        with store.write() as tx:
            tx.execute(sa.text(f"ALTER DATABASE postgres SET default_transaction_read_only = {mode}"))

    have_new_connections("on")  # as by an address that leads to a standby, in the minute after a failover
    mine = JobStore.open(postgres)
    try:
        with TestClient(build_app(settings, mine, Idle()), raise_server_exceptions=False) as http:
            http.headers["Authorization"] = f"Bearer {mint_token(settings, ORG, 'tester', 600)}"
            secret = {"org": ORG, "name": "token", "type": "hf", "data": {"token": "x"}}
            away = http.post("/secret/", json=secret)
            assert (away.status_code, away.headers["Retry-After"]) == (503, "5")
            with pytest.raises(jobs.STORE_AWAY):
                mine.insert(SPEC, "queued")
            have_new_connections("off")
            assert http.post("/secret/", json=secret).status_code == 200  # by another connection, which leads elsewhere
            assert mine.insert(SPEC, "queued")[1]
    finally:
        have_new_connections("off")
        mine.engine.dispose()


@pytest.mark.parametrize("store", ["postgresql"], indirect=True)
def test_a_database_whose_machine_is_gone_without_a_word_is_noticed_in_half_a_minute(store, postgres):
    way = Counted(sa.make_url(postgres).query["host"] + "/.s.PGSQL.5432")

    def limits_s(url):
        """Of connecting, of what was sent and isn't there, of an answer that is owed."""
        opened = JobStore.open(url)
        with opened.read() as connection:
            driver = connection.connection.driver_connection
            with socket.socket(fileno=os.dup(driver.fileno())) as there:
                assert there.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                idle, every, times, unsent_ms = (
                    there.getsockopt(socket.IPPROTO_TCP, option)
                    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
                )
            connecting_s = int(driver.info.get_parameters()["connect_timeout"])
        opened.engine.dispose()
        return connecting_s, unsent_ms / 1000, idle + every * times

    assert limits_s(way.url) == (10, 30, 30)
    assert limits_s(f"{way.url}?connect_timeout=4&keepalives_count=2") == (4, 30, 20)
