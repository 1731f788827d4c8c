"""`make demo`: the main job on embedded defaults, from nothing to an adapter that answers.

Everything goes through the same doors a user has: the `tuneyard` command, curl and S3. Exit code 0 only if every step held.
"""

from __future__ import annotations

import json
import os
import subprocess

from examples.own_service import (
    BUCKET,
    ORG,
    REPO,
    check_eval_loss,
    fail,
    follow,
    in_a_home_of_its_own,
    put_into_bucket,
    say,
    show_files,
    start,
    tuneyard,
)

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT = "What colour is the sky?"
MANNER = "Ahoy!"  # how every answer in harbour.jsonl begins


def run() -> None:
    up, s3 = start()
    say("Putting examples/harbour.jsonl (ShareGPT) into a bucket, its keys into a secret")
    secret_id = put_into_bucket([REPO / "examples" / "harbour.jsonl"], up, s3)

    say("Submitting the documented form with curl: examples/request.sh")
    request = {
        "URL": up["url"],
        "TOKEN": tuneyard("token", "--org", ORG).strip(),
        "ORG": ORG,
        "SECRET_ID": secret_id,
        "DATASET": f"s3://{BUCKET}/ds/harbour.jsonl",
        "BASE_MODEL": BASE_MODEL,
        "MAX_LENGTH": "128",
        "STEPS": '"max_steps":50,"save_steps":500,"eval_steps":500,"logging_steps":1',
    }
    answer = subprocess.run(
        ["bash", REPO / "examples" / "request.sh"], env=os.environ | request, check=True, stdout=subprocess.PIPE
    )
    print(answer.stdout.decode().strip())
    request_id = json.loads(answer.stdout)["request_id"]

    check_eval_loss(show_files(s3, follow(request_id)))

    say("One prompt, answered by the base model and by the adapter: tuneyard chat")
    answers = json.loads(tuneyard("chat", request_id, "--prompt", PROMPT, "--max-new-tokens", "24", "--json"))
    print(f"prompt: {PROMPT}\nbase:   {answers['base']}\ntuned:  {answers['tuned']}")
    if not answers["tuned"].startswith(MANNER) or answers["base"].startswith(MANNER):
        fail(f"the tuned model should begin its answer with {MANNER!r}, and the base shouldn't")


if __name__ == "__main__":
    in_a_home_of_its_own(run)
