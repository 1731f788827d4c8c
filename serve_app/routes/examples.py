"""What the OpenAPI document and docs/api.md show as requests and answers; tests hold them to the models."""

from __future__ import annotations

import json
from typing import Any

from serve_app.lifecycle import Phase, Status
from serve_app.routes.answers import JobAnswer
from train_loop.spec import JobSpec

SPEC: dict[str, Any] = {
    "org": "0bf00b43-430a-4ca3-a8b3-b13cc8dc6d4f",
    "experiment_name": "my-first-adapter",
    "model_details": {"base_model": "meta-llama/Llama-3.2-1B-Instruct", "quantization": {"quant_bits": 4}},
    "train_config": {"hyperparameters": {"num_epochs": 1, "learning_rate": 0.0001}, "adapter_config": {"r": 16, "alpha": 16}},
    "dataset_details": {"dataset_path": "s3://my-bucket/chats.jsonl", "secret_id": "<from POST /secret/>", "region": "us-west-2"},
    "infra_config": {"gpu_type": "h100", "gpu_count": 2, "node_count": 2},
}
FORM: dict[str, str] = {  # the same, every section given
    name: value if isinstance(value, str) else json.dumps(value)
    for name, value in {**SPEC, "dataset_config": {"preprocessing": {"prompt": {"max_length": 2048}}}}.items()
}
JOB_ID = "6f1c2a0e-8f0b-4b62-9d34-0f6f3a4f9a11"
SUBMITTED = {
    "request_id": JOB_ID,
    "status": "QUEUED",
    "message": "Queued: LoRA r 16 on meta-llama/Llama-3.2-1B-Instruct in 4 bit, 1 epoch with 32 samples a step, on 4 workers "
    "(h100 x 2 x 2); data from s3://my-bucket/chats.jsonl.",
    "experiment_name": "my-first-adapter",
}
POINTS: dict[str, Any] = {
    "points": [
        {"step": 0, "eval_loss": 2.31, "time": 1764020000.1},
        {
            **{"step": 5, "epoch": 0.04, "loss": 2.12, "learning_rate": 0.0001, "grad_norm": 0.8},
            **{"tokens": 81920, "tokens_per_second": 20480.0, "time": 1764020004.2},
        },
    ]
}
EVENTS = {"events": [{"id": 7, "time": "2026-01-02T03:04:05.678Z", "kind": "started", "message": "attempt 1"}]}
LOGS = {"logs": [{"id": 31, "time": "2026-01-02T03:04:09.012Z", "attempt": 1, "rank": 0, "line": "step 5/120 loss 2.1200"}]}
SECRET = {
    "secret_id": "0c9a1d52-5a6e-4d0c-8a8e-3f1f2f0d7b45",
    "name": "bucket-keys",
    "type": "aws",
    "created_at": "2026-01-02T03:04:05.678Z",
}
NEW_SECRET = {
    "org": SPEC["org"],
    "name": "bucket-keys",
    "type": "aws",
    "data": {"access_key_id": "AKIA…", "secret_access_key": "…", "region": "us-west-2"},
}
WEBHOOK = {
    "webhook_id": "b9d6f1a4-2f77-4c39-9d57-0b0a3a3a7a10",
    "url": "https://hooks.example.com/tuneyard",
    "events": ["job.completed", "job.failed"],
    "created_at": "2026-01-02T03:04:05.678Z",
}
WEBHOOK_ONCE = {**WEBHOOK, "secret": "whsec_…"}
NEW_WEBHOOK = {"org": SPEC["org"], "url": WEBHOOK["url"], "events": ["job.completed", "job.failed"]}
WEBHOOK_TESTED = {"webhook_id": WEBHOOK["webhook_id"], "delivered": False, "error": "it answered with status 404"}
NAMED = {"org_id": SPEC["org"], "request_id": JOB_ID}
_resolved = JobSpec.model_validate(SPEC).model_dump(mode="json")
JOB: JobAnswer = {
    "request_id": JOB_ID,
    "org": SPEC["org"],
    "experiment_name": SPEC["experiment_name"],
    "status": Status.RUNNING,
    "phase": Phase.TRAINING,
    "message": "Running on 4 workers.",
    "progress": 0.042,
    "step": 5,
    "total_steps": 120,
    "epoch": 0.04,
    "eta_s": 610.0,
    "created_at": "2026-01-02T03:03:00.000Z",
    "updated_at": "2026-01-02T03:04:09.512Z",
    "started_at": "2026-01-02T03:03:02.345Z",
    "completed_at": None,
    "queue_position": None,
    "attempt": 1,
    "ray_job": None,
    "dataset_config": _resolved["dataset_config"],
    "model_details": _resolved["model_details"],
    "train_config": _resolved["train_config"],
    "dataset_details": _resolved["dataset_details"],
    "infra_config": _resolved["infra_config"],
    "metrics": {"last": POINTS["points"][1], "eval_loss_before": 2.31},
    "output_model_path": None,
    "error_message": None,
    "error_code": None,
}
JOBS = {"jobs": [JOB], "next_cursor": "NDI="}
ARTIFACTS = {
    "files": [
        {
            "name": "adapter/adapter_model.safetensors",
            "uri": f"s3://tuneyard/runs/{SPEC['org']}/{JOB_ID}/adapter/adapter_model.safetensors",
            "size_bytes": 22573704,
            "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
            "url": "https://s3.us-west-2.amazonaws.com/tuneyard/…?X-Amz-Expires=900&X-Amz-Signature=…",
        }
    ]
}
PLAN = {
    "message": SUBMITTED["message"].replace("Queued", "It would be", 1),
    "workers": 4,
    "rows": {"total": 4270, "exact": False, "train": 3843, "eval": 427, "read": 288},
    "tokens": {
        **{"per_row_mean": 612.4, "per_row_max": 5120, "supervised_share": 0.6412},
        **{"truncated_share": 0.0069, "trained_on": 2353452},
    },
    "steps": 120,
    "samples_per_step": 32,
    "trainable_params": 11272192,
    "memory": {
        **{"weights_bytes": 1027604480, "adapter_bytes": 45088768, "gradients_bytes": 70254592, "optimizer_bytes": 90177536},
        **{"checkpoint_bytes": 0, "activations_bytes": 2013265920, "logits_bytes": 1838678016, "runtime_bytes": 943718400},
        **{"total_bytes": 6028787712, "available_bytes": 85899345920, "batch_tokens": 8192},
    },
    "time_s": 61,
    "gpu_hours": 0.0678,
    "price": None,
    "samples": [
        {
            "tokens": 9,
            "trained_tokens": 3,
            "turns": 2,
            "segments": [
                {"text": "<|user|>Hello<|assistant|>", "trained": False},
                {"text": "Hi!<|end|>", "trained": True},
            ],
        }
    ],
    "warnings": ["2 of 288 rows looked at are longer than max_length 4096 (up to 5120 tokens) and will be truncated"],
}
