"""The training loop: from a base model and prepared rows to an adapter.

One step: this rank's stripe of the global batch, forward and backward per micro-batch with the loss summed over tokens, one
all-reduce of counts before and one of gradients after, clip, step. The loss is divided by the supervised tokens of the whole
global batch, so 1x8, 2x4, 4x2 workers x samples and gradient accumulation all take the same step.
"""

from __future__ import annotations

import contextlib
import logging
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train_loop import checkpoint, export
from train_loop.context import RunContext, write_text
from train_loop.data.loader import Layout, eval_batches, step_batches
from train_loop.data.packing import MicroBatch
from train_loop.data.sampler import BatchPlan
from train_loop.data.shards import PreparedDataset, ShardSet
from train_loop.data.tokenize import ChatTokenizer
from train_loop.errors import DatasetError, TrainingError
from train_loop.evaluate import evaluate, full_precision
from train_loop.loss import supervised_loss
from train_loop.metrics import MetricLog
from train_loop.model.adapters import add_adapter, trainable
from train_loop.model.load import load_base, load_tokenizer
from train_loop.optim import build_optimizer, learning_rate, set_learning_rate
from train_loop.parallel import set_threads, sync_gradients, sync_parameters
from train_loop.spec import JobSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How the loop ended: `stopped` at a step boundary on request, or with an adapter uploaded."""

    stopped: bool
    step: int
    total_steps: int
    compute_dtype: str
    metrics: dict[str, Any]
    worlds: list[dict[str, int]]  # the workers that the steps ran on: from_step, world_size


def batch_plan(spec: JobSpec, num_samples: int) -> BatchPlan:
    """The arithmetic of the run's batches: the job's, however many workers this attempt has."""
    hp = spec.train_config.hyperparameters
    return BatchPlan(
        num_samples=num_samples,
        per_device_batch_size=hp.per_device_train_batch_size,
        world_size=spec.infra_config.num_workers,
        accumulation_steps=hp.gradient_accumulation_steps,
        num_epochs=hp.num_epochs,
        max_steps=hp.max_steps,
        seed=hp.seed,
    )


def run(spec: JobSpec, prepared: PreparedDataset, ctx: RunContext) -> Outcome:
    """Train. Collective: every rank calls it with the same spec and data. Raises UserError."""
    hp = spec.train_config.hyperparameters
    pre = spec.dataset_config.preprocessing
    set_threads(ctx)
    ctx.phase("loading_model")

    tokenizer = load_tokenizer(ctx.model_folder)
    chat = None if prepared.eager else ChatTokenizer.of(spec, tokenizer)
    shards = ShardSet.open(prepared, ctx.storage, f"{ctx.run_path}/data", ctx.scratch / f"data-{ctx.rank}")
    plan = batch_plan(spec, len(shards.ids("train")))
    layout = Layout(chat, pre.prompt.max_length, pre.packing, tokenizer.pad_token_id)

    base = load_base(spec, ctx.model_folder, ctx.device)
    if base.note:
        ctx.event("compute_dtype", base.note)
    model = add_adapter(base.model, spec)
    parameters = trainable(model)
    sync_parameters(parameters, ctx)
    optimizer = build_optimizer(parameters, hp)
    # Dropout differs between ranks; everything before this line is the same on all of them.
    torch.manual_seed(hp.seed + 1 + ctx.rank)

    step, log = 0, MetricLog(plan.total_steps)
    if (saved := ctx.resume()) is not None:
        step, log = checkpoint.read(saved, ctx, model, optimizer)
        ctx.event("resumed", f"resumed from the checkpoint of step {step}")
    log.runs_on(step + 1, ctx.world_size)
    ctx.event(
        "plan",
        f"{plan.num_samples} samples, {plan.samples_per_step} a step over {ctx.world_size} workers, "
        f"{plan.total_steps} steps; {sum(p.numel() for p in parameters):,} trainable parameters",
    )

    def autocast() -> Any:
        low = base.compute_dtype is not torch.float32
        return torch.autocast(ctx.device.type, base.compute_dtype) if low else contextlib.nullcontext()

    def run_evaluation(step: int) -> None:
        ids = shards.ids("eval")
        if not len(ids):
            return
        ctx.phase("evaluating")
        batches = eval_batches(shards, ids, ctx.rank, ctx.world_size, hp.per_device_eval_batch_size, layout)
        # On a GPU, bf16 is what evaluation sets of any size can be afforded in.
        with full_precision(model, base.compute_dtype) if ctx.device.type == "cpu" else autocast():
            loss = evaluate(model, batches, ctx)
        if loss is not None:
            log.evaluated(step, loss)
            ctx.event("evaluated", f"eval loss {loss:.4f} after {step} steps")
        report(step)
        publish_metrics()
        ctx.phase("training")

    def report(step: int) -> None:
        ctx.log(
            {
                "step": step,
                "total_steps": plan.total_steps,
                "epoch": round(plan.epoch_at(step), 4) if step else 0.0,
                "progress": round(step / plan.total_steps, 4),
                "eta_s": log.eta_s(step),
                "metrics": log.summary(),
                "points": log.fresh(),
            }
        )

    def publish_metrics() -> None:
        if ctx.rank == 0:
            write_text(ctx.storage, f"{ctx.run_path}/metrics.jsonl", log.lines())

    def save(step: int) -> None:
        ctx.phase("saving")
        publish_metrics()
        ctx.save(step, lambda folder: checkpoint.write(folder, ctx, step, model, optimizer, log))
        ctx.phase("training")

    def outcome(stopped: bool) -> Outcome:
        dtype = str(base.compute_dtype).removeprefix("torch.")
        return Outcome(stopped, step, plan.total_steps, dtype, log.summary(), log.worlds)

    model.train()
    if step == 0:
        run_evaluation(0)
    ctx.phase("training")
    report(step)

    loss_sum = torch.zeros((), dtype=torch.float64)
    logged_at = step
    log.restart_clock()
    train_ids = shards.ids("train")
    batches = step_batches(
        shards,
        train_ids,
        plan,
        ctx.rank,
        ctx.world_size,
        layout,
        num_workers=hp.dataloader_num_workers,
        start_step=step + 1,
    )
    for step, micro_batches in batches:
        supervised, tokens, stop = _agree(micro_batches, ctx)
        if stop:
            step -= 1
            save(step)
            return outcome(stopped=True)
        step_loss = torch.zeros((), dtype=torch.float64)
        for micro in micro_batches:
            with autocast():
                loss = supervised_loss(model, micro.to(ctx.device)) / max(1, supervised)
            loss.backward()
            step_loss += loss.detach().double().cpu()
        sync_gradients(parameters, ctx)
        grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, hp.max_grad_norm))
        if not math.isfinite(grad_norm):
            raise TrainingError(
                f"the loss or its gradient stopped being a number at step {step}: lower learning_rate "
                f"(now {hp.learning_rate:g}) or look at the rows of that step",
                field="train_config.hyperparameters.learning_rate",
                code="loss_not_finite",
            )
        rate = learning_rate(hp, step, plan.total_steps)
        set_learning_rate(optimizer, rate)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        loss_sum += step_loss
        log.count(tokens)
        last = step == plan.total_steps
        if step % hp.logging_steps == 0 or last or step == 1:
            steps = step - logged_at
            mean = ctx.all_reduce_sum(loss_sum.to(ctx.device, torch.float32)).item() / steps
            log.point(step, steps, epoch=round(plan.epoch_at(step), 4), loss=mean, learning_rate=rate, grad_norm=grad_norm)
            loss_sum.zero_()
            logged_at = step
            if ctx.rank == 0:
                logger.info(
                    "step %d/%d loss %.4f learning_rate %.3g grad_norm %.3f", step, plan.total_steps, mean, rate, grad_norm
                )
        report(step)
        if last or step % hp.eval_steps == 0:
            run_evaluation(step)
        if last or step % hp.save_steps == 0:
            save(step)
        if step == logged_at:
            log.restart_clock()

    ctx.phase("exporting")
    if ctx.rank == 0:
        publish_metrics()
        with tempfile.TemporaryDirectory(dir=ctx.scratch) as folder:
            export.write_adapter(Path(folder), spec, model, tokenizer, log)
            export.upload(Path(folder), ctx.storage, f"{ctx.run_path}/adapter")
    return outcome(stopped=False)


def _agree(micro_batches: list[MicroBatch], ctx: RunContext) -> tuple[int, int, bool]:
    """Supervised tokens and tokens of the global batch, and whether any rank was asked to stop: one all-reduce.

    Raises DatasetError when no rank has anything to learn from in this step.
    """
    mine = [
        sum(m.num_supervised for m in micro_batches),
        sum(m.num_tokens for m in micro_batches),
        sum(m.num_samples for m in micro_batches),
        int(ctx.stop_requested()),
    ]
    supervised, tokens, samples, stop = ctx.all_reduce_sum(torch.tensor(mine, dtype=torch.int64, device=ctx.device)).tolist()
    if samples == 0 and not stop:
        raise DatasetError(
            "no row of this step has a token to learn from: is max_length too short for the answers to fit?",
            field="dataset_config.preprocessing.prompt.max_length",
            code="no_supervised_tokens",
        )
    return supervised, tokens, bool(stop)
