"""What a job says of its S3 sources reaches what opens them: region, keys, and that there are none."""

import http.server
from functools import partial

import pytest

from tests.train_loop.models import run_with
from train_loop.data import sources
from train_loop.data.sources import Credentials, dataset_filesystem
from train_loop.errors import ModelError
from train_loop.run_files import Keys, model_places
from train_loop.spec import JobSpec

ADAPTER = "train_config.adapter_config"
OF_DATASET, OF_MODEL = "dataset_details", "model_details"


def opened(what, job, keys=None):
    """The file system of the dataset, or of the base model."""
    spec = JobSpec.model_validate(job)
    if what == OF_DATASET:
        return dataset_filesystem(spec.dataset_details, keys)
    return model_places(spec, "/nowhere", Keys(model=keys)).open_model(spec.model_details.base_model)[0]


def job_in_s3(local_job, what, **details):
    path = {OF_DATASET: {"dataset_path": "s3://bucket/rows.jsonl"}, OF_MODEL: {"base_model": "s3://bucket/model"}}[what]
    made = local_job()
    made[what] |= {"source_type": "s3"} | path | details
    return made


@pytest.mark.parametrize("what", [OF_DATASET, OF_MODEL])
def test_a_bucket_is_looked_for_in_the_region_of_its_secret_else_the_jobs(what, local_job):
    theirs = Credentials("key", "secret", region="eu-central-1")
    nowhere = Credentials("key", "secret")
    private = {"ownership": "private", "secret_id": "x", "region": "us-west-2"}
    assert opened(what, job_in_s3(local_job, what, **private), nowhere).region == "us-west-2"
    assert opened(what, job_in_s3(local_job, what, **private), theirs).region == "eu-central-1"
    assert opened(what, job_in_s3(local_job, what, ownership="public", region="us-west-2")).region == "us-west-2"


@pytest.mark.parametrize("what", [OF_DATASET, OF_MODEL])
def test_the_machines_own_keys_open_nothing_that_is_public(what, local_job, serve, monkeypatch):
    signed = []

    class Bucket(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            signed.append("Authorization" in self.headers)
            self.send_response(200)
            self.send_header("Content-Length", "3")
            self.end_headers()

        def log_message(self, *_):
            pass

    here = partial(sources.pafs.S3FileSystem, endpoint_override=serve(Bucket).removeprefix("http://"), scheme="http")
    monkeypatch.setattr(sources.pafs, "S3FileSystem", here)  # Arrow has no setting for where Amazon's own buckets are
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-the-machine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of-the-machine")
    for ownership in ("public", "private"):
        secret = {} if ownership == "public" else {"secret_id": "x"}
        files = opened(what, job_in_s3(local_job, what, ownership=ownership, **secret))
        assert files.get_file_info("bucket/rows.jsonl").size == 3
    assert signed == [False, True]


def test_training_goes_on_from_an_adapter_in_a_bucket(local_job, tmp_path, mirror, s3):
    usual = {"train_config.hyperparameters.max_steps": 2, "dataset_config.split.ratios": [0.5, 0.5]}
    keys = Credentials(s3.access_key_id, s3.secret_access_key, endpoint_url=s3.endpoint_url)
    first = run_with(Keys(), local_job(usual, 12), tmp_path, mirror, "first")
    client = s3.client()
    for path in (tmp_path / "first/adapter").iterdir():
        client.upload_file(str(path), "tuneyard", f"theirs/{path.name}")
    job = local_job(usual | {f"{ADAPTER}.init_from": "s3://tuneyard/theirs"}, 12)
    again = run_with(Keys(dataset=keys), job, tmp_path, mirror, "again")
    assert again["metrics"]["eval_loss_before"] == pytest.approx(first["metrics"]["eval_loss_after"], rel=1e-6)
    wrong = Credentials(s3.access_key_id, "no", endpoint_url=s3.endpoint_url)
    with pytest.raises(ModelError, match="init_from") as refused:
        run_with(Keys(model=wrong, dataset=keys), job, tmp_path, mirror, "refused")
    assert refused.value.field == f"{ADAPTER}.init_from"
