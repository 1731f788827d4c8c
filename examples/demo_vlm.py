"""`make demo-vlm`: a model that sees, from random weights to one that tells shapes, colours, numbers and digits.

Everything goes through the same doors a user has, as in demo.py; pictures that it wasn't trained on say how well it sees.
Exit code 0 only if every step held.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from examples.own_service import (
    BUCKET,
    HOME,
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
from examples.vlm import held_out

BASE_MODEL = "tuneyard/tiny-random-vlm"
WANTED = 0.9  # of the held-out pictures
SHOWN = 6


def run() -> None:
    pictures = HOME / "pictures"
    say("Drawing pictures with questions: examples/vlm/draw.py")
    subprocess.run([sys.executable, REPO / "examples/vlm/draw.py", pictures], check=True)
    up, s3 = start()
    say("Putting them into a bucket, its keys into a secret")
    secret_id = put_into_bucket([pictures / "train.zip", pictures / "held-out.zip"], up, s3)

    say("Submitting examples/vlm/job.json: tuneyard submit")
    job_file = str(REPO / "examples/vlm/job.json")
    told = [
        "--dataset",
        f"s3://{BUCKET}/ds/train.zip",
        "--secret-id",
        secret_id,
        "--set",
        f"dataset_config.split.eval_path=s3://{BUCKET}/ds/held-out.zip",
        "--set",
        "dataset_details.source_type=s3",
        "--set",
        "dataset_details.ownership=private",
    ]
    accepted = json.loads(tuneyard("submit", job_file, *told, "--json"))
    print(accepted["message"])
    request_id = accepted["request_id"]
    job = follow(request_id)
    check_eval_loss(show_files(s3, job))

    say("Asking about pictures that it wasn't trained on, before and after: plain transformers")
    tuneyard("download", request_id, str(HOME / "trained"))
    trained, base = HOME / "trained" / "merged", Path(os.environ["TUNEYARD_MODEL_MIRROR"]) / BASE_MODEL
    rows = held_out.rows_of(pictures / "held-out.zip")
    before, after = (held_out.answers(*held_out.load(model, trained), rows) for model in (base, trained))
    for (_, question, right), was, now in list(zip(rows, before, after, strict=True))[:SHOWN]:
        print(f"{question:<28} {right:<10} before: {was[:20]!r:<24} after: {now!r}")
    share = held_out.share_right(after, rows)
    print(
        f"right of {len(rows)} held-out pictures: before {held_out.share_right(before, rows):.1%}, "
        f"guessing without a look {held_out.share_guessed(rows):.1%}, after {share:.1%}"
    )
    if share < WANTED:
        fail(f"it should be right about {WANTED:.0%} of them")

    say("One picture of them by itself: tuneyard chat --image")
    picture, question, right = rows[0]
    picture.save(HOME / "picture.png")
    answer = json.loads(tuneyard("chat", request_id, "--image", str(HOME / "picture.png"), "--prompt", question, "--json"))
    print(f"prompt: {question} ({right})\nbase:   {answer['base'][:60]}\ntuned:  {answer['tuned']}")
    if answer["tuned"] != after[0]:
        fail(f"it should answer as it did before, {after[0]!r}")


if __name__ == "__main__":
    in_a_home_of_its_own(run)
