"""Base models from buckets, mirrors and the hub: what is asked for is loaded, fetched once, and can never run code."""

import http.server
import json
import os
import subprocess
import sys

import pytest

from tests.conftest import CANARY, ORG, OTHER_ORG
from tests.train_loop.models import make_base
from tests.train_loop.servers import Google, google_account
from train_loop.__main__ import Console
from train_loop.data.sources import Credentials
from train_loop.errors import Cause, ModelError, RunFault
from train_loop.launch import launch_local
from train_loop.model import cache as model_cache
from train_loop.model.source import model_config, model_folder, weights_hash
from train_loop.run_files import Keys, RunFiles, model_places
from train_loop.spec import JobSpec

INIT_FROM = "train_config.adapter_config.init_from"
ID = "tuneyard/smollm"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("mirror")
    make_base("smollm", folder, tokenizer)
    (folder / ID / "pytorch_model.bin").write_bytes(b"could be anything")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(model_cache.FOLDER, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def keys(s3):
    return Credentials(s3.access_key_id, s3.secret_access_key, endpoint_url=s3.endpoint_url)


@pytest.fixture(scope="module")
def bucket(s3, models):
    """The model under s3://tuneyard/models/<id>, and its pickle alone under s3://tuneyard/pickled."""
    for path in (models / ID).iterdir():
        s3.client().upload_file(str(path), "tuneyard", f"models/{ID}/{path.name}")
    for name in ("config.json", "pytorch_model.bin"):
        s3.client().upload_file(str(models / ID / name), "tuneyard", f"pickled/{name}")
    return "s3://tuneyard"


def in_bucket(uri):
    return {"model_details": {"base_model": uri, "source_type": "s3", "ownership": "private", "secret_id": "x"}}


def places(job, keys, mirror="/nowhere"):
    spec = JobSpec.model_validate(job)
    return spec.model_details, model_places(spec, mirror, keys)


def test_a_folder_of_a_bucket_is_fetched_once_a_state_and_trained_on(local_job, tmp_path, bucket, keys, models, cache, s3):
    changes = in_bucket(f"{bucket}/models/{ID}") | {
        "train_config.hyperparameters.max_steps": 1,
        "train_config.adapter_config.r": 2,
    }
    job = local_job(changes, 12)
    files = RunFiles(str(tmp_path / "run"), "/nowhere", lambda: Keys(model=keys))
    manifest = launch_local(JobSpec.model_validate(job), "run", files, Console())
    assert manifest["base_model"] == {
        "id": f"{bucket}/models/{ID}",
        "revision": None,
        "weights_sha256": weights_hash(models / ID),
    }
    folder = model_folder(*places(job, Keys(model=keys)))
    written = (folder / "config.json").stat().st_mtime_ns
    assert {p.name for p in folder.iterdir()} == {p.name for p in (models / ID).iterdir()} - {"pytorch_model.bin"}
    assert model_folder(*places(job, Keys(model=keys))) == folder
    assert (folder / "config.json").stat().st_mtime_ns == written
    # Another org finds nothing in the cache that its own keys didn't open.
    assert model_folder(*places(job | {"org": OTHER_ORG}, Keys(model=keys))) != folder
    s3.client().upload_file(str(models / ID / "generation_config.json"), "tuneyard", f"models/{ID}/new.json")
    assert model_folder(*places(job, Keys(model=keys))) != folder
    assert not list(cache.glob("*.part"))


@pytest.mark.parametrize(
    ("uri", "secret", "said", "field"),
    [
        ("pickled", None, "holds no safetensors", "model_details.base_model"),
        ("models/nothing", None, "there is no model", "model_details.base_model"),
        (f"models/{ID}", "wrong", "refused the keys", "model_details.secret_id"),
    ],
)
def test_a_folder_that_can_not_be_used_says_why(uri, secret, said, field, local_job, bucket, keys):
    if secret:
        keys = Credentials(keys.access_key_id, secret, endpoint_url=keys.endpoint_url)
    with pytest.raises(ModelError, match=said) as caught:
        model_folder(*places(local_job(in_bucket(f"{bucket}/{uri}")), Keys(model=keys)))
    assert caught.value.field == field


def test_the_mirror_may_be_a_prefix_of_a_bucket_and_the_plan_reads_the_config_alone(local_job, bucket, keys, models, cache):
    details, found = places(local_job({"model_details": {"base_model": ID}}), Keys(storage=keys), f"{bucket}/models")
    assert model_config(details, found)["hidden_size"] == 32
    described = model_folder(details, found, weights=False)
    assert not list(described.glob("*.safetensors"))
    assert weights_hash(model_folder(details, found)) == weights_hash(models / ID)
    other, found = places(local_job({"model_details": {"base_model": "no/thing"}}), Keys(storage=keys), f"{bucket}/models")
    assert model_config(other, found) is None
    with pytest.raises(ModelError, match="neither in the model mirror"):
        model_folder(other, found)


def test_a_revision_has_a_folder_of_its_own_in_the_mirror(local_job, tmp_path, tokenizer):
    make_base("smollm", tmp_path, tokenizer)
    os.rename(tmp_path / ID, tmp_path / f"{ID}@v2")
    details, found = places(local_job({"model_details": {"base_model": ID, "revision": "v2"}}), Keys(), str(tmp_path))
    assert model_folder(details, found).name == "smollm@v2"
    details, found = places(local_job({"model_details": {"base_model": ID}}), Keys(), str(tmp_path))
    with pytest.raises(ModelError, match="neither in the model mirror"):
        model_folder(details, found)


def said_apart(script, job, url, account, *more):
    """What the script says of the job and Google's storage at `url`, in a process of its own: the server answers in this one."""
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(job), *more],
        env=os.environ | {"CLOUD_STORAGE_EMULATOR_ENDPOINT": url},
        input=json.dumps(account) if account else "",
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert CANARY not in done.stdout + done.stderr
    return done.stdout.strip()


FETCH = """
import json, sys
from train_loop.data.sources import GoogleKey
from train_loop.errors import ModelError
from train_loop.model.source import model_config, model_folder, weights_hash
from train_loop.run_files import Keys, model_places
from train_loop.spec import JobSpec
spec = JobSpec.model_validate_json(sys.argv[1])
secret = sys.stdin.read()
places = model_places(spec, "/nowhere", Keys(model=GoogleKey(secret) if secret else None))
try:
    print(model_config(spec.model_details, places)["hidden_size"], weights_hash(model_folder(spec.model_details, places)))
except ModelError as error:
    print(error.field, error.code, error.message)
"""


def test_a_folder_in_google_storage_is_fetched_with_a_service_account(local_job, serve, models):
    files = {f"models/{ID}/{path.name}": path.read_bytes() for path in (models / ID).iterdir()}
    url = serve(Google.of(files=files))
    right = google_account(url)

    def fetch(uri, account):
        details = {"base_model": uri, "source_type": "gcs", "ownership": "private", "secret_id": "x"}
        return said_apart(FETCH, local_job({"model_details": details}), url, account)

    assert fetch(f"gs://bucket/models/{ID}", right) == f"32 {weights_hash(models / ID)}"
    assert fetch("gs://bucket/nothing", right).startswith("model_details.base_model model_error there is no model")
    refused = fetch(f"gs://bucket/models/{ID}", right | {"private_key": CANARY})
    assert refused.startswith("model_details.secret_id storage_access_denied Google gave no token")


START = """
import sys
from pathlib import Path
from train_loop.data.sources import GoogleKey
from train_loop.errors import ModelError
from train_loop.run_files import Keys, RunFiles, fetch_start
from train_loop.spec import JobSpec
spec, of, scratch = JobSpec.model_validate_json(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
secret = sys.stdin.read()
files = RunFiles("s3://runs/org/run", "/nowhere", lambda: Keys(**{of: GoogleKey(secret)} if secret else {}))
try:
    print({path.name: path.read_text() for path in sorted(fetch_start(spec, files, scratch).iterdir())})
except ModelError as error:
    print(error.field, error.code, error.message)
"""


@pytest.mark.parametrize("of", ["model", "dataset"])
def test_an_adapter_in_google_storage_is_fetched_with_the_models_or_the_datasets_key(local_job, serve, tmp_path, of):
    files = {f"theirs/adapter_{name}": name.encode() for name in ("config.json", "model.safetensors")}
    url = serve(Google.of(files=files))
    right = google_account(url)

    def fetch(uri, account, url=url):
        return said_apart(START, local_job({INIT_FROM: uri}), url, account, of, str(tmp_path))

    found = {"adapter_config.json": "config.json", "adapter_model.safetensors": "model.safetensors"}
    assert fetch("gs://bucket/theirs", right) == fetch("gs://bucket/theirs/", right) == str(found)
    assert fetch("gs://bucket/none", right).endswith("init_from gs://bucket/none can't be read: there is no adapter.")
    refused = fetch("gs://bucket/theirs", right | {"private_key": CANARY})
    assert refused.startswith(
        f"{INIT_FROM} storage_access_denied init_from gs://bucket/theirs can't be read: Google gave no token"
    )
    assert fetch("gs://bucket/theirs", None, serve(Google.of(files=files, authorization=None))) == str(found)  # open to all


USE = """
import sys
from pathlib import Path
from train_loop.model import cache
folder = Path(sys.argv[1])
with cache.entry(folder, int(sys.argv[2])):
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(b"x" * 100)
print("used", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def use(cache):
    """Put an entry of 100 bytes into the cache, or use it again, in a process that goes on until it is told to end."""
    processes = []

    def start(name, budget):
        arguments = [sys.executable, "-c", USE, str(cache / name), str(budget)]
        processes.append(subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "used\n"
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_the_least_recently_used_models_make_room_and_those_in_use_stay(use, cache):
    def there():
        return {path.name for path in cache.rglob("*") if path.is_dir() and path.name not in ("hub", ORG)}

    for name in ("a", f"hub/{ORG}/models--b", "c", "a"):
        use(name, 300).communicate()
    assert there() == {"a", "models--b", "c"}
    use("d", 300).communicate()
    assert there() == {"a", "c", "d"}
    running = use("c", 300)
    use("e", 100).communicate()  # it stays itself, being in use
    assert there() == {"c", "e"}
    running.kill()
    running.wait()
    (cache / "f.part").mkdir()  # whoever fetched it was killed
    (cache / "f.part/model.safetensors").write_bytes(b"x")
    os.utime(cache / "f.part", (0, 0))
    use("e", 100).communicate()
    assert there() == {"e"}


@pytest.mark.parametrize("where", ["bucket", "mirror"])
def test_an_outage_of_a_models_storage_is_waited_for_and_no_fault_of_the_users(where, local_job, monkeypatch):
    monkeypatch.setenv("TUNEYARD_STORAGE_PATIENCE_S", "0.1")
    nobody = Credentials("key", "secret", endpoint_url="http://127.0.0.1:9")
    if where == "bucket":
        details, found = places(local_job(in_bucket("s3://tuneyard/models")), Keys(model=nobody))
    else:
        details, found = places(local_job({"model_details": {"base_model": ID}}), Keys(storage=nobody), "s3://tuneyard/models")
    for look in (model_folder, model_config):
        with pytest.raises(RunFault) as caught:
            look(details, found)
        assert caught.value.cause == Cause.STORAGE_AWAY


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as its client asks: a private model of one revision."""

    folder = None
    outage = 0  # questions that are answered with 503 before it is back

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        if self.outage:
            type(self).outage -= 1
            return self.answer(503, b"")
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        if self.path.startswith(f"/api/models/{ID}/tree/{COMMIT}"):
            files = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": p.name} for p in self.folder.iterdir()]
            return self.answer(200, json.dumps(files).encode())
        if self.path.startswith(f"/api/models/{ID}"):
            if not self.path.startswith(f"/api/models/{ID}/revision/v1"):
                return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            names = [{"rfilename": p.name} for p in self.folder.iterdir()]
            return self.answer(200, json.dumps({"id": ID, "modelId": ID, "sha": COMMIT, "siblings": names}).encode())
        data = (self.folder / self.path.split("?")[0].rpartition("/")[2]).read_bytes()
        return self.answer(200, data, {"ETag": f'"{len(data)}"', "X-Repo-Commit": COMMIT})

    def answer(self, status, data, headers=None):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data)), "Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


ASK = """
import json, sys
from train_loop.errors import ModelError, RunFault
from train_loop.run_files import Keys, model_places
from train_loop.model.source import model_folder, revision_of
from train_loop.spec import JobSpec
spec = JobSpec.model_validate_json(sys.argv[1])
try:
    folder = model_folder(spec.model_details, model_places(spec, "/nowhere", Keys(hub_token=sys.argv[2] or None)))
    print(json.dumps({"files": sorted(p.name for p in folder.iterdir()), "revision": revision_of(folder), "at": str(folder)}))
except ModelError as error:
    print(json.dumps({"said": error.message, "field": error.field}))
except RunFault as fault:
    print(json.dumps({"cause": fault.cause}))
"""


def test_a_private_model_of_the_hub_is_opened_by_its_token_and_pinned_to_a_commit(local_job, models, cache, serve):
    handler = type("H", (Hub,), {"folder": models / ID, "outage": 2})
    env = os.environ | {"HF_ENDPOINT": serve(handler), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    env |= {"HF_HOME": str(cache / "home"), "NO_PROXY": "127.0.0.1"}

    def ask(revision, token, org=ORG):
        details = {"base_model": ID, "revision": revision, "ownership": "private", "secret_id": "x"}
        job = json.dumps(local_job({"model_details": details, "org": org}))
        done = subprocess.run([sys.executable, "-c", ASK, job, token], env=env, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    got = ask("v1", "hf_right")  # which waits for the hub
    assert got.get("revision") == COMMIT, got
    assert handler.outage == 0
    assert "model.safetensors" in got["files"]
    assert "pytorch_model.bin" not in got["files"]
    assert got["at"].startswith(str(cache))  # not where another org's jobs would find it
    assert "no revision v2" in ask("v2", "hf_right")["said"]
    # The client would serve what it has to anyone: another org must not find it.
    assert "nor on the hub" in ask("v1", "hf_wrong", OTHER_ORG)["said"]
    handler.outage = 99
    env["TUNEYARD_STORAGE_PATIENCE_S"] = "0.1"
    assert ask("v1", "hf_right", OTHER_ORG) == {"cause": "storage_away"}
    env["HF_HUB_OFFLINE"] = "1"
    assert "nor on the hub" in ask("v1", "hf_right", OTHER_ORG)["said"]
