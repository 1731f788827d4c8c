"""An outage of the storage is waited out, and nothing is lost, doubled or half written."""

import contextlib
import errno
import hashlib
import subprocess
import threading

import pytest
from pyarrow.fs import LocalFileSystem

from serve_app.embedded.s3 import start_s3
from tests.train_loop.runs import HP, Watcher, adapter, curve
from train_loop.data.sources import Credentials, filesystem_for
from train_loop.errors import Cause, RunFault
from train_loop.launch import launch_local
from train_loop.run_files import Keys, RunFiles
from train_loop.spec import JobSpec
from train_loop.storage import (
    MAX_LATE,
    PATIENCE_S,
    list_files,
    outages_told,
    patiently,
    read_bytes,
    read_json,
    within,
    write_json,
)

LOCAL = LocalFileSystem()


def test_a_full_disk_is_waited_for_and_told_of_once():
    tries, told = [], []

    def write():
        tries.append(1)
        if len(tries) < 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return "written"

    with outages_told(told.append):
        assert patiently(write, "writing x", patience_s=60) == "written"
    assert len(tries) == 3
    assert [text.split(" (")[0] for text in told[:1]] == ["the storage is away"]
    assert told[1].startswith("the storage is back after")
    assert len(told) == 2


def test_a_disk_that_stays_full_is_a_fault_of_the_storage():
    def write():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunFault) as caught:
        patiently(write, "writing x", patience_s=0.5)
    assert caught.value.cause == Cause.STORAGE_AWAY
    assert "writing x" in caught.value.message
    assert "No space left" in caught.value.message


@pytest.mark.parametrize(
    "answer",
    [FileNotFoundError("x"), PermissionError("x"), OSError("AWS Error ACCESS_DENIED during PutObject"), KeyError("ours")],
)
def test_an_answer_is_not_waited_for(answer):
    tries = []

    def act():
        tries.append(1)
        raise answer

    with pytest.raises(type(answer)):
        patiently(act, "x", patience_s=60)
    assert len(tries) == 1


def test_a_reader_never_sees_half_an_object(tmp_path):
    path = str(tmp_path / "deep/folder/value.json")
    assert read_json(LOCAL, path) is None
    values = [{"n": i, "padding": "x" * 200_000} for i in range(2)]
    write_json(LOCAL, path, values[0])
    done = threading.Event()

    def write():
        while not done.is_set():
            for value in values:
                write_json(LOCAL, path, value)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert all(read_json(LOCAL, path) in values for _ in range(200))
    finally:
        done.set()
        writer.join()
    assert list_files(LOCAL, str(tmp_path)) == {"deep/folder/value.json": len(read_bytes(LOCAL, path))}


class Server:
    """SeaweedFS that can be stopped and started again at the same address."""

    def __init__(self, folder):
        self.server = start_s3(folder / "data", folder / "s3.log")
        self.process = self.server.process
        self.keys = Credentials(self.server.access_key_id, self.server.secret_access_key, endpoint_url=self.server.endpoint_url)

    def stop(self):
        self.process.kill()
        self.process.wait()

    def start(self):
        self.process = subprocess.Popen(self.server.process.args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.fixture
def server(tmp_path):
    found = Server(tmp_path)
    yield found
    found.stop()


class Outage(Watcher):
    """Stops the server when a step has been reported, and starts it again later."""

    def __init__(self, server, at, away_s):
        super().__init__()
        self.server, self.at, self.away_s = server, at, away_s
        self.back = None

    def on_progress(self, progress):
        super().on_progress(progress)
        if self.seen == self.at and self.back is None:
            self.server.stop()
            self.back = threading.Timer(self.away_s, self.server.start)
            if self.away_s is not None:
                self.back.start()


def test_a_run_outlives_a_restart_of_its_storage(local_job, tmp_path, mirror, server):
    job = local_job({f"{HP}.max_steps": 6, f"{HP}.save_steps": 2, f"{HP}.eval_steps": 3})
    spec = JobSpec.model_validate(job)
    launch_local(spec, "whole", RunFiles(str(tmp_path / "whole"), str(mirror), lambda: Keys()), Watcher())

    uri = "s3://tuneyard/run"
    monitor = Outage(server, 2, away_s=6)
    manifest = launch_local(spec, "run", RunFiles(uri, str(mirror), lambda: Keys(storage=server.keys)), monitor)
    monitor.back.join()
    away, back = monitor.said("storage_away")[:2]
    assert away.startswith("the storage is away (")
    assert back.startswith("the storage is back after ")

    storage, path = filesystem_for(uri, server.keys)
    assert read_bytes(storage, f"{path}/adapter/adapter_model.safetensors") == adapter(tmp_path / "whole")
    assert read_json(storage, f"{path}/manifest.json") == manifest
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/metrics.jsonl").write_bytes(read_bytes(storage, f"{path}/metrics.jsonl"))
    assert curve(tmp_path / "copy") == curve(tmp_path / "whole")
    files = list_files(storage, f"{path}/checkpoints")
    assert {name.split("/")[0] for name in files} == {"step-00000004", "step-00000006"}
    for folder in ("step-00000004", "step-00000006"):
        for file in read_json(storage, f"{path}/checkpoints/{folder}/complete.json")["files"]:
            data = read_bytes(storage, f"{path}/checkpoints/{folder}/{file['name']}")
            assert hashlib.sha256(data).hexdigest() == file["sha256"]


def test_a_storage_that_stays_away_ends_the_attempt_with_that_cause(local_job, mirror, server, monkeypatch):
    monkeypatch.setenv(PATIENCE_S, "2")
    spec = JobSpec.model_validate(local_job({f"{HP}.max_steps": 6, f"{HP}.save_steps": 2}))
    files = RunFiles("s3://tuneyard/run", str(mirror), lambda: Keys(storage=server.keys))
    with pytest.raises(RunFault) as caught:
        launch_local(spec, "run", files, Outage(server, 3, away_s=None))
    assert caught.value.cause == Cause.STORAGE_AWAY
    assert caught.value.message.startswith("The storage was away for 2 s (writing tuneyard/run/")


def test_what_a_storage_does_not_answer_in_time_is_given_up_and_only_so_much_waits_for_it():
    answered, began = threading.Event(), []

    def ask():
        began.append(1)
        answered.wait(60)

    for _ in range(MAX_LATE + 5):
        with pytest.raises(RunFault) as fault:
            within(0.01, ask, "asking")
        assert fault.value.cause is Cause.STORAGE_AWAY
    assert len(began) <= MAX_LATE
    answered.set()
    heard = None
    while heard is None:  # as soon as one of them has ended
        with contextlib.suppress(RunFault):
            heard = within(60, lambda: "answer", "asking")
    assert heard == "answer"
    with pytest.raises(FileNotFoundError):
        within(60, lambda: read_bytes(LOCAL, "/no/such/file"), "asking")
