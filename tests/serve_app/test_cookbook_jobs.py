"""Every job of the cookbook is one that the service takes, on the base that it names; only where its rows are differs there."""

import json
from pathlib import Path

import pytest

from tests.conftest import with_fields

RECIPES = Path(__file__).parent.parent.parent / "examples" / "cookbook"
FIRST = "train_config.adapter_config.init_from"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.json")), ids=lambda p: p.stem)
def test_the_service_takes_a_job_of_the_cookbook(path, http, secret_id):
    job = json.loads(path.read_text())
    kind = job["dataset_details"].get("dataset_type", "jsonl")
    changes = {
        "dataset_details.source_type": "s3",
        "dataset_details.ownership": "private",
        "dataset_details.dataset_path": f"s3://bucket/rows.{kind}",
        "dataset_details.secret_id": secret_id,
        "infra_config.gpu_type": "h100",
    }
    if job["dataset_config"]["split"]["type"] == "file":
        changes["dataset_config.split.eval_path"] = f"s3://bucket/held-out.{kind}"
    if job["train_config"].get("report_to"):
        tracker = {"org": job["org"], "name": "curves", "type": "mlflow", "data": {"tracking_uri": "http://127.0.0.1:5000"}}
        changes["train_config.report_to"] = [http.post("/secret/", json=tracker).json()["secret_id"]]
    answer = http.post("/job/", json=with_fields(job, changes))
    if path.stem == "continue":
        # There is no first job here, which is all that is wrong.
        assert [(e["field"], e["message"]) for e in answer.json()["errors"]] == [(FIRST, "no such job in this org")]
        return
    assert answer.status_code == 200, answer.text
    assert "Warning" not in answer.json()["message"]
