"""MLflow and W&B hear of a run what its own folder holds, and one that is away hurts nobody. W&B's client is the real one."""

import json
import threading
import time

import pytest

from tests.conftest import CANARY, ORG
from tests.train_loop.runs import Watcher
from tests.train_loop.servers import Mlflow, Wandb
from train_loop.errors import RunFault, Stopped
from train_loop.launch import launch_local
from train_loop.run_files import Keys, RunFiles
from train_loop.spec import JobSpec
from train_loop.trackers import reporter, weights_and_biases
from train_loop.trackers.curves import NAMES, RunCard
from train_loop.trackers.tracker import TrackerKeys

HP = "train_config.hyperparameters"
SECRET = "7b0bf4c2-tracker"
QUICK = {
    "train_config.report_to": [SECRET],
    "train_config.adapter_config.r": 2,
    f"{HP}.eval_steps": 2,
    f"{HP}.per_device_train_batch_size": 2,
    "model_details.quantization": None,
}


@pytest.fixture
def start(tmp_path, mirror, local_job):
    """Run a job that reports to a tracker, in the folder `run`; its manifest."""

    def start(keys, monitor, **changes):
        def opened(secret):
            assert secret == SECRET
            return keys

        files = RunFiles(str(tmp_path / "run"), str(mirror), Keys, opened)
        return launch_local(JobSpec.model_validate(local_job(QUICK | changes, 20)), "run", files, monitor)

    return start


def mlflow(url, **data):
    return TrackerKeys("mlflow", {"tracking_uri": url} | data)


def wandb(url):
    return TrackerKeys("wandb", {"api_key": Wandb.key, "project": "project", "base_url": url})


def in_folder(tmp_path):
    """What metrics.jsonl holds: (step, curve) and value."""
    points = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    return {(point["step"], curve): point[name] for point in points for name, curve in NAMES.items() if name in point}


def in_mlflow(run):
    kept = {(m["step"], m["key"]): m["value"] for m in run["metrics"]}
    assert len(kept) == len(run["metrics"]), "a step was sent twice"
    return kept


def in_wandb(run):
    lines = list(run["history"].values())
    assert [line["_step"] for line in lines] == sorted({line["_step"] for line in lines}), "a step was sent twice"
    return {(line["_step"], curve): line[curve] for line in lines for curve in NAMES.values() if curve in line}


def test_mlflow_has_the_points_of_the_runs_folder_and_how_the_job_was_set_up(start, serve, tmp_path):
    server = Mlflow.new()
    start(mlflow(serve(server) + "/"), watcher := Watcher())
    (run,) = server.runs
    assert in_mlflow(run) == in_folder(tmp_path)
    assert {step for step, _ in in_mlflow(run)} == {0, 1, 2, 3, 4}
    assert run["info"]["status"] == "FINISHED"
    assert run["tags"] == {"request_id": "run", "org": ORG, "experiment_name": "launch-causal_lm-lora"}
    assert run["params"]["train_config.hyperparameters.learning_rate"] == "0.01"
    assert run["params"]["model_details.base_model"] == "tuneyard/tiny-random-llama"
    assert run["params"]["train_config.adapter_config.targets"] == '["all-linear"]'
    assert not [name for name in run["params"] if "secret" in name or "report_to" in name]
    assert watcher.said("tracker") == []


@pytest.mark.parametrize("server", [Mlflow, Wandb])
def test_an_attempt_goes_on_in_the_run_of_the_one_before(server, start, serve, tmp_path):
    handler = server.new()
    url = serve(handler)
    keys, kept = (mlflow(url), in_mlflow) if server is Mlflow else (wandb(url), in_wandb)
    with pytest.raises(RunFault):  # steps 3 and 4 are taken again, from the checkpoint of step 2
        start(keys, Watcher(break_at=4), **{f"{HP}.max_steps": 6, f"{HP}.save_steps": 2})
    (run,) = handler.runs.values() if server is Wandb else handler.runs
    assert (run["exit_codes"] == [1]) if server is Wandb else (run["info"]["status"] == "FAILED")
    assert (3, "train/loss") in kept(run)
    with pytest.raises(Stopped):
        start(keys, Watcher(stop_at=5), **{f"{HP}.max_steps": 6, f"{HP}.save_steps": 2})
    start(keys, Watcher(), **{f"{HP}.max_steps": 6, f"{HP}.save_steps": 2})
    assert len(handler.runs) == 1
    wanted, got = in_folder(tmp_path), kept(run)
    speed = "train/tokens_per_second"  # of the steps taken twice the first was told
    assert {k: v for k, v in got.items() if speed not in k} == {k: v for k, v in wanted.items() if speed not in k}
    assert got.keys() == wanted.keys()
    assert (run["exit_codes"] == [1, 1, 0]) if server is Wandb else (run["info"]["status"] == "FINISHED")


def test_wandb_has_the_points_of_the_runs_folder_and_how_the_job_was_set_up(start, serve, tmp_path):
    server = Wandb.new()
    start(wandb(serve(server)), watcher := Watcher())
    (run,) = server.runs.values()
    assert in_wandb(run) == in_folder(tmp_path)
    times = [json.loads(line)["time"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["_timestamp"] for line in run["history"].values()] == times
    config = {name: entry["value"] for name, entry in json.loads(run["config"]).items() if name != "_wandb"}
    assert (config["request_id"], config["org"], config["experiment_name"]) == ("run", ORG, run["displayName"])
    assert config["train_config"]["hyperparameters"]["learning_rate"] == 0.01
    assert not [name for name in config if "secret" in json.dumps(config[name])]
    assert run["tags"] == ["run", ORG, "launch-causal_lm-lora"]
    assert run["exit_codes"] == [0]
    assert watcher.said("tracker") == []


@pytest.mark.parametrize("kind", [mlflow, wandb])
def test_a_job_whose_tracker_is_away_completes_and_says_so_once(kind, start, monkeypatch):
    monkeypatch.setattr(reporter, "PAUSE_S", 0.01)
    monkeypatch.setattr(reporter, "LAST_S", 1)
    manifest = start(kind("http://127.0.0.1:9"), watcher := Watcher())
    assert manifest["steps"] == 4
    *away, last = watcher.said("tracker")
    assert len(away) <= 1
    assert all("the job goes on" in text for text in away)
    assert "lacks 5 points of this attempt" in last


def test_no_step_waits_for_a_tracker(start, serve, tmp_path):
    trained = threading.Event()
    in_time = []

    class Trained(Watcher):
        def on_progress(self, progress):
            super().on_progress(progress)
            if progress["step"] == 4:
                trained.set()

    server = Mlflow.new(before=staticmethod(lambda: in_time.append(trained.wait(60))))
    start(mlflow(serve(server)), Trained())
    assert all(in_time)
    assert in_mlflow(server.runs[0]) == in_folder(tmp_path)


@pytest.fixture
def told(tmp_path):
    """Report the points 1 to 4 to a tracker, doing `between` after the first two; what the events say."""

    def report(keys, between=lambda events: None):
        card = RunCard("run", ORG, "name", {"a": {"b": [1, "x"]}, "long": "x" * 9999})
        events = []
        points = [{"step": step, "loss": 1 / step, "time": 1.5} for step in range(1, 5)]
        with reporter.reporting([SECRET], card, lambda _: keys, lambda kind, text: events.append(text), tmp_path) as reported:
            reported.points(points[:2])
            between(events)
            reported.points(points[2:])
            reported.ending = "completed"
        return events

    return report


def comes_back(server):
    """The server answers again once it has been said that it doesn't."""

    def back(events):
        while not events:
            time.sleep(0.01)
        server.down = None

    return back


def test_points_wait_for_a_tracker_that_comes_back(told, serve, monkeypatch):
    monkeypatch.setattr(reporter, "PAUSE_S", 0.01)
    server = Mlflow.new(down=503)
    assert told(mlflow(serve(server)), comes_back(server)) == [
        "MLflow at 127.0.0.1 answers with 503: the job goes on, and its points wait"
    ]
    assert in_mlflow(server.runs[0]) == {(step, "train/loss"): 1 / step for step in range(1, 5)}
    assert server.runs[0]["params"] == {"a.b": '[1, "x"]', "long": "x" * 500}


def test_what_waits_for_a_tracker_is_bounded_and_what_is_given_up_is_told(told, serve, monkeypatch):
    monkeypatch.setattr(reporter, "MAX_WAITING", 3)
    monkeypatch.setattr(reporter, "PAUSE_S", 60)
    server = Mlflow.new(down=503)
    assert told(mlflow(serve(server)), comes_back(server))[1:] == [
        "MLflow at 127.0.0.1 lacks 1 points of this attempt; metrics.jsonl has them all"
    ]
    assert in_mlflow(server.runs[0]).keys() == {(step, "train/loss") for step in (2, 3, 4)}


@pytest.mark.parametrize("keys", [{"token": CANARY}, {"username": "me", "password": CANARY}])
def test_a_tracker_that_refuses_is_left_alone(keys, told, serve):
    said = "MLflow at 127.0.0.1 refuses what it is sent (401): nothing more is sent there"
    assert told(mlflow(serve(Mlflow.new()), **keys)) == [said]


def test_of_what_a_tracker_says_only_its_code_is_told(told, serve):
    server = Mlflow.new()
    keys = mlflow(serve(server))
    assert told(keys) == []
    server.runs[0]["params"]["a.b"] = "other"
    assert told(keys) == [
        "MLflow at 127.0.0.1 refuses what it is sent (400, INVALID_PARAMETER_VALUE): nothing more is sent there"
    ]


def test_a_wandb_that_refuses_the_key_is_left_alone(told, serve):
    said = "Weights & Biases refuses what it is sent (401): nothing more is sent there"
    assert told(wandb(serve(Wandb.new(authorization="other")))) == [said]


def test_a_wandb_whose_folder_went_with_the_attempt_is_away(told, tmp_path, monkeypatch):
    monkeypatch.setattr(reporter, "PAUSE_S", 60)
    tmp_path.rmdir()
    assert told(wandb("http://127.0.0.1:9")) == [
        "Weights & Biases can't be reached (FileNotFoundError): the job goes on, and its points wait",
        "Weights & Biases lacks 4 points of this attempt; metrics.jsonl has them all",
    ]


def test_a_server_that_is_no_mlflow_is_left_alone(told, serve):
    class Other(Mlflow):
        def reply(self, path, asked):
            self.answer({})

    (said,) = told(mlflow(serve(Other.new())))
    assert "doesn't answer as MLflow does" in said


def test_a_worker_without_wandb_says_so(told, monkeypatch):
    monkeypatch.setattr(weights_and_biases, "is_installed", lambda: False)
    (said,) = told(wandb("http://127.0.0.1:9"))
    assert "pip install tuneyard[wandb]" in said


@pytest.mark.parametrize("kind", ["token", "password", "wandb", "wandb refused"])
def test_keys_of_trackers_show_nowhere(kind, start, serve, tmp_path, capfd, caplog):
    caplog.set_level("DEBUG")
    if kind == "token":
        keys = mlflow(serve(Mlflow.new(authorization=f"Bearer {CANARY}")), token=CANARY)
    elif kind == "password":
        keys = mlflow(serve(Mlflow.new(authorization="Basic bWU6c2stY2FuYXJ5LVp4ODFLcQ==")), username="me", password=CANARY)
    else:
        keys = wandb(serve(Wandb.new(**({"authorization": "other"} if "refused" in kind else {}))))
    start(keys, watcher := Watcher())
    assert bool(watcher.said("tracker")) is ("refused" in kind)
    out = capfd.readouterr()
    assert CANARY not in out.out + out.err + caplog.text + str(watcher.events) + repr(keys)
    sent = Wandb.authorization.split()[1]
    files = {path: path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()}
    assert not [path for path, text in files.items() if CANARY in text or sent in text]
