"""The training loop: from a base model and prepared rows to an adapter, or to new weights.

One step: this rank's stripe of the global batch, forward and backward per micro-batch with the loss summed over tokens, one
all-reduce of counts before and one of gradients after, clip, step. The loss is divided by the supervised tokens of the whole
global batch, so 1x8, 2x4, 4x2 workers x samples and gradient accumulation all take the same step.
"""

from __future__ import annotations

import contextlib
import logging
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from train_loop import export, weights
from train_loop.checkpoint import Checkpoints
from train_loop.context import RunContext
from train_loop.data.image_tokens import ImageTokens
from train_loop.data.loader import Collator, Vision, eval_batches, step_batches
from train_loop.data.sampler import BatchPlan
from train_loop.data.shards import PreparedDataset, ShardSet, fetch_shards
from train_loop.data.streaming import RowReader
from train_loop.data.tokenize import ChatTokenizer
from train_loop.errors import Stopped
from train_loop.evaluate import evaluate
from train_loop.layout import MERGED_FOLDER
from train_loop.loss import supervised_loss
from train_loop.metric_files import MetricFiles
from train_loop.metrics import MetricLog, memory_held
from train_loop.model.adapters import parameter_groups
from train_loop.model.merge import write_merged
from train_loop.model.processor import load_processor
from train_loop.model.source import revision_of, weights_hash
from train_loop.model.tokenizer import load_tokenizer
from train_loop.node import from_first_worker
from train_loop.optim import build_optimizer, learning_rate, set_learning_rate
from train_loop.parallel import clip_gradients, set_threads, sync_gradients
from train_loop.sharding import IDLE
from train_loop.spec import JobSpec
from train_loop.step import agree, not_finite
from train_loop.storage import upload_folder
from train_loop.trainee import load_trainee, load_whole

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How the loop ended: `stopped` at a step boundary on request, or with what was trained uploaded."""

    stopped: bool
    step: int
    total_steps: int
    compute_dtype: str
    metrics: dict[str, Any]
    worlds: list[dict[str, int]]  # the workers that the steps ran on: from_step, world_size
    # Of each file name, size_bytes and sha256: of an adapter, and of full weights. Rank 0 knows, as it does what the base is.
    adapter_files: list[dict[str, Any]]
    merged_files: list[dict[str, Any]]
    base_model: dict[str, Any]  # id, revision (a commit of the hub) and weights_sha256


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
    with contextlib.closing(Checkpoints(ctx, spec.train_config.hyperparameters.save_total_limit)) as checkpoints:
        return _train(spec, prepared, ctx, checkpoints)


def _train(spec: JobSpec, prepared: PreparedDataset, ctx: RunContext, checkpoints: Checkpoints) -> Outcome:
    hp = spec.train_config.hyperparameters
    pre = spec.dataset_config.preprocessing
    set_threads(ctx)
    ctx.phase("loading_model")
    ctx.beat("slow")

    tokenizer = load_tokenizer(ctx.model_folder)
    sees = spec.model_details.model_type == "vlm"
    images = ImageTokens(load_processor(ctx.model_folder, tokenizer)) if sees else None
    if pre.prompt.template is not None:
        tokenizer.chat_template = pre.prompt.template  # exported with the adapter: inference must render as training did
    chat = None if prepared.eager else ChatTokenizer.of(spec, tokenizer, images)
    rows = RowReader(ctx.open_source, spec.dataset_details.dataset_format) if pre.streaming else None
    fetch = partial(fetch_shards, prepared, ctx.storage, f"{ctx.run_path}/data", ctx.scratch / "data")
    shards = ShardSet(prepared, from_first_worker(ctx, fetch), rows)
    train_ids, eval_ids = shards.ids("train"), shards.ids("eval")
    plan = batch_plan(spec, len(train_ids))

    trainee = load_trainee(spec, ctx)
    if trainee.note:
        ctx.event("compute_dtype", trainee.note)
    model, parameters = trainee.model, trainee.parameters
    if pre.packing and trainee.capacity is None:
        ctx.event("packing", "this architecture can't keep packed samples apart: rows are padded instead, same loss")
    vision = Vision(images, trainee.family.collate) if images is not None and trainee.family is not None else None
    collator = Collator(chat, pre.prompt.max_length, trainee.capacity, tokenizer.pad_token_id, vision)
    optimizer = build_optimizer(parameter_groups(model, spec.train_config), hp)
    # Dropout differs between ranks; everything before this line is the same on all of them.
    torch.manual_seed(hp.seed + 1 + ctx.rank)

    step, log = 0, MetricLog(plan.total_steps)
    metric_files = MetricFiles(ctx.storage, ctx.run_path)
    if (saved := checkpoints.restore(model, optimizer)) is not None:
        step, log = saved
        ctx.event("resumed", f"resumed from the checkpoint of step {step}")
    log.runs_on(step + 1, ctx.world_size)
    ctx.event(
        "plan",
        f"{plan.num_samples} samples, {plan.samples_per_step} a step over {ctx.world_size} workers, "
        f"{plan.total_steps} steps; {sum(p.numel() for p in parameters):,} trainable parameters",
    )

    def is_due(every: int) -> bool:
        return step == plan.total_steps or step % every == 0

    def run_evaluation() -> None:
        if not len(eval_ids) or log.evaluated_at == step:
            return
        ctx.phase("evaluating")
        batches = eval_batches(shards, eval_ids, ctx.rank, ctx.world_size, hp.per_device_eval_batch_size, collator)
        with trainee.evaluating():
            loss = evaluate(model, batches, ctx, idle=IDLE if trainee.sharded else None)
        log.evaluated_at = step
        if loss is not None:
            log.evaluated(step, loss)
            is_number = math.isfinite(loss)
            said = f"eval loss {loss:.4f} after {step} steps" if is_number else f"the eval loss isn't a number after {step} steps"
            ctx.event("evaluated", said)
        report()
        ctx.phase("training")

    def report() -> None:
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

    def metrics_upload() -> Callable[[], None]:
        return partial(metric_files.write, list(log.points)) if ctx.rank == 0 else lambda: None

    def save(*, wait: bool = False) -> None:
        ctx.phase("saving")
        ctx.beat("slow")
        checkpoints.save(step, model, optimizer, log, first=metrics_upload())
        if wait:
            checkpoints.wait()
        ctx.beat()
        ctx.phase("training")

    def outcome(*, stopped: bool, **files: Any) -> Outcome:
        dtype = str(trainee.compute_dtype).removeprefix("torch.")
        written = {"adapter_files": [], "merged_files": [], "base_model": {}} | files
        return Outcome(stopped, step, plan.total_steps, dtype, log.summary(), log.worlds, **written)

    model.train()
    told = 0  # the notice that a checkpoint was made for
    try:
        if is_due(hp.eval_steps):
            run_evaluation()
            checkpoints.behind(metrics_upload())
        ctx.phase("training")
        report()
        log.restart_clock()
        batches = step_batches(
            shards,
            train_ids,
            plan,
            ctx.rank,
            ctx.world_size,
            collator,
            num_workers=hp.dataloader_num_workers,
            start_step=step + 1,
        )
        for next_step, micro_batches in batches:
            if step == log.evaluated_at and log.stalled(hp.early_stopping_patience):
                better_than = f"better eval loss than that of step {log.best_step}" if log.best else "eval loss that is a number"
                ctx.event("stopped_early", f"no {better_than} for a while: done")
                break
            agreed = agree(micro_batches, ctx)
            if agreed.stop:
                raise Stopped
            if agreed.notice not in (0, told):
                told = agreed.notice
                save(wait=True)
                ctx.event("preempted", f"{ctx.preemption()}; step {step} is saved")
            step = next_step
            if trainee.sharded:  # every rank runs the model as often as the others
                micro_batches += [IDLE] * (plan.num_micro_batches(ctx.world_size) - len(micro_batches))
            losses = []
            for micro in micro_batches:
                with trainee.autocast():
                    loss = supervised_loss(model, micro.to(ctx.device)) / max(1, agreed.supervised)
                loss.backward()
                losses.append(loss.detach())
                ctx.beat()  # a step of many may take longer than a hang does to be seen
            mine = torch.stack(losses).double().tolist() if losses else []
            step_loss = sync_gradients(parameters, sum(mine), ctx)
            grad_norm = clip_gradients(parameters, hp.max_grad_norm)
            if not (math.isfinite(step_loss) and math.isfinite(grad_norm)):
                bad = [micro for micro, loss in zip(micro_batches, mine, strict=True) if not math.isfinite(loss)]
                raise not_finite(step, bad, train_ids[plan.global_batch(step)], shards, hp.learning_rate, ctx)
            rate = learning_rate(hp, step, plan.total_steps)
            set_learning_rate(optimizer, rate)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            ctx.beat("step")
            log.count(agreed.tokens, step_loss)
            may_be_last = bool(hp.early_stopping_patience) and is_due(hp.eval_steps)
            if is_due(hp.logging_steps) or step == 1 or may_be_last:
                epoch, held = round(plan.epoch_at(step), 4), memory_held(ctx.device)
                point = log.point(step, epoch=epoch, learning_rate=rate, grad_norm=grad_norm, **held)
                if ctx.rank == 0:
                    logger.info(
                        "step %d/%d loss %.4f learning_rate %.3g grad_norm %.3f",
                        *(step, plan.total_steps, point["loss"], rate, grad_norm),
                    )
            report()
            if is_due(hp.eval_steps):
                run_evaluation()
            if is_due(hp.save_steps) or log.best_step == step:
                save()
            elif step == log.evaluated_at:
                checkpoints.behind(metrics_upload())
            if step == log.logged_at:
                log.restart_clock()
    except Stopped:
        save(wait=True)
        return outcome(stopped=True)

    ctx.phase("exporting")
    ctx.beat("slow")
    checkpoints.wait()
    if hp.early_stopping_patience and log.best is not None and log.best["step"] != step:
        checkpoints.go_back(log.best["step"], model)
        log.eval_after = log.best["eval_loss"]
    tensors = weights.handed_out(model, keep=ctx.rank == 0)
    written: dict[str, Any] = {}
    if ctx.rank == 0:
        metrics_upload()()
        ctx.require_current()
        with tempfile.TemporaryDirectory(dir=ctx.scratch) as folder:
            name = export.write(Path(folder), spec, model, tensors, tokenizer, log, ctx.model_folder)
            written[f"{name}_files"] = upload_folder(Path(folder), ctx.storage, f"{ctx.run_path}/{name}")
        if spec.train_config.export.merge and name != MERGED_FOLDER:
            ctx.beat("slow")
            whole = load_whole(spec, ctx, trainee, tensors) if trainee.sharded else model
            with tempfile.TemporaryDirectory(dir=ctx.scratch) as folder:
                write_merged(Path(folder), spec, whole, tokenizer, ctx.model_folder)
                written["merged_files"] = upload_folder(Path(folder), ctx.storage, f"{ctx.run_path}/{MERGED_FOLDER}")
        written["base_model"] = {
            "id": spec.model_details.base_model,
            "revision": revision_of(ctx.model_folder),
            "weights_sha256": weights_hash(ctx.model_folder),
        }
    return outcome(stopped=False, **written)
