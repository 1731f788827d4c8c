"""The disk below the service is full for a while: jobs wait and go on, and whoever asks is told to come back."""

import os
import subprocess
import time

import httpx
import pytest

from tests.faults.conftest import SETTINGS
from tests.faults.harness import Row, Service, ends_well

pytestmark = [pytest.mark.faults, pytest.mark.faults_full]
SIZE_MIB = 3072  # what SeaweedFS wants for its volumes
FULL_S = 20


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
