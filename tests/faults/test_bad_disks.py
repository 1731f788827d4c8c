"""The disk below the service is full or slow for a while: jobs wait and go on, and whoever asks is told to come back."""

import os
import signal
import subprocess
import time

import httpx
import pytest

from tests.faults.conftest import SETTINGS
from tests.faults.harness import S3, Row, Service, ends_well

pytestmark = pytest.mark.faults
SIZE_MIB = 3072  # what SeaweedFS wants for its volumes
FULL_S, SLOW_S = 20, 12
STOPPED_S, GOES_S = 2.0, 0.3


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A file system of its own, which a test can fill."""
    folder = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MIB}m", "tmpfs", folder], check=False, capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk can't be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="module")
def on_small_disk(small_disk, mirror):
    """A service whose job store, object storage and logs are all on the small disk."""
    with Service(small_disk, mirror, **SETTINGS).up_with_data() as running:
        yield running


@pytest.mark.faults_full
def test_a_job_goes_on_after_the_disk_of_everything_was_full(on_small_disk, small_disk, table):
    service, row = on_small_disk, Row(f"no room on the disk for {FULL_S} s", "training")
    table.rows.append(row)
    request_id = service.submit("full-disk")
    service.until(request_id, lambda job: job["step"] >= 5, "its fifth step")
    filler = small_disk / "filler"
    with filler.open("wb") as file:
        try:
            while True:
                os.write(file.fileno(), bytes(1 << 16))
        except OSError:
            pass
    room_at = time.monotonic() + FULL_S
    while time.monotonic() < room_at:
        refused = httpx.post(
            f"{service.up['url']}/job/", headers={"Authorization": f"Bearer {service.token}"}, json=service.job("no-room")
        )
        assert (refused.status_code, "Retry-After" in refused.headers) == (503, True), refused.text
        time.sleep(1)
    filler.unlink()
    job = ends_well(service, table, request_id, [row], [time.monotonic()])
    assert job["attempt"] == 1


def test_a_job_waits_for_a_slow_disk(service, table):
    """The object storage stands still most of the time, as one on a disk that is much too slow for it does."""
    row = Row(f"a storage that stands still {STOPPED_S:g} s of {STOPPED_S + GOES_S:g} s", "training")
    table.rows.append(row)
    request_id = service.submit("slow-disk")
    service.until(request_id, lambda job: job["step"] >= 5, "its fifth step")
    well_at = time.monotonic() + SLOW_S
    storage = S3.find(service)
    assert storage
    try:
        while time.monotonic() < well_at:
            for signal_, wait_s in ((signal.SIGSTOP, STOPPED_S), (signal.SIGCONT, GOES_S)):
                for process in storage:
                    process.send_signal(signal_)
                time.sleep(wait_s)
    finally:
        for process in storage:
            process.send_signal(signal.SIGCONT)
    job = ends_well(service, table, request_id, [row], [well_at])
    assert job["attempt"] == 1
