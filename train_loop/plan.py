"""What a job will take, before anything runs: rows and tokens from a sample, steps, memory of one worker by part, time, warnings.

Nothing is created, and of a large dataset only its head and a few random ranges are read.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from train_loop.advice import PREFERENCES, advice
from train_loop.data.formats import Conversation, Preference, RowRejected, parse, preferred
from train_loop.data.glance import Glance, glance
from train_loop.data.image_source import ImageSource, image_source
from train_loop.data.image_tokens import ImageTokens
from train_loop.data.mistaken import mistaken_for
from train_loop.data.packing import NO_LIMIT, rows_of
from train_loop.data.prepare import EXCERPT_CHARS, decode_row
from train_loop.data.sampler import BatchPlan
from train_loop.data.sources import SourceFile, filesystem_for, find_files
from train_loop.data.tokenize import IGNORE_INDEX, ChatTokenizer, Sample
from train_loop.errors import DatasetError, ModelError, why_unloadable
from train_loop.loss import chunk_tokens
from train_loop.model.adapters import ALL_LINEAR, expert_parameters, is_named, linear_layers, named, rank
from train_loop.model.attention import can_attend_by_document
from train_loop.model.load import DTYPES, auto_class, compute_dtype, family_of, language_part
from train_loop.model.processor import load_processor
from train_loop.model.source import ModelPlaces, model_folder
from train_loop.model.tokenizer import load_tokenizer
from train_loop.parallel import BUCKET_BYTES
from train_loop.sight import NUM_BATCHES, Sight, Size, image_spans, image_tokens, largest_sum, patches_per_token
from train_loop.snapshot import affordable, host_bytes
from train_loop.spec import JobSpec, Quantization, RandomSplit

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

SHOWN_SAMPLES = 3
MAX_IMAGES = 48  # that are looked at
START_S = 45.0  # placing workers, importing, loading, saving: measured on one machine, small model
GPU_MFU = 0.35  # share of a GPU's peak that LoRA training sustains
CPU_FLOPS_PER_CORE = 4e10  # sustained by a core without bf16 units
RUNTIME_BYTES = {"cpu": 580 << 20, "cuda": 900 << 20}  # interpreter and libraries; CUDA context and workspaces
RECOMPUTED_BLOCKS = 1.5  # whose activations are held while they are recomputed one by one: one, and its gradients
HELD_FREE = 1.08  # what a CPU worker's allocator holds, of what is in use: measured by benchmarks/memory.py


@dataclass(frozen=True)
class Hardware:
    """One worker's machine: `device` cpu or cuda, memory in bytes if known, sustained FLOP/s, price of a worker's hour."""

    device: str
    memory_bytes: int | None
    flops: float
    price_per_hour: float | None = None


@dataclass(frozen=True)
class ModelShape:
    """Counts of a base model's parameters and the sizes that activations depend on."""

    linear_params: int  # of the blocks' linear layers, which quantisation and adapters are about
    other_params: int  # embeddings, norms, head
    vision_params: int  # of a base that could see: loaded; used and trained as `sight` has it, or not at all
    num_layers: int
    hidden: int
    intermediate: int
    attention: int  # width of all query heads
    key_value: int  # of the heads of keys, which is that of values
    vocab: int
    context: int | None
    adapted: list[tuple[int, int]]  # (in, out) features of each adapted layer
    saved_params: int  # of modules_to_save
    leaves_experts: bool  # it has experts, and targets doesn't name them
    joins: bool  # all samples of a micro-batch in a row, where they are packed
    sight: Sight | None = None  # of a model that is to see


@dataclass(frozen=True)
class DatasetSample:
    """What a look at the dataset found. Lengths are in tokens, before truncation."""

    num_rows: int  # of the whole dataset, estimated unless `exact`
    exact: bool
    lengths: list[int]
    too_long: list[int]  # those over max_length, of rows that are rejected for it too
    supervised: list[int]
    rejects: list[str]  # the reasons
    num_read: int
    shown: list[dict[str, Any]]
    images: list[list[Size]]  # of each row whose length is here
    num_preferences: int  # rows with a rejected answer


def this_machine() -> Hardware:
    """The CPUs of this machine as one worker."""
    return Hardware("cpu", host_bytes(), CPU_FLOPS_PER_CORE * len(os.sched_getaffinity(0)))


def make_plan(
    spec: JobSpec,
    places: ModelPlaces,
    hardware: Hardware,
    source: FileSystem | None = None,
    doing: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The plan of a job, as JSON. `source` is the dataset's file system; None opens it without keys. `doing` hears what it is at.

    Raises UserError, as the job would, where model or dataset can't be read; RunFault when the model's storage is away.
    """
    doing(f"reading the config and tokenizer of {spec.model_details.base_model}")
    shape, chat = _described(spec, model_folder(spec.model_details, places, weights=False))
    filesystem = source or filesystem_for(spec.dataset_details.dataset_path, None, anonymous=True)[0]
    doing(f"reading rows of {spec.dataset_details.dataset_path}")
    files = find_files(spec, filesystem)
    seen = glance(filesystem, [f for f in files if not f.is_eval], spec.dataset_details.dataset_type)
    doing("rendering some rows with the chat template")
    with nullcontext() if seen.archive is None else image_source(spec, filesystem, seen.archive) as images:
        sample = look(spec, files[0].uri, seen, chat, images)
    hp, pre, workers = spec.train_config.hyperparameters, spec.dataset_config.preprocessing, spec.infra_config.num_workers

    train_rows, eval_rows = split_rows(spec, filesystem, files, sample.num_rows)
    limit = pre.prompt.max_length
    kept = [min(n, limit) for n in sample.lengths]
    batches = BatchPlan(
        num_samples=train_rows,
        per_device_batch_size=hp.per_device_train_batch_size,
        world_size=workers,
        accumulation_steps=hp.gradient_accumulation_steps,
        num_epochs=hp.num_epochs,
        max_steps=hp.max_steps,
        seed=hp.seed,
    )
    steps = batches.total_steps
    epochs, rest = divmod(steps, batches.steps_per_epoch)
    samples_seen = epochs * train_rows + min(rest * batches.samples_per_step, train_rows)
    tokens_seen = round(samples_seen * statistics.fmean(kept))
    capacity = (NO_LIMIT if shape.joins else limit) if pre.packing else None
    large = largest_batch(kept, hp.per_device_train_batch_size, capacity)
    patches = _patches(sample, shape, chat.images)
    at_once, learned = (largest_sum(counts, hp.per_device_train_batch_size) for counts in (patches, sample.supervised))
    memory = memory_of_a_worker(
        spec, shape, large, hardware, evaluates=eval_rows > 0, batch_supervised=round(learned), batch_patches=at_once
    )
    flops = tokens_seen * flops_per_token(spec, shape)
    if shape.sight is not None:
        recomputes = hp.gradient_checkpointing
        flops += samples_seen * statistics.fmean(patches) * shape.sight.flops_per_patch(recomputes=recomputes)
    train_s = flops / (hardware.flops * workers)
    hours = (train_s + START_S) * workers / 3600
    plan = {
        "workers": workers,
        "rows": {
            "total": sample.num_rows,
            "exact": sample.exact,
            "train": train_rows,
            "eval": eval_rows,
            "read": sample.num_read,
        },
        "tokens": {
            "per_row_mean": round(statistics.fmean(sample.lengths), 1),
            "per_row_max": max([*sample.lengths, *sample.too_long]),
            "supervised_share": round(sum(sample.supervised) / max(1, sum(kept)), 4),
            "truncated_share": round(len(sample.too_long) / (len(sample.lengths) + len(sample.rejects)), 4),
            "trained_on": tokens_seen,
        },
        "steps": steps,
        "samples_per_step": min(batches.samples_per_step, train_rows),
        "trainable_params": trained_params(spec, shape),
        "memory": memory,
        "time_s": round(train_s + START_S),
        "gpu_hours": round(hours, 4),
        "price": None if hardware.price_per_hour is None else round(hours * hardware.price_per_hour, 2),
        "samples": sample.shown,
    }
    return plan | {"warnings": warnings_of(spec, shape, sample, plan)}


def _patches(sample: DatasetSample, shape: ModelShape, images: ImageTokens | None) -> list[float]:
    """How many patches the vision tower looks at, by row."""
    sizes = [size for row in sample.images for size in row]
    if images is None or shape.sight is None or not sizes:
        return [0.0] * len(sample.images)
    config = shape.sight.config
    ratio = patches_per_token(images, config, max(sizes, key=math.prod))
    return [ratio * sum(image_tokens(images, config, size) for size in row) for row in sample.images]


def _described(spec: JobSpec, folder: Path) -> tuple[ModelShape, ChatTokenizer]:
    """The base model's shape, and what makes tokens for it, which anyone may have written. Raises ModelError."""
    try:
        shape = model_shape(spec, folder)
    except ModelError:
        raise
    except Exception as error:  # transformers has no kind of its own for what it can't read
        said = f"transformers can't use the config.json of {spec.model_details.base_model} ({why_unloadable(error)})."
        raise ModelError(said, field="model_details.base_model") from error
    tokenizer = load_tokenizer(folder)
    images = ImageTokens(load_processor(folder, tokenizer)) if shape.sight is not None else None
    return shape, ChatTokenizer.of(spec, tokenizer, images)


def model_shape(spec: JobSpec, folder: Path) -> ModelShape:
    """The base model's shape, from its config alone: the model is built without memory. Raises ModelError."""
    from transformers import AutoConfig

    whole = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config, family = whole.get_text_config(), family_of(spec, whole)
    with torch.device("meta"):
        model = auto_class(whole, images=family is not None).from_config(whole)
    text = {p for module in language_part(model).values() for p in module.parameters()}
    linear = linear_layers(model)
    targets = spec.train_config.adapter_config.targets
    saved = named(model, spec.train_config.adapter_config.modules_to_save or [])
    inside = {module for kept in saved.values() for module in kept.modules()}  # trained whole, without an adapter
    layers = linear if targets == ALL_LINEAR else named(model, targets)
    weights = [m.weight for m in layers.values() if m not in inside and getattr(m, "weight", None) is not None]
    adapted = [weight.shape for weight in weights if weight.ndim == 2]
    experts = expert_parameters(model)
    # PEFT's adapter on experts has as many ranks for each of them.
    adapted += [
        torch.Size((p.shape[0] * p.shape[1], p.shape[0] * p.shape[2])) for n, p in experts.items() if is_named(n, targets)
    ]
    linear_params = sum(m.weight.numel() for m in linear.values())
    heads = getattr(config, "num_attention_heads", 1)
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelShape(
        linear_params=linear_params,
        other_params=sum(p.numel() for p in text) - linear_params,  # a tied head counts once
        vision_params=sum(p.numel() for p in model.parameters() if p not in text),
        num_layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        attention=heads * head,
        key_value=(getattr(config, "num_key_value_heads", None) or heads) * head,
        vocab=config.vocab_size,
        context=getattr(config, "max_position_embeddings", None),
        adapted=[(int(i), int(o)) for o, i in adapted],
        saved_params=sum(p.numel() for p in {p for module in inside for p in module.parameters(recurse=False)}),
        leaves_experts=bool(experts) and not any(is_named(n, targets) for n in experts),
        joins=can_attend_by_document(model) and (family is None or family.joins),
        sight=None if family is None else Sight.of(spec, model, family),
    )


def split_rows(spec: JobSpec, filesystem: FileSystem, files: Sequence[SourceFile], num_rows: int) -> tuple[int, int]:
    """Rows to train and to evaluate on, of `num_rows` that aren't for evaluation only. Raises DatasetError."""
    split = spec.dataset_config.split
    if held_out := [f for f in files if f.is_eval]:
        return num_rows, glance(filesystem, held_out, spec.dataset_details.dataset_type).num_rows
    ratios = split.ratios if isinstance(split, RandomSplit) else [1.0]
    # As split_bounds has it: a split with a share gets a row at least, unless there are too few for all.
    if num_rows < sum(r > 0 for r in ratios):
        return num_rows, 0
    eval_rows = max(1, round(num_rows * ratios[1])) if len(ratios) > 1 and ratios[1] > 0 else 0
    return max(1, min(round(num_rows * ratios[0]), num_rows - eval_rows)), eval_rows


def look(spec: JobSpec, uri: str, seen: Glance, chat: ChatTokenizer, source: ImageSource | None) -> DatasetSample:
    """Render the rows of a dataset that were seen, or as many as have MAX_IMAGES; `uri` is where, `source` has their images.

    Raises DatasetError when none of them is usable.
    """
    untruncated = replace(chat, prompt=chat.prompt.model_copy(update={"max_length": 1 << 20}), truncation="right")
    lengths: list[int] = []
    too_long: list[int] = []
    supervised: list[int] = []
    shown: list[dict[str, Any]] = []
    rejects: list[str] = []
    preferences = 0
    images: list[list[Size]] = []
    num_read = seen.num_read
    for number, line in enumerate(seen.lines):
        if sum(map(len, images)) >= MAX_IMAGES:
            num_read = number
            break
        try:
            row = parse(decode_row(line), spec.dataset_details.dataset_format, vision=source is not None)
            conversation = preferred(row)
            pictures = [source.picture(reference) for reference in conversation.get("images", ())] if source is not None else []
            sizes = [(picture.width, picture.height) for picture in pictures]
            length = len(untruncated.encode(conversation, sizes).input_ids)
            if length > chat.prompt.max_length:
                too_long.append(length)
            sample = chat.encode(conversation, sizes)
        except RowRejected as error:
            rejects.append(error.reason)
            continue
        preferences += isinstance(row, Preference)
        lengths.append(length)
        supervised.append(int((sample.labels != IGNORE_INDEX).sum()))
        images.append(sizes)
        if len(shown) < SHOWN_SAMPLES:
            shown.append(show(conversation, sample, chat, [sizes[i] for i in sample.images]))
    if not lengths and not rejects:
        raise DatasetError(f"{uri} has no rows, only blank lines.", field="dataset_details.dataset_path", code="dataset_empty")
    if not lengths:
        begins = seen.lines[0].data[: 4 * EXCERPT_CHARS].decode(errors="replace")
        details = spec.dataset_details
        hint, field = mistaken_for(begins, rejects[0], details.dataset_type) or ("", "dataset_details.dataset_format")
        raise DatasetError(
            f"none of the {num_read} rows looked at in {uri} can be used (dataset_format {details.dataset_format}): "
            f"{rejects[0]}. {hint}".rstrip(),
            field=field,
            code="no_usable_rows",
        )
    usable = len(lengths) / (len(lengths) + len(rejects))
    return DatasetSample(
        num_rows=round(seen.num_rows * usable),
        exact=seen.exact,
        lengths=lengths,
        too_long=too_long,
        supervised=supervised,
        rejects=rejects,
        num_read=num_read,
        shown=shown,
        images=images,
        num_preferences=preferences,
    )


def show(conversation: Conversation, sample: Sample, chat: ChatTokenizer, sizes: Sequence[Size]) -> dict[str, Any]:
    """A rendered sample, cut into runs of tokens that are trained on and that aren't; `sizes` are those of the images in it."""
    trained = sample.labels != IGNORE_INDEX
    edges = [0, *(i for i in range(1, len(trained)) if trained[i] != trained[i - 1]), len(trained)]
    spans = image_spans(sample.input_ids, sizes, chat.images) if chat.images is not None else []
    segments = [
        {"text": _text(sample.input_ids, a, b, chat, spans, sizes), "trained": bool(trained[a])}
        for a, b in itertools.pairwise(edges)
        if b > a
    ]
    return {
        "tokens": len(trained),
        "trained_tokens": int(trained.sum()),
        "turns": len(conversation.get("messages", [])),
        "segments": segments,
    }


def _text(
    input_ids: np.ndarray, start: int, end: int, chat: ChatTokenizer, spans: Sequence[tuple[int, int]], sizes: Sequence[Size]
) -> str:
    """The text of some of a sample's tokens; of an image its size, and how many tokens it is."""
    pieces: list[str] = []
    for (first, behind), (width, height) in zip(spans, sizes, strict=True):
        if start <= first < end:
            pieces += [chat.tokenizer.decode(input_ids[start:first]), f"[image {width}x{height}, {behind - first} tokens]"]
            start = behind
    return "".join([*pieces, chat.tokenizer.decode(input_ids[start:end])])


def largest_batch(lengths: Sequence[int], batch_size: int, capacity: int | None) -> int:
    """Tokens, padding included, that a large micro-batch of rows like these takes; `capacity` as `collate` has it."""
    drawn = random.Random(0)
    largest = 0
    for _ in range(NUM_BATCHES):
        batch = drawn.choices(lengths, k=batch_size)
        rows = rows_of(batch, capacity)
        largest = max(largest, len(rows) * max(sum(batch[i] for i in row) for row in rows))
    return largest


def trained_params(spec: JobSpec, shape: ModelShape) -> int:
    """How many parameters have a gradient and optimizer state: the adapter's, or all."""
    seeing = shape.sight.trained_params if shape.sight is not None else 0
    if spec.train_config.train_type == "full":
        return shape.linear_params + shape.other_params + seeing
    adapter = spec.train_config.adapter_config
    magnitudes = sum(o for _, o in shape.adapted) if adapter.use_dora else 0
    return seeing + sum(rank(adapter) * (i + o) for i, o in shape.adapted) + magnitudes + shape.saved_params


def memory_of_a_worker(
    spec: JobSpec,
    shape: ModelShape,
    batch_tokens: int,
    hardware: Hardware,
    *,
    evaluates: bool,
    batch_supervised: int | None = None,
    batch_patches: float = 0.0,
) -> dict[str, Any]:
    """Peak bytes of one worker by part, for micro-batches of `batch_tokens` (of them `batch_supervised`; None: all), and of
    `batch_patches` of images.

    Activations are those of one transformer block with adapters under autocast, summed over what is kept.
    """
    hp, workers = spec.train_config.hyperparameters, spec.infra_config.num_workers
    quantization = spec.model_details.quantization
    on_cpu = hardware.device == "cpu"
    asked = spec.train_config.torch_dtype
    width = (compute_dtype(asked, torch.device("cpu"))[0] if on_cpu else DTYPES[asked]).itemsize
    linear = shape.linear_params * (bytes_per_weight(quantization) if quantization else width)
    full, sharded = spec.train_config.train_type == "full", spec.train_config.distributed.type == "fsdp"
    held = workers if sharded else 1  # each worker holds so much of what is sharded
    learning = 4 * trained_params(spec, shape)  # in float32
    moments = 2 * learning / (1 if hp.optim == "adamw" else 4)
    copied = learning + moments  # whole, by the first worker; from a GPU to its host's memory
    # What a block keeps of a token: two norms' float32 input; what goes into its linear layers and its attention, and what comes
    # out; the MLP's four widths; and what its adapters add.
    block = 8 * shape.hidden + _kept_by_adapters(spec, shape, width)
    block += width * (2 * shape.hidden + 3 * shape.attention + 2 * shape.key_value + 4 * shape.intermediate)
    if on_cpu and spec.dataset_config.preprocessing.packing and hp.per_device_train_batch_size > 1:
        block += width * shape.attention  # what comes out of each document's attention, beside all of them put together
    if hp.gradient_checkpointing:
        activations = batch_tokens * (shape.num_layers * shape.hidden * width + RECOMPUTED_BLOCKS * block)
    else:
        activations = batch_tokens * shape.num_layers * block
    still, kept, passing = shape.vision_params * width / held, 0.0, 0.0
    if shape.sight is not None:
        kept = shape.sight.kept_bytes(batch_patches, width, recomputes=hp.gradient_checkpointing)
        passing = shape.sight.passing_bytes(batch_patches, width)
        still = (shape.vision_params - full * shape.sight.whole_params) * width  # whole on each worker
    parts = {
        "weights": (learning if full else linear + shape.other_params * width) / held + still,
        "adapter": 0 if full else learning / held,
        # With a flat copy, of a bucket at most, to sum over workers.
        "gradients": learning / held + (min(learning, BUCKET_BYTES) if workers > 1 and not sharded else 0),
        "optimizer": moments / held,
        "checkpoint": copied if on_cpu and affordable(round(copied), "cpu") else 0,
        "activations": activations + kept,
        "logits": shape.vocab
        * _logit_bytes(batch_tokens if batch_supervised is None else batch_supervised, shape, hardware, width),
        "runtime": RUNTIME_BYTES[hardware.device],
    }
    looking = sum(parts.values()) - parts["activations"] - parts["logits"] + kept + passing
    # Evaluation on a CPU widens what isn't quantised to float32, and keeps no activations.
    widened = linear * (1 if quantization else 4 / width) + (shape.other_params + shape.vision_params) * 4
    widens = evaluates and on_cpu and not full and not sharded
    evaluating = sum(parts.values()) - parts["weights"] - parts["activations"] + widened if widens else 0.0
    # A sharded base is whole while it is dealt out: in the first worker's CPU memory or, quantised, on each device.
    loading = parts["runtime"] + (held + (not quantization)) * (parts["weights"] + parts["adapter"])
    loading = loading if sharded and (on_cpu or quantization) else 0.0
    total = max(sum(parts.values()), looking, evaluating, loading)
    if on_cpu:
        total = parts["runtime"] + HELD_FREE * (total - parts["runtime"])
    return {f"{name}_bytes": round(size) for name, size in parts.items()} | {
        "total_bytes": round(total),
        "available_bytes": hardware.memory_bytes,
        "batch_tokens": batch_tokens,
    }


def _logit_bytes(supervised: int, shape: ModelShape, hardware: Hardware, width: int) -> float:
    """Bytes that the logits of so many tokens take for each word: them and their shares, which become their gradient, both in
    float32 as well where they aren't. The next chunk's are there before those of the last one are gone."""
    chunk = chunk_tokens(shape.vocab, hardware.device)
    return min(supervised, chunk) * (8 if width == 4 else 12) + min(max(0, supervised - chunk), chunk) * width


def _kept_by_adapters(spec: JobSpec, shape: ModelShape, width: int) -> float:
    """Bytes of activations that the adapters of a block add, of a token."""
    if spec.train_config.train_type == "full":
        return 0.0
    adapter = spec.train_config.adapter_config
    inputs, outputs = (sum(sizes) / shape.num_layers for sizes in zip(*shape.adapted, strict=True)) if shape.adapted else (0, 0)
    masks = inputs if adapter.dropout else 0.0
    low = width * rank(adapter) * len(shape.adapted) / shape.num_layers
    return low + masks + (width * outputs if adapter.use_dora else 0.0)  # DoRA's: what comes out before it gets its length


def bytes_per_weight(quantization: Quantization) -> float:
    """What a quantised weight takes, its share of the constants included."""
    if quantization.quant_bits == 8:
        return 1.0  # and 4 bytes a row
    # Per 64 weights one absmax: 8 bits (and 32 per 256 of those) when quantised twice, else 32.
    return 0.5 + ((1 + 4 / 256) / 64 if quantization.double_quant else 4 / 64)


def flops_per_token(spec: JobSpec, shape: ModelShape) -> float:
    """FLOPs of one trained token: forward, input gradients, those of weights that learn, and the recomputation."""
    recomputes = spec.train_config.hyperparameters.gradient_checkpointing
    passes = 2 + recomputes + (spec.train_config.train_type == "full")
    return 2.0 * passes * (shape.linear_params + shape.hidden * shape.vocab)


def warnings_of(spec: JobSpec, shape: ModelShape, sample: DatasetSample, plan: dict[str, Any]) -> list[str]:
    """What a person should know before paying for it."""
    hp = spec.train_config.hyperparameters
    found = list(advice(spec, hidden=shape.hidden, context=shape.context))
    if sample.num_preferences and PREFERENCES not in found:
        found.append(PREFERENCES)  # auto shows it by the rows alone
    looked_at = len(sample.lengths) + len(sample.rejects)
    if sample.too_long:
        limit, longest = spec.dataset_config.preprocessing.prompt.max_length, max(sample.too_long)
        verb = "rejected" if spec.dataset_config.preprocessing.truncation == "reject" else "truncated"
        found.append(
            f"{len(sample.too_long)} of {looked_at} rows looked at are longer than max_length {limit} (up to {longest} tokens) "
            f"and will be {verb}"
        )
    if sample.rejects:
        allowed = spec.dataset_config.preprocessing.max_reject_ratio
        fails = len(sample.rejects) > allowed * looked_at
        then = f", more than max_reject_ratio = {allowed:g} allows: it will fail" if fails else ": they are left out"
        found.append(f"{len(sample.rejects)} of {looked_at} rows looked at can't be used (the first: {sample.rejects[0]}){then}")
    if spec.train_config.train_type == "lora" and not shape.adapted:
        found.append("adapter_config.targets names no layer of this model: the job will fail")
    if shape.leaves_experts:
        found.append(
            "the model's experts get no adapter: to train them too, name them in adapter_config.targets, with dropout 0, such as "
            "experts.gate_up_proj and experts.down_proj"
        )
    if (
        isinstance(spec.dataset_config.split, RandomSplit)
        and spec.dataset_config.split.ratios[1] > 0
        and plan["rows"]["eval"] == 0
    ):
        found.append("the eval split is empty: there are too few rows for its share")
    asked = hp.per_device_train_batch_size * hp.gradient_accumulation_steps * spec.infra_config.num_workers
    if asked > plan["rows"]["train"]:
        there = f"there {'is' if plan['rows']['train'] == 1 else 'are'} {plan['rows']['train']}"
        found.append(f"a step asks for {asked} samples and {there}: every step is the whole dataset")
    memory, available = plan["memory"]["total_bytes"], plan["memory"]["available_bytes"]
    if available is not None and memory > 0.95 * available:
        found.append(
            f"a worker needs about {memory / 2**30:.1f} GiB and has {available / 2**30:.1f}: lower "
            "per_device_train_batch_size or max_length, or quantise the base"
        )
    if hp.max_steps is None and plan["steps"] < math.ceil(1 / max(hp.warmup_ratio, 1e-9)) and plan["steps"] < 10:
        steps = "1 step" if plan["steps"] == 1 else f"{plan['steps']} steps"
        found.append(f"only {steps}: raise num_epochs, or lower the batch size")
    return found
