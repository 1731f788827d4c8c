"""Whole runs on images: what learns from them is handed out, and a run that was cut goes on as if it hadn't been."""

import pytest
import torch

from tests.train_loop.models import run
from tests.train_loop.runs import Watcher, adapter, curve
from tests.train_loop.zips import FIELDS, picture, row, zipped
from train_loop.errors import Stopped
from train_loop.model.mirror import TINY_VLM

HP = "train_config.hyperparameters"
NUM_ROWS = 24
ANSWERS = ("One", "Two of them")


@pytest.fixture
def job_of(local_job, tmp_path):
    pictures = {f"{i}.png": picture(i, (20 + i, 30)) for i in range(NUM_ROWS)}
    rows = [row(f"{i}.png", *([f"{i - 1}.png"] if i % 3 == 1 else []), answer=ANSWERS[i % 2]) for i in range(NUM_ROWS)]
    (tmp_path / "it.zip").write_bytes(zipped([*rows, row(), row()], pictures))

    def make(changes):
        base = {
            "dataset_details.dataset_path": str(tmp_path / "it.zip"),
            "model_details.base_model": TINY_VLM,
            "train_config.torch_dtype": "float32",
            "train_config.freeze": {"vision": False, "aligner": False},
            f"{HP}.vision_learning_rate": 0.001,
            f"{HP}.save_steps": 2,
            f"{HP}.eval_steps": 4,
        }
        return local_job(FIELDS | base | changes)

    return make


def test_a_run_that_was_cut_goes_on_to_the_same_bytes_which_load_and_see_alike(job_of, mirror, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    job = job_of({"train_config.export.merge": True})
    manifest = run(job, tmp_path, mirror, "whole")
    with pytest.raises(Stopped):
        run(job, tmp_path, mirror, "cut", Watcher(stop_at=1))
    run(job, tmp_path, mirror, "cut")
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert manifest["metrics"]["eval_loss_after"] < manifest["metrics"]["eval_loss_before"]

    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    logits = []
    for folder, of in ((tmp_path / "whole/adapter", mirror / TINY_VLM), (tmp_path / "whole/merged", None)):
        processor = AutoProcessor.from_pretrained(folder)
        text = processor.apply_chat_template(asked, add_generation_prompt=True)
        inputs = processor(text=text, images=[_image(3)], return_tensors="pt")
        model = AutoModelForImageTextToText.from_pretrained(of or folder, dtype=torch.float32)
        model = (PeftModel.from_pretrained(model, folder) if of else model).eval()
        with torch.no_grad():
            logits.append(model(**inputs).logits)
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


def test_every_weight_may_learn_and_is_handed_out(job_of, mirror, tmp_path):
    from safetensors.torch import load_file

    full = {"train_config.train_type": "full", f"{HP}.learning_rate": 0.002, f"{HP}.max_steps": 2}
    run(job_of(full), tmp_path, mirror)
    before, after = load_file(mirror / TINY_VLM / "model.safetensors"), load_file(tmp_path / "run/merged/model.safetensors")
    assert before.keys() == after.keys()
    assert {n for n in before if torch.equal(before[n].float(), after[n].float())} == set()
    assert {p.name for p in (tmp_path / "run/merged").iterdir()} >= {"processor_config.json", "chat_template.jinja"}


def _image(seed):
    import io

    from PIL import Image

    return Image.open(io.BytesIO(picture(seed, (40, 30)))).convert("RGB")
