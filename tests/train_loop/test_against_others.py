"""Our loop against plain transformers and PEFT, and against TRL's trainer: the same batches, the same steps."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.train_loop.runs import HP, curve
from tests.train_loop.test_parallel import SMALL, STEPS, bases, folder, launch, weights
from tests.train_loop.test_parallel import job as plain_job
from train_loop.data.packing import IGNORE_INDEX
from train_loop.data.sampler import BatchPlan
from train_loop.data.shards import PreparedDataset, ShardSet
from train_loop.data.tokenize import ChatTokenizer
from train_loop.model.tokenizer import load_tokenizer
from train_loop.optim import learning_rate
from train_loop.spec import JobSpec

__all__ = ["bases", "folder"]


@pytest.fixture(scope="module")
def ours(folder, bases):
    """Our run; and its samples in the order of its steps."""
    job = plain_job(folder, {f"{HP}.max_grad_norm": 1.0, f"{HP}.save_steps": 100})
    launch(folder, bases, "ours", job)
    spec = JobSpec.model_validate(job)
    prepared = PreparedDataset.from_json((folder / "ours/data/index.json").read_text())
    shards = ShardSet(prepared, folder / "ours/data")
    chat = ChatTokenizer.of(spec, load_tokenizer(bases / SMALL))
    ids = shards.ids("train")
    plan = BatchPlan(len(ids), 8, 1, 1, 1, STEPS, spec.train_config.hyperparameters.seed)
    batches = [[chat.encode(shards.conversation(int(ids[i]))) for i in plan.global_batch(step)] for step in range(1, STEPS + 1)]
    return folder / "ours", spec, batches


def model_with_adapter(bases, spec):
    base = AutoModelForCausalLM.from_pretrained(bases / SMALL, dtype=torch.float32)
    torch.manual_seed(spec.train_config.hyperparameters.seed)
    config = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, config)


def same(folder, theirs, model):
    mine = [p["loss"] for p in curve(folder) if "loss" in p]
    assert mine == pytest.approx(theirs, abs=1e-3)
    state = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(state[name].detach(), tensor, rtol=1e-2, atol=2e-3)


def test_plain_transformers_and_peft_take_the_same_steps(ours, bases):
    folder, spec, batches = ours
    hp = spec.train_config.hyperparameters
    model = model_with_adapter(bases, spec).train()
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


def test_trl_takes_the_same_steps(ours, bases, tmp_path):
    """One process and no accumulation: then TRL's loss of a step, too, is the mean over the supervised tokens of its batch."""
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from trl import SFTConfig, SFTTrainer

    folder, spec, batches = ours
    hp = spec.train_config.hyperparameters
    as_lists = [[{"input_ids": s.input_ids.tolist(), "labels": s.labels.tolist()} for s in batch] for batch in batches]

    class InOurOrder(SFTTrainer):
        def get_train_dataloader(self):
            return DataLoader(as_lists, batch_size=None, collate_fn=self.data_collator)  # an epoch's last batch is smaller

    model = model_with_adapter(bases, spec)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1.0, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: learning_rate(hp, done + 1, STEPS))
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        logging_steps=1,
        logging_nan_inf_filter=False,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        packing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        seed=hp.seed,
    )
    trainer = InOurOrder(
        model,
        arguments,
        train_dataset=Dataset.from_list([row for batch in as_lists for row in batch]),
        processing_class=load_tokenizer(bases / SMALL),
        optimizers=(optimizer, schedule),
    )
    trainer.train()
    same(folder, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model)
