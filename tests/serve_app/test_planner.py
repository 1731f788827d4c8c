"""Plans are made by processes: each by one of its own, which ends, whatever it is at, and takes nobody with it."""

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from serve_app.errors import ApiError
from serve_app.planner import Planner, _hardware
from serve_app.settings import Profile, Settings
from serve_app.store.jobs import JobStore
from tests.conftest import DOCUMENTED, TINY, rows, with_fields, write_jsonl
from train_loop.errors import UserError
from train_loop.plan import GPU_MFU, this_machine
from train_loop.spec import JobSpec

AMPLE_S = 300.0  # for what ends by itself
TEMPLATE = "dataset_config.preprocessing.prompt.template"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
# An ingress that has a plan made, says which processes that takes, and is killed while the plan is at its rows: earlier, the plan
# may find by itself that nobody asks any more, and log it.
DYING = """
import os, sys, threading, time
import psutil
from serve_app.planner import Planner
from train_loop.spec import JobSpec

planner = Planner()
spec = JobSpec.model_validate_json(sys.stdin.read())
threading.Thread(target=planner.plan, args=(spec, time.monotonic() + 3000), daemon=True).start()
while not (plans := psutil.Process(planner._process.pid).children()) or plans[0].cpu_times().user < 2:
    time.sleep(0.05)
print(planner._process.pid, plans[0].pid, flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.fixture(scope="module")
def spec(tmp_path_factory, mirror):
    """Makes the spec of a job that can be planned here, with changes by dotted name."""
    home = tmp_path_factory.mktemp("home")
    path = write_jsonl(home / "rows.jsonl", rows(40))
    base = {
        "dataset_details": {"dataset_path": str(path), "source_type": "local", "ownership": "public"},
        "model_details.base_model": TINY,
        "infra_config": {"gpu_type": "cpu"},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNEYARD_HOME", str(home))
        patch.setenv("TUNEYARD_MODEL_MIRROR", str(mirror))
        patch.setenv("TUNEYARD_EMBEDDED", "true")
        patch.setenv("TUNEYARD_HUB_OFFLINE", "true")
        settings = Settings.load()
        settings.prepare_embedded_keys()
        JobStore.open(settings.database_url).migrate()
        yield lambda changes=None: JobSpec.model_validate(with_fields(DOCUMENTED, base | (changes or {})))


@pytest.fixture(scope="module")
def planner(spec):
    planner = Planner()
    yield planner
    planner.close()


def soon(limit_s=AMPLE_S):
    return time.monotonic() + limit_s


def plans_of(planner):
    """The processes that make plans now."""
    return psutil.Process(planner._process.pid).children()


def until(condition):
    deadline = soon()
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_plan_is_that_of_the_job(planner, spec):
    plan = planner.plan(spec({"train_config.hyperparameters.max_steps": 7}), soon())
    assert (plan["steps"], plan["rows"]["total"], len(plan["samples"])) == (7, 40, 3)


def test_what_the_job_would_fail_of_is_raised_as_there(planner, spec):
    with pytest.raises(UserError, match="neither in the model mirror") as caught:
        planner.plan(spec({"model_details.base_model": "no/such"}), soon())
    assert caught.value.field == "model_details.base_model"


def test_two_plans_at_once_share_no_process_and_one_that_is_killed_is_503(planner, spec):
    endless = spec({TEMPLATE: ENDLESS})
    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(planner.plan, endless, soon()) for _ in range(2)]
        until(lambda: len(plans_of(planner)) == 2)
        making = plans_of(planner)
        assert planner.plan(spec(), soon())["steps"] > 0
        for process in making:
            assert process.is_running()
            process.kill()
        for answer in asked:
            with pytest.raises(ApiError, match="was ended") as caught:
                answer.result(AMPLE_S)
            assert (caught.value.status, int(caught.value.headers["Retry-After"]) > 0) == (503, True)
    until(lambda: not plans_of(planner))


def test_a_template_that_never_ends_is_503_in_time_and_its_process_ends(planner, spec):
    planner.plan(spec(), soon())  # loaded, so that the time below goes on the template
    with pytest.raises(ApiError, match="went on rendering some rows") as caught:
        planner.plan(spec({TEMPLATE: ENDLESS}), soon(10))
    assert (caught.value.status, int(caught.value.headers["Retry-After"]) > 0) == (503, True)
    until(lambda: not plans_of(planner))


def test_a_template_may_not_take_all_memory(planner, spec):
    with pytest.raises(UserError, match="takes more memory"):
        planner.plan(spec({TEMPLATE: "{{ 'a' * 8589934592 }}"}), soon())


def test_a_plan_asked_for_while_the_service_starts_is_503_in_time(spec):
    planner = Planner()
    with pytest.raises(ApiError, match="torch and transformers") as caught:
        planner.plan(spec(), soon(0.1))
    assert caught.value.status == 503
    planner.close()


def test_plans_go_on_after_the_process_that_they_are_forked_from_was_killed(spec):
    planner = Planner()
    planner.plan(spec(), soon())
    before = planner._process
    before.kill()
    before.wait()
    assert planner.plan(spec(), soon())["steps"] > 0
    planner.close()
    assert not psutil.pid_exists(planner._process.pid)


def test_nothing_outlives_an_ingress_that_is_killed(spec):
    asked = spec({TEMPLATE: ENDLESS}).model_dump_json()
    done = subprocess.run([sys.executable, "-c", DYING], input=asked, stdout=subprocess.PIPE, text=True, timeout=AMPLE_S)
    assert done.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    until(lambda: not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids))


def test_a_gpu_is_what_its_profile_says():
    gpu = _hardware(Profile(resources={"GPU": 1}, use_gpu=True, memory_gib=80, tflops=989, price_per_hour=3.5), 4)
    assert (gpu.device, gpu.memory_bytes, gpu.price_per_hour) == ("cuda", 80 << 30, 3.5)
    assert gpu.flops == 989e12 * GPU_MFU
    unknown = _hardware(Profile(resources={"GPU": 1}, use_gpu=True), 4)
    assert (unknown.memory_bytes, unknown.price_per_hour) == (None, None)


def test_cpu_workers_share_the_machine():
    machine, one_of_four = this_machine(), _hardware(Profile(resources={"CPU": 1}, price_per_hour=0.1), 4)
    assert (one_of_four.device, one_of_four.price_per_hour) == ("cpu", 0.1)
    assert one_of_four.memory_bytes == machine.memory_bytes // 4
    assert one_of_four.flops == machine.flops / 4
