"""Our loop against plain transformers and PEFT, and against TRL's trainer: the same batches, the same steps."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.conftest import TINY
from tests.train_loop.test_parallel import STEPS, folder, launch, weights
from tests.train_loop.test_parallel import job as plain_job
from tests.train_loop.test_resume import HP, curve
from train_loop.data.packing import IGNORE_INDEX
from train_loop.data.sampler import BatchPlan
from train_loop.data.shards import PreparedDataset, ShardSet
from train_loop.data.tokenize import ChatTokenizer
from train_loop.model.load import load_tokenizer
from train_loop.optim import learning_rate
from train_loop.spec import JobSpec

__all__ = ["folder"]


@pytest.fixture(scope="module")
def ours(folder, mirror):
    """Our run; and its samples in the order of its steps."""
    from pyarrow.fs import LocalFileSystem

    job = plain_job(folder, {f"{HP}.max_grad_norm": 1.0, f"{HP}.save_steps": 100})
    launch(folder, mirror, "ours", job)
    spec = JobSpec.model_validate(job)
    prepared = PreparedDataset.from_json((folder / "ours/data/index.json").read_text())
    shards = ShardSet.open(prepared, LocalFileSystem(), str(folder / "ours/data"), folder / "copy")
    chat = ChatTokenizer.of(spec, load_tokenizer(mirror / TINY))
    ids = shards.ids("train")
    plan = BatchPlan(len(ids), 8, 1, 1, 1, STEPS, spec.train_config.hyperparameters.seed)
    batches = [[chat.encode(shards.conversation(int(ids[i]))) for i in plan.global_batch(step)] for step in range(1, STEPS + 1)]
    return folder / "ours", spec, batches


def model_with_adapter(mirror, spec):
    base = AutoModelForCausalLM.from_pretrained(mirror / TINY, dtype=torch.float32)
    torch.manual_seed(spec.train_config.hyperparameters.seed)
    config = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, config)


def same(folder, theirs, model):
    mine = [p["loss"] for p in curve(folder) if "loss" in p]
    assert mine == pytest.approx(theirs, abs=1e-3)
    state = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(state[name].detach(), tensor, rtol=1e-2, atol=2e-3)


def test_plain_transformers_and_peft_take_the_same_steps(ours, mirror):
    folder, spec, batches = ours
    hp = spec.train_config.hyperparameters
    model = model_with_adapter(mirror, spec).train()
    learns = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learns, weight_decay=0.0)
    losses = []
    for step, batch in enumerate(batches, 1):
        total, count = torch.zeros(()), 0
        for sample in batch:  # one by one: no padding, no packing
            ids, labels = torch.tensor(sample.input_ids)[None].long(), torch.tensor(sample.labels)[None].long()
            logits = model(input_ids=ids).logits[:, :-1]
            total = total + torch.nn.functional.cross_entropy(
                logits[0], labels[0, 1:], reduction="sum", ignore_index=IGNORE_INDEX
            )
            count += int((labels[0, 1:] != IGNORE_INDEX).sum())
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(learns, 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(hp, step, STEPS)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item() / count)
    same(folder, losses, model)
