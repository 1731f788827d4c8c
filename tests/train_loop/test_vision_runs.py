"""Whole runs on images: what learns from them is handed out, and a run that was cut goes on as if it hadn't been."""

import pytest
import torch

from tests.train_loop.models import run
from tests.train_loop.runs import Watcher, adapter, curve
from tests.train_loop.test_images import saved
from tests.train_loop.zips import FIELDS, picture, row, zipped
from train_loop.chat import Comparison
from train_loop.data.images import admit
from train_loop.errors import Stopped
from train_loop.model.mirror import TINY_VLM
from train_loop.spec import ModelDetails, Prompt

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

    # Another job may go on from it, and a person may ask it about a picture.
    again = run(job_of({"train_config.adapter_config.init_from": "whole"}), tmp_path, mirror, "again")
    assert again["metrics"]["eval_loss_before"] == pytest.approx(manifest["metrics"]["eval_loss_after"], rel=1e-5)
    details, shown, answers = ModelDetails(base_model=TINY_VLM, model_type="vlm"), admit(picture(3, (40, 30))), []
    for folder in ("whole/adapter", "whole/merged"):
        both = Comparison.load(mirror / TINY_VLM, tmp_path / folder, details, Prompt())
        answers.append(both.answer("What is it?", 4, [shown]))
    assert answers[0][0] == answers[1][0] != ""
    assert all(tuned != base for base, tuned in answers)


def test_every_weight_may_learn_and_is_handed_out(job_of, mirror, tmp_path):
    from safetensors.torch import load_file

    full = {"train_config.train_type": "full", f"{HP}.learning_rate": 0.002, f"{HP}.max_steps": 2}
    run(job_of(full), tmp_path, mirror)
    before, after = load_file(mirror / TINY_VLM / "model.safetensors"), load_file(tmp_path / "run/merged/model.safetensors")
    assert before.keys() == after.keys()
    assert {n for n in before if torch.equal(before[n].float(), after[n].float())} == set()
    assert {p.name for p in (tmp_path / "run/merged").iterdir()} >= {"processor_config.json", "chat_template.jinja"}


def test_the_tower_and_the_aligner_move_at_rates_of_their_own(job_of, mirror, tmp_path):
    """Adam's first step is as long as the rate, whatever the gradient: the largest change of a part is its rate."""
    from safetensors.torch import load_file

    rates = {"learning_rate": 0.004, "vision_learning_rate": 0.001, "aligner_learning_rate": 0.002}
    one_step = {"lr_scheduler_type": "constant", "max_steps": 1, "max_grad_norm": 1e9, "adam_epsilon": 1e-12}
    job = job_of({"train_config.train_type": "full"} | {f"{HP}.{name}": value for name, value in (rates | one_step).items()})
    run(job, tmp_path, mirror)
    before, after = load_file(mirror / TINY_VLM / "model.safetensors"), load_file(tmp_path / "run/merged/model.safetensors")
    for part, rate in (("text_model", 0.004), ("vision_model", 0.001), ("connector", 0.002)):
        moved = max(float((after[n] - before[n].float()).abs().max()) for n in before if f".{part}." in n)
        assert moved == pytest.approx(rate, rel=1e-3), part


COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200)}


def test_an_adapter_in_the_tower_too_learns_to_tell_colours(local_job, mirror, tmp_path):
    """Who doesn't look has a loss of log 2 at the colour, and with the token that ends the turn half of it."""
    from PIL import Image
    from safetensors.torch import load_file

    shown, rows = {}, []
    for i in range(48):
        name, colour = list(COLOURS.items())[i % 2]
        noise = torch.randint(-25, 26, (20, 24, 3), generator=torch.Generator().manual_seed(i)).numpy()
        shown[f"{i}.png"] = saved(Image.fromarray((noise + colour).clip(0, 255).astype("uint8")))
        rows.append(row(f"{i}.png", ask="Which?", answer=name))
    (tmp_path / "it.zip").write_bytes(zipped(rows, shown))
    changes = {
        "dataset_details.dataset_path": str(tmp_path / "it.zip"),
        "model_details.base_model": TINY_VLM,
        "dataset_config.split.ratios": [0.75, 0.25],
        "train_config.torch_dtype": "float32",
        "train_config.freeze": {"vision": False, "aligner": False},
        # And the head: a random one of this width can't be sure of any word.
        "train_config.adapter_config": {"dropout": 0.0, "alpha": 32, "modules_to_save": ["lm_head"]},
        f"{HP}.max_steps": 40,
        f"{HP}.learning_rate": 0.005,
        f"{HP}.gradient_checkpointing": False,
    }
    metrics = run(local_job(FIELDS | changes), tmp_path, mirror)["metrics"]
    assert metrics["eval_loss_after"] < 0.1
    moved = {
        n: float(t.abs().max()) for n, t in load_file(tmp_path / "run/adapter/adapter_model.safetensors").items() if "lora_B" in n
    }
    for part in ("text_model", "vision_model", "connector"):
        assert max(size for n, size in moved.items() if f".{part}." in n) > 0.01, part


def _image(seed):
    import io

    from PIL import Image

    return Image.open(io.BytesIO(picture(seed, (40, 30)))).convert("RGB")
