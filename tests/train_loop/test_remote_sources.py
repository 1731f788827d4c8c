"""Datasets in Google's storage and on the Hugging Face hub, from small servers that answer as those do."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import CANARY, TINY, rows, with_fields
from tests.train_loop.servers import Google, Hub, google_account
from train_loop.data.sources import GoogleKey, HubToken
from train_loop.spec import JobSpec

JSONL = "".join(json.dumps(row) + "\n" for row in rows(30)).encode()
FILES = {"ds/a.jsonl": JSONL, "ds/more/b.jsonl": JSONL, "ds/notes.md": b"x", "eval.jsonl": JSONL[: JSONL.index(b"\n") + 1]}


READ = """
import sys
from pathlib import Path
from pyarrow.fs import LocalFileSystem
from train_loop.data.prepare import prepare_local
from train_loop.data.sources import dataset_filesystem, dataset_keys, find_files
from train_loop.data.tokenize import ChatTokenizer
from train_loop.errors import DatasetError
from train_loop.model.tokenizer import load_tokenizer
from train_loop.spec import JobSpec

spec, name, secret = JobSpec.model_validate_json(sys.argv[1]), sys.argv[3], sys.stdin.read()
try:
    keys = dataset_keys(spec.dataset_details.source_type, {name: secret}) if secret else None
    filesystem = dataset_filesystem(spec.dataset_details, keys)
    files = find_files(spec, filesystem)
    print([(f.uri, f.is_eval, f.modified[:4]) for f in files])
    chat = ChatTokenizer.of(spec, load_tokenizer(Path(sys.argv[4])))
    print(prepare_local(spec, filesystem, files, LocalFileSystem(), sys.argv[2], chat).counts)
except DatasetError as error:
    print(error.code, error.message)
"""


@pytest.fixture
def read(local_job, tmp_path, mirror):
    """Prepare a dataset in a process of its own; what it prints.

    The hub's library reads its settings when it is loaded, and Google's holds the interpreter while it waits for the server.
    """

    def start(path, source_type, eval_path, name, secret, **env):
        at = {"dataset_path": path, "source_type": source_type, "ownership": "private", "secret_id": "x"}
        split = {"dataset_config.split": {"type": "file", "eval_path": eval_path}}
        spec = JobSpec.model_validate(with_fields(local_job(split), {"dataset_details": at}))
        arguments = [sys.executable, "-c", READ, spec.model_dump_json(), str(tmp_path / "run"), name, str(mirror / TINY)]
        done = subprocess.run(arguments, env=os.environ | env, input=secret, capture_output=True, text=True, timeout=120)
        assert CANARY not in done.stdout + done.stderr
        return done.stdout.strip().splitlines() or done.stderr

    return start


def test_a_prefix_in_google_storage_is_read_with_a_service_account(read, serve):
    url = serve(Google.of(files=FILES))
    account = google_account(url)
    pem = account["private_key"]

    def find(path, account):
        secret = json.dumps(account)
        where = {"CLOUD_STORAGE_EMULATOR_ENDPOINT": url}
        return read(path, "gcs", "gs://bucket/eval.jsonl", "service_account_json", secret, **where)

    files = [("ds/a.jsonl", False), ("ds/more/b.jsonl", False), ("eval.jsonl", True)]
    assert find("gs://bucket/ds/", account) == [
        str([(f"gs://bucket/{name}", is_eval, "2026") for name, is_eval in files]),
        "{'train': 60, 'eval': 1}",
    ]
    (missing,) = find("gs://bucket/none.jsonl", account)
    assert missing.startswith("object_not_found there is no object at gs://bucket/none.jsonl")
    (refused,) = find("gs://bucket/ds/", account | {"private_key": CANARY})
    assert refused.startswith("storage_access_denied Google gave no token")
    key = GoogleKey(json.dumps(account))
    assert pem.splitlines()[3] in key.values()
    assert pem.splitlines()[3] not in repr(key)


def test_a_dataset_of_the_hub_is_read_with_its_token(read, serve, tmp_path):
    where = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": serve(Hub.of(files=FILES)), "HF_HOME": str(tmp_path)}
    files = [("ds/a.jsonl", False), ("ds/more/b.jsonl", False), ("eval.jsonl", True)]
    assert read("org/rows", "hf", "eval.jsonl", "token", CANARY, **where) == [
        str([(f"hf://datasets/org/rows/{name}", is_eval, "aaaa") for name, is_eval in files]),
        "{'train': 60, 'eval': 1}",
    ]
    (refused,) = read("org/rows", "hf", "eval.jsonl", "token", "", **where)
    assert refused.startswith("object_not_found the hub has nothing at datasets/org/rows, or shows it only to those with a token")
    assert CANARY not in repr(HubToken(CANARY))
