"""A second job on the same rows starts without preparing them, whatever else goes on."""

import shutil
import threading

import pytest
from pyarrow.fs import LocalFileSystem

from tests.conftest import TINY
from tests.train_loop.runs import Watcher
from train_loop.data.cache import cache_key, fetch, publish, trim
from train_loop.data.prepare import preparation_key, prepare_local
from train_loop.data.shards import ShardSet, fetch_shards
from train_loop.data.sources import Credentials, filesystem_for, find_files
from train_loop.data.tokenize import ChatTokenizer
from train_loop.errors import Stopped
from train_loop.launch import launch_local
from train_loop.model.tokenizer import tokenizer_hash
from train_loop.run_files import Keys, RunFiles
from train_loop.spec import JobSpec

LOCAL = LocalFileSystem()


class UntilPrepared(Watcher):
    """Stops a run before it loads the model."""

    def on_phase(self, name):
        if name == "loading_model":
            raise Stopped


@pytest.fixture
def prepared_in(tokenizer):
    """Prepare a job's rows into the folder of a run, and publish them as `key`."""

    def prepare(spec, storage, run_path):
        made = prepare_local(spec, LOCAL, find_files(spec, LOCAL), storage, run_path, ChatTokenizer.of(spec, tokenizer))
        publish(storage, run_path, "key", made)
        return made

    return prepare


def conversations(prepared, storage, run_path, folder):
    shards = ShardSet(prepared, fetch_shards(prepared, storage, f"{run_path}/data", folder))
    return [shards.conversation(int(i)) for i in shards.ids("train")]


def test_a_second_job_uses_the_rows_of_the_first_and_one_on_other_rows_does_not(local_job, tmp_path, mirror):
    data = tmp_path / "rows.jsonl"
    job = local_job()

    def start(name, changes=None, org="org"):
        monitor = UntilPrepared()
        files = RunFiles(str(tmp_path / org / name), str(mirror), lambda: Keys())
        spec = JobSpec.model_validate(job | {"train_config": job["train_config"] | (changes or {})})
        with pytest.raises(Stopped):
            launch_local(spec, name, files, monitor)
        return monitor.said("prepared")[0].partition("; ")[2]

    assert start("one") == ""
    assert start("two", {"torch_dtype": "float32"}) == "prepared by another job"
    assert (tmp_path / "org/one/rejected.jsonl").read_bytes() == (tmp_path / "org/two/rejected.jsonl").read_bytes()
    assert start("three", {"hyperparameters": {"seed": 7, "max_steps": 4}}) == ""
    assert start("theirs", org="another-org") == ""
    data.write_text(data.read_text().replace("truly", "really"))
    assert start("four") == ""


PRE = "dataset_config.preprocessing"


@pytest.mark.parametrize(
    "change",
    [
        {f"{PRE}.lazy_tokenize": False},
        {f"{PRE}.streaming": True},
        {f"{PRE}.prompt.system": "Be brief."},
        {f"{PRE}.prompt.max_length": 64},
        {f"{PRE}.prompt.template": "{{ messages }}"},
        {f"{PRE}.truncation": "left"},
        {f"{PRE}.train_on": "all"},
        {f"{PRE}.max_reject_ratio": 0.5},
        {"dataset_config.split.ratios": [0.8, 0.2]},
        {"dataset_config.split": {"type": "none"}},
        {"dataset_details.dataset_type": "json"},
        {"dataset_details.dataset_format": "auto"},
        {"model_details.base_model": "another/model"},
        {"model_details.revision": "v2"},
        {"train_config.hyperparameters.seed": 7},
    ],
    ids=lambda change: "-".join(change).rpartition(".")[2],
)
def test_rows_that_are_read_judged_or_split_otherwise_are_not_shared(local_job, change):
    plain, other = (JobSpec.model_validate(local_job(changes)) for changes in ({}, change))
    files = find_files(plain, LOCAL)
    assert preparation_key(plain, files) == preparation_key(plain, files) != preparation_key(other, files)


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_a_run_keeps_what_it_took_when_the_entry_goes(local_job, prepared_in, tmp_path, s3, where):
    spec = JobSpec.model_validate(local_job())
    keys = Credentials(s3.access_key_id, s3.secret_access_key, endpoint_url=s3.endpoint_url)
    uri = "s3://tuneyard/cache-test" if where == "s3" else str(tmp_path / "runs")
    storage, root = filesystem_for(uri, keys)
    made = prepared_in(spec, storage, f"{root}/org/one")
    assert fetch(storage, f"{root}/org/two", "key") == made
    assert fetch(storage, f"{root}/org/two", "other key") is None
    assert fetch(storage, f"{root}/other-org/two", "key") is None
    assert trim(storage, root, 1 << 30) == 0
    assert trim(storage, root, 0) == 1
    assert fetch(storage, f"{root}/org/three", "key") is None
    taken = [conversations(made, storage, f"{root}/org/{run}", tmp_path / run) for run in ("one", "two")]
    assert taken[0] == taken[1]
    assert len(taken[0]) == made.counts["train"]


def test_an_entry_that_lost_a_shard_is_none(local_job, prepared_in, tmp_path):
    spec = JobSpec.model_validate(local_job())
    prepared_in(spec, LOCAL, f"{tmp_path}/org/one")
    next((tmp_path / "org/data-cache/key").glob("*.arrow")).unlink()
    assert fetch(LOCAL, f"{tmp_path}/org/two", "key") is None
    prepared_in(spec, LOCAL, f"{tmp_path}/org/two")
    assert fetch(LOCAL, f"{tmp_path}/org/three", "key") is not None


def test_many_jobs_on_the_same_rows_at_once_all_get_them_while_entries_are_removed(local_job, prepared_in, tmp_path):
    spec = JobSpec.model_validate(local_job())
    expected = prepared_in(spec, LOCAL, f"{tmp_path}/org/first")
    rows_of_first = conversations(expected, LOCAL, f"{tmp_path}/org/first", tmp_path)
    got, done = {}, threading.Event()

    def remove():
        while not done.is_set():
            trim(LOCAL, str(tmp_path), 0)

    def start(i):
        run = f"{tmp_path}/org/run-{i}"
        found = fetch(LOCAL, run, "key") or prepared_in(spec, LOCAL, run)
        got[i] = conversations(found, LOCAL, run, tmp_path)

    remover = threading.Thread(target=remove)
    remover.start()
    runs = [threading.Thread(target=start, args=(i,)) for i in range(20)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    done.set()
    remover.join()
    assert len(got) == 20
    assert all(found == rows_of_first for found in got.values())


@pytest.mark.parametrize(
    "changed", ["chat_template.jinja", "tokenizer.json", "merges.txt", "additional_chat_templates/tool_use.jinja"]
)
def test_rows_are_of_the_tokenizer_that_judged_them(mirror, tmp_path, changed):
    shutil.copytree(mirror / TINY, tmp_path / "model")
    (tmp_path / "model/merges.txt").write_text("a b\n")
    (tmp_path / "model/additional_chat_templates").mkdir()
    (tmp_path / "model/additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
    before = tokenizer_hash(tmp_path / "model")
    assert tokenizer_hash(tmp_path / "model") == before
    assert len({cache_key(key, of) for key in "xy" for of in (before, "another")}) == 4
    with (tmp_path / "model" / changed).open("a") as file:
        file.write(" ")
    assert tokenizer_hash(tmp_path / "model") != before


def test_rows_that_another_tokenizer_judged_are_prepared_anew(local_job, tmp_path, mirror):
    """Also where the workers make the tokens: which rows are too long depends on it."""
    folder = tmp_path / "mirror" / TINY
    shutil.copytree(mirror / TINY, folder)
    spec = JobSpec.model_validate(local_job())

    def start(name):
        monitor = UntilPrepared()
        with pytest.raises(Stopped):
            launch_local(spec, name, RunFiles(str(tmp_path / "org" / name), str(tmp_path / "mirror"), Keys), monitor)
        return monitor.said("prepared")[0].partition("; ")[2]

    assert [start("one"), start("two")] == ["", "prepared by another job"]
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + "{# another #}")
    assert start("three") == ""
