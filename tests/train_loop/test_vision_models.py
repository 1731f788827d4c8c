"""Models that see, of every family: what they compute, what of them learns, and what is handed out."""

import dataclasses
import functools
import io
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from PIL import Image

from tests.conftest import TINY
from tests.train_loop.group import on_workers
from tests.train_loop.vision_models import FAMILIES, make
from train_loop import export, weights
from train_loop.chat import Comparison
from train_loop.data.image_tokens import ImageTokens
from train_loop.data.images import admit
from train_loop.data.packing import NO_LIMIT, collate
from train_loop.data.tokenize import IGNORE_INDEX, Sample
from train_loop.errors import ModelError
from train_loop.loss import _hidden, supervised_loss
from train_loop.metrics import MetricLog
from train_loop.model import attention, load
from train_loop.model.adapters import add_adapter, parameter_groups, trainable
from train_loop.model.load import load_base
from train_loop.model.merge import write_merged
from train_loop.model.processor import load_processor
from train_loop.model.tokenizer import load_tokenizer
from train_loop.optim import build_optimizer
from train_loop.plan import DatasetSample, _patches, model_shape
from train_loop.sharding import whole
from train_loop.spec import JobSpec, ModelDetails, Prompt
from train_loop.trainee import load_trainee, make_trainable, row_capacity

CPU = torch.device("cpu")
HP = "train_config.hyperparameters"
ADAPTER = "train_config.adapter_config"
# Rows of none, one and two images, of several shapes.
ROWS = [
    ("What is this?", "A cat", [(40, 28)]),
    ("And these?", "One dog and two birds", [(28, 64), (33, 33)]),
    ("Nothing to see.", "I see", []),
    ("A last one", "Yes", [(64, 64)]),
]
WORDS = [(ask, answer, []) for ask, answer, _ in ROWS]
PACKED = 256  # tokens of a row that takes some of them
PICTURE_KEYS = ("pixel_values", "pixel_attention_mask", "image_grid_thw", "aspect_ratio_ids", "aspect_ratio_mask")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """The folder of each family's model, made when it is asked for."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("vision") / family
            make(family, made[family], tokenizer)
        return made[family]

    return folder


@pytest.fixture
def spec_of(local_job):
    def make(family, **changes):
        quiet = {
            "model_details.base_model": f"tuneyard/{family}",
            "model_details.model_type": "vlm",
            "dataset_details.dataset_type": "zip",
            "model_details.quantization": None,
            "train_config.torch_dtype": "float32",
            f"{ADAPTER}.r": 4,
        }
        return JobSpec.model_validate(local_job(quiet | changes))

    return make


def picture(size, seed=0):
    width, height = size
    noise = np.random.default_rng([seed, width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def drawn(rows=ROWS, seed=0):
    return [[picture(size, seed + i) for i, size in enumerate(sizes)] for _, _, sizes in rows]


def texts(processor, rows=ROWS):
    def message(role, text, images):
        return {"role": role, "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]}

    talks = [[message("user", ask, len(sizes)), message("assistant", answer, 0)] for ask, answer, sizes in rows]
    return [processor.tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks]


def image_ids(processor, config):
    return {config.image_token_id, *getattr(processor, "image_token_ids", [])}


def theirs(processor, config, rows=ROWS, seed=0):
    """The processor's own inputs for all rows in one padded batch, with labels at every token of text."""
    images = drawn(rows, seed)
    told = {"images": images if any(images) else None}
    if type(processor).__name__.startswith(("Qwen", "InternVL", "Llava")):  # these take one list of images
        told = {"images": [image for row in images for image in row] or None}
    inputs = processor(text=texts(processor, rows), **told, padding=True, padding_side="right", return_tensors="pt")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORE_INDEX)
    labels[torch.isin(labels, torch.tensor([*image_ids(processor, config)]))] = IGNORE_INDEX
    return dict(inputs), labels


def samples(processor, config, rows=ROWS):
    """The same rows, as the preparation makes them."""
    made = []
    for row in rows:
        inputs, labels = theirs(processor, config, [row])
        ids, labels = (t[0].numpy().astype(np.int32) for t in (inputs["input_ids"], labels))
        made.append(Sample(ids, labels))
    return made


def pictures(processor, rows=ROWS, seed=0):
    """The image processor's tensors of each picture by itself, by row."""
    told = getattr(processor, "images_kwargs", {})
    made = [[processor.image_processor(image, return_tensors="pt", **told) for image in row] for row in drawn(rows, seed)]
    return [[{k: v for k, v in one.items() if isinstance(v, torch.Tensor)} for one in row] for row in made]


def documents(batch):
    """(row, start, end) of each, padding included."""
    for row, positions in enumerate(batch.position_ids):
        edges = [*(positions == 0).nonzero()[:, 0].tolist(), len(positions)]
        yield from ((row, start, end) for start, end in itertools.pairwise(edges))


def laid_out(family, samples, pictures, capacity):
    """Samples with their pictures as one micro-batch."""
    batch = collate(samples, capacity=capacity, pad_id=2)
    by_ids = {tuple(s.input_ids.tolist()): p for s, p in zip(samples, pictures, strict=True)}
    in_order = []
    for row, start, end in documents(batch):
        in_order += by_ids.get(tuple(batch.input_ids[row, start:end].tolist()), [])  # none at padding
    vision = family.collate(in_order, batch.input_ids, batch.position_ids)
    return dataclasses.replace(batch, vision=vision)


def seeing(family, folders, spec_of, **changes):
    """A family's base, and its processor."""
    spec = spec_of(family, **changes)
    return spec, load_base(spec, folders(family), CPU), processor_of(folders(family))


@functools.cache
def processor_of(folder):
    return load_processor(folder, load_tokenizer(folder))


def their_loss(model, processor, rows=ROWS):
    """The sum of losses that transformers' own forward gives for the rows in one batch."""
    inputs, labels = theirs(processor, model.config, rows)
    return float(model(**inputs, labels=labels, use_cache=False).loss) * int((labels[:, 1:] != IGNORE_INDEX).sum())


def micro_batch(base, processor, rows=ROWS, seed=0, packing=False):
    of_each = samples(processor, base.model.config, rows)
    return laid_out(base.family, of_each, pictures(processor, rows, seed), PACKED if packing else None)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_loss_is_that_of_transformers_padded_packed_and_one_by_one(name, folders, spec_of):
    _, base, processor = seeing(name, folders, spec_of)
    model = base.model.eval()
    of_each = [their_loss(model, processor, [row]) for row in ROWS]
    for row, expected in zip(ROWS, of_each, strict=True):
        alone = float(supervised_loss(model, micro_batch(base, processor, [row])))
        assert alone == pytest.approx(expected, rel=1e-5)
    padded, others = (float(supervised_loss(model, micro_batch(base, processor, seed=seed))) for seed in (0, 7))
    assert padded == pytest.approx(sum(of_each), rel=1e-5)
    assert others != pytest.approx(padded, rel=1e-4), "of other images"
    packed = micro_batch(base, processor, packing=True)
    assert len(packed.input_ids) < len(ROWS)
    assert float(supervised_loss(model, packed)) == pytest.approx(padded, rel=1e-5)
    # In transformers' own batch, what comes before the first image in a row of Llama's looks at the images of longer rows.
    assert (their_loss(model, processor) == pytest.approx(padded, rel=1e-5)) is (name != "mllama")


def hidden_of(base, batch):
    return _hidden(base.model, batch.input_ids, batch.position_ids, batch.attention_mask, batch.vision)


@pytest.mark.parametrize(
    ("capacity", "rows"),
    [(NO_LIMIT, ROWS), (PACKED, ROWS), (None, ROWS), (NO_LIMIT, WORDS)],
    ids=["joined", "packed", "padded", "words joined"],
)
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_another_document_beside_it_moves_nothing_in_one(name, capacity, rows, folders, spec_of):
    """Whatever it says and shows."""
    _, base, processor = seeing(name, folders, spec_of)
    base.model.eval()
    of_each, shown, others = samples(processor, base.model.config, rows), pictures(processor, rows), pictures(processor, rows, 7)
    batch = laid_out(base.family, of_each, shown, capacity)
    before = hidden_of(base, batch)
    for i, sample in enumerate(of_each):
        ids = sample.input_ids.copy()
        ids[-1] += 1
        changed = dataclasses.replace(sample, input_ids=ids)
        its = laid_out(
            base.family, [*of_each[:i], changed, *of_each[i + 1 :]], [*shown[:i], others[i], *shown[i + 1 :]], capacity
        )
        moved = (hidden_of(base, its) - before).abs().amax(-1) > 1e-4
        told = [(row, start, end) for row, start, end in documents(its) if ids.tolist() == its.input_ids[row, start:end].tolist()]
        [(row, start, end)] = told
        assert moved[row, start:end].sum() > (1 if shown[i] else 0)
        moved[row, start:end] = False
        assert not moved.any()


def gradients(model, micro):
    """The loss of a micro-batch, and the gradients of all that learns."""
    loss = supervised_loss(model, micro)
    loss.backward()
    found = [p.grad for p in trainable(model)]
    model.zero_grad()
    return [loss.detach(), *found]


def close(ones, others):
    return all((one - other).abs().max() <= 1e-5 * other.abs().max() for one, other in zip(ones, others, strict=True))


@pytest.mark.parametrize("rows", [ROWS, WORDS], ids=["images", "words"])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mllama"])
def test_packed_samples_give_the_gradients_of_each_in_its_own_row(name, rows, folders, spec_of):
    spec, base, processor = seeing(name, folders, spec_of, **{f"{ADAPTER}.dropout": 0.0})
    model = learning(base, spec)
    of_each, shown = samples(processor, base.model.config, rows), pictures(processor, rows)
    joined, packed, padded = (
        gradients(model, laid_out(base.family, of_each, shown, capacity)) for capacity in (NO_LIMIT, PACKED, None)
    )
    assert close(joined, padded)
    assert close(packed, padded)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_the_language_model_of_a_base_that_sees_is_trained_on_packed_text(name, folders, spec_of):
    told = {"model_details.model_type": "llm", "dataset_details.dataset_type": "jsonl", f"{ADAPTER}.dropout": 0.0}
    spec, base, processor = seeing(name, folders, spec_of, **told)
    assert (base.family, row_capacity(spec, base)) == (None, NO_LIMIT)
    model, of_each = learning(base, spec), samples(processor, base.model.config, WORDS)
    joined, padded = (gradients(model, collate(of_each, capacity=capacity, pad_id=2)) for capacity in (NO_LIMIT, None))
    assert close(joined, padded)


@pytest.mark.parametrize("rows", [ROWS, WORDS], ids=["images", "words"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_noise_is_added_to_words_and_not_to_images(name, rows, folders, spec_of):
    spec, base, processor = seeing(name, folders, spec_of, **{f"{HP}.neftune_noise_alpha": 5.0, f"{ADAPTER}.dropout": 0.0})
    model, seen = make_trainable(base, spec), []
    first = next(m for n, m in base.model.get_decoder().named_modules() if n.endswith("layers.0"))
    first.register_forward_pre_hook(
        lambda _, args, told: seen.append(args[0] if args else told["hidden_states"]), with_kwargs=True
    )
    batch = micro_batch(base, processor, rows)
    for training in (False, True):
        supervised_loss(model.train(training), batch)
    moved = (seen[1] - seen[0]).abs().amax(-1) > 0
    is_image = batch.input_ids == base.model.config.image_token_id
    assert torch.equal(moved, torch.ones_like(is_image) if name == "mllama" else ~is_image)  # whose images are looked at


@pytest.mark.parametrize("name", ["llava", "mllama", "qwen2_vl"])
@torch.no_grad()
def test_loftq_finds_the_original_weights_by_whatever_name_the_files_have_them(name, folders, spec_of):
    changes = {"model_details.quantization": {"quant_bits": 4}, f"{ADAPTER}.init": "loftq", f"{ADAPTER}.targets": ["q_proj"]}
    exact = dict(load_base(spec_of(name), folders(name), CPU).model.named_parameters())
    spec = spec_of(name, **changes)
    model = add_adapter(load_base(spec, folders(name), CPU).model, spec)
    layers = {n: m for n, m in model.get_base_model().named_modules() if "default" in getattr(m, "lora_A", {})}
    assert layers
    for n, layer in layers.items():
        lost = exact[f"{n}.weight"] - dequantize_module_weight(layer.get_base_layer())
        assert (lost - layer.get_delta_weight("default")).norm() < 0.8 * lost.norm()


def learning(base, spec):
    """The base with an adapter of which every weight has a gradient."""
    model = make_trainable(base, spec).train()
    for parameter in trainable(model):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_each_document_of_a_pack_attends_to_itself_alone_without_a_mask(name, folders, spec_of, monkeypatch):
    from transformers.integrations import sdpa_attention

    _, base, processor = seeing(name, folders, spec_of)
    batch = micro_batch(base, processor, packing=True)
    calls, real = [], sdpa_attention.sdpa_attention_forward

    def watched(module, query, key, value, mask, **told):
        if query.shape[2] == key.shape[2]:  # not what looks at images
            calls.append((query.shape[2], mask is None))
        return real(module, query, key, value, mask, **told)

    monkeypatch.setattr(attention, "FEW_TOKENS", 0)
    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", watched)
    packed = float(supervised_loss(base.model.eval(), batch))
    spans = [(end - start, batch.input_ids[row, start:end]) for row, start, end in documents(batch)]
    assert {len(sample.input_ids) for sample in samples(processor, base.model.config)} <= {length for length, _ in spans}
    text = base.model.config.get_text_config()
    if name == "gemma3":  # whose images see what comes after them, and whose first layer a window
        of_image = [bool((ids == base.model.config.image_token_id).any()) for _, ids in spans]
        near = [(n, n <= text.sliding_window and not sees) for (n, _), sees in zip(spans, of_image, strict=True)]
        assert calls == near + [(n, not sees) for (n, _), sees in zip(spans, of_image, strict=True)]
    else:
        layers = text.num_hidden_layers - len(getattr(text, "cross_attention_layers", ()))
        assert calls == [(n, True) for n, _ in spans] * layers
    monkeypatch.undo()
    assert packed == pytest.approx(float(supervised_loss(base.model, micro_batch(base, processor))), rel=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_all_samples_share_a_row_where_no_mask_is_made_for_them(name, folders, spec_of):
    spec, base, processor = seeing(name, folders, spec_of)
    # Gemma 3's images see what comes after them, and Llama's tokens are multiplied with all images of their row.
    by_mask = name in ("gemma3", "mllama")
    assert row_capacity(spec, base) == (spec.dataset_config.preprocessing.prompt.max_length if by_mask else NO_LIMIT)
    of_each, shown = samples(processor, base.model.config), pictures(processor)
    with attention.heard() as by_edges, torch.no_grad():
        joined, padded = (
            float(supervised_loss(base.model.eval(), laid_out(base.family, of_each, shown, capacity)))
            for capacity in (NO_LIMIT, None)
        )
    assert joined == pytest.approx(padded, rel=1e-5)
    assert (by_edges == {True}) is not by_mask


ALIGNERS = {"gemma3": {f"{ADAPTER}.modules_to_save": ["multi_modal_projector"]}}  # it has no linear layer
SOME = ("idefics3", "qwen3_vl", "mllama")  # whose parts lie differently
CASES = [*((name, "lora") for name in FAMILIES), *((name, "full") for name in SOME)]


def freezing(vision, aligner):
    return {"train_config.freeze": {"vision": vision, "aligner": aligner}}


@pytest.mark.parametrize(("name", "train_type"), CASES)
def test_what_is_not_frozen_learns_and_nothing_else(name, train_type, folders, spec_of):
    for vision, aligner in [(True, True), (False, False)] + [(True, False), (False, True)] * (name in SOME):
        changes = {"train_config.train_type": train_type, f"{ADAPTER}.dropout": 0.0} | freezing(vision, aligner)
        if train_type == "lora" and not aligner:
            changes |= ALIGNERS.get(name, {})
        spec, base, processor = seeing(name, folders, spec_of, **changes)
        model = make_trainable(base, spec)
        supervised_loss(model.train(), micro_batch(base, processor, ROWS[:1])).backward()
        learns = {n: p for n, p in model.named_parameters() if p.requires_grad}
        moved = [n for n, p in learns.items() if p.grad is not None and p.grad.abs().max() > 0]
        for of_part, is_frozen in ((base.family.is_of_tower, vision), (base.family.is_of_aligner, aligner)):
            assert any(of_part(n) for n in learns) is not is_frozen
            assert any(of_part(n) for n in moved) is not is_frozen
        of_language = [n for n in moved if not base.family.is_of_tower(n) and not base.family.is_of_aligner(n)]
        assert of_language
        tower = base.model.get_submodule(base.family.tower)
        assert any(getattr(m, "gradient_checkpointing", False) for m in tower.modules())


@pytest.mark.parametrize("name", ["smolvlm", "qwen3_vl", "mllama"])
def test_low_precision_is_close(name, folders, spec_of, monkeypatch):
    monkeypatch.setattr(load, "cpu_has_bf16_units", lambda: True)
    mixed = {"train_config.torch_dtype": "bfloat16", f"{ADAPTER}.dropout": 0.0}
    for changes in ({}, {"train_config.train_type": "full"} | freezing(True, False)):
        losses = []
        for precision in ({}, mixed):
            spec, base, processor = seeing(name, folders, spec_of, **changes, **precision)
            model = make_trainable(base, spec).train()
            with torch.autocast("cpu", torch.bfloat16, enabled=bool(precision)):
                loss = supervised_loss(model, micro_batch(base, processor, ROWS[:2]))
            loss.backward()
            assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
            losses.append(float(loss.detach()))
        assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_a_part_that_would_learn_nothing_is_refused(folders, spec_of):
    spec, base, _ = seeing("gemma3", folders, spec_of, **freezing(True, False))
    with pytest.raises(ModelError, match="modules_to_save") as caught:
        add_adapter(base.model, spec)
    assert caught.value.field == "train_config.freeze.aligner"


def test_a_base_that_sees_nothing_is_refused(spec_of, mirror):
    with pytest.raises(ModelError, match=r"no family that trains on images: .*Qwen2\.5-VL") as caught:
        load_base(spec_of("x", **{"model_details.base_model": TINY}), mirror / TINY, CPU)
    assert caught.value.field == "model_details.base_model"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", SOME)
def test_quantisation_leaves_what_sees_as_it_is(name, bits, folders, spec_of):
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    quantised = {"model_details.quantization": {"quant_bits": bits}} | freezing(False, False)
    spec, base, processor = seeing(name, folders, spec_of, **quantised)
    linear = {n: m for n, m in base.model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    packed = {n for n, m in linear.items() if isinstance(m, Linear4bit | Linear8bitLt)}
    assert packed == {n for n in linear if not base.family.is_of_tower(n) and not base.family.is_of_aligner(n)}
    model = make_trainable(base, spec)
    supervised_loss(model.train(), micro_batch(base, processor)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_tower_and_aligner_may_learn_at_rates_of_their_own(folders, spec_of):
    rates = {f"{HP}.learning_rate": 0.01, f"{HP}.vision_learning_rate": 0.001, f"{HP}.aligner_learning_rate": 0.02}
    spec, base, _ = seeing("qwen3_vl", folders, spec_of, **rates, **freezing(False, False), **{f"{ADAPTER}.lora_plus_ratio": 4})
    model = add_adapter(base.model, spec)
    of = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(model, spec.train_config)
    assert sum(len(g["params"]) for g in groups) == len([p for p in model.parameters() if p.requires_grad])
    for group in groups:
        for name in (of[id(p)] for p in group["params"]):
            rate = 0.1 if base.family.is_of_tower(name) else 2 if base.family.is_of_aligner(name) else 1
            assert group["lr_factor"] == pytest.approx(rate * (4 if "lora_B" in name else 1))
    build_optimizer(groups, spec.train_config.hyperparameters)


@pytest.mark.parametrize(("name", "train_type"), CASES)
def test_what_is_handed_out_loads_with_transformers_and_sees_the_same(name, train_type, folders, spec_of, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    changes = {"train_config.train_type": train_type, **freezing(False, False)}
    changes |= ALIGNERS.get(name, {}) if train_type == "lora" else {}
    spec, base, processor = seeing(name, folders, spec_of, **changes)
    model = make_trainable(base, spec)
    torch.manual_seed(1)
    for parameter in trainable(model):
        parameter.data += 0.02 * torch.randn_like(parameter)
    inputs, _ = theirs(processor, base.model.config)
    tokenizer = processor.tokenizer
    with torch.no_grad():
        real = inputs["attention_mask"].bool()  # what stands at padding is looked at by nobody
        ours = model.eval()(**inputs, use_cache=False).logits[real]
        tensors = weights.handed_out(model, keep=True)
        log = MetricLog(1)
        (tmp_path / "out").mkdir()
        name_of_it = export.write(tmp_path / "out", spec, model, tensors, tokenizer, log, folders(name))
        again = processor_of(tmp_path / "out")
        same, _ = theirs(again, base.model.config)
        if name == "llava":  # transformers' own loader wants torchvision for most others
            AutoProcessor.from_pretrained(tmp_path / "out")
        assert inputs.keys() == same.keys()
        assert all(torch.equal(inputs[k], same[k]) for k in inputs)
        if train_type == "lora":
            plain = AutoModelForImageTextToText.from_pretrained(folders(name), dtype=torch.float32)
            plain = PeftModel.from_pretrained(plain, tmp_path / "out").eval()
            write_merged(tmp_path / "merged", spec, model, tokenizer, folders(name))
            merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
            for file in ("processor_config.json", "preprocessor_config.json", "chat_template.jinja"):
                assert (tmp_path / "merged" / file).read_bytes() == (folders(name) / file).read_bytes()
            torch.testing.assert_close(merged(**same, use_cache=False).logits[real], ours, rtol=1e-3, atol=1e-3)
        else:
            plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
        torch.testing.assert_close(plain(**same, use_cache=False).logits[real], ours, rtol=1e-4, atol=1e-4)
    assert name_of_it == ("adapter" if train_type == "lora" else "merged")
    told = (tmp_path / "out/README.md").read_text()
    assert "AutoModelForImageTextToText, AutoProcessor" in told


def test_the_chat_template_of_an_old_processor_is_the_tokenizers(folders, tmp_path):
    folder = shutil.copytree(folders("idefics3"), tmp_path / "old")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load_tokenizer(folder).chat_template == template == processor_of(folder).chat_template


@pytest.mark.parametrize("name", SOME)
def test_the_plan_counts_the_patches_that_the_tower_looks_at(name, folders, spec_of):
    shape, processor = model_shape(spec_of(name), folders(name)), processor_of(folders(name))
    sizes = [[size for size in shown if size == (64, 64)] for _, _, shown in ROWS]
    sample = DatasetSample(4, True, [9] * 4, [], [1] * 4, [], 4, [], sizes, 0)
    side = shape.sight.config.vision_config.patch_size
    a_patch = 3 * side**2 * getattr(shape.sight.config.vision_config, "temporal_patch_size", 1)
    of_each = [sum(one["pixel_values"].numel() for one in row) / a_patch for row in pictures(processor, ROWS[-1:])]
    assert _patches(sample, shape, ImageTokens(processor)) == pytest.approx([0, 0, 0, *of_each])


def test_what_a_processor_adds_to_its_tokenizer_is_in_none_that_is_handed_out(folders, tokenizer):
    before = (tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map)
    processor = load_processor(folders("idefics3"), tokenizer)  # whose own this isn't
    assert "<fake_token_around_image>" in processor.tokenizer.get_vocab()
    assert (tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map) == before


@pytest.mark.parametrize("name", FAMILIES)
def test_a_question_about_a_picture_is_answered_by_what_is_in_it(name, folders):
    folder = folders(name)
    details = ModelDetails(base_model="made/here", model_type="vlm")
    models = Comparison.load(folder, folder, details, Prompt(max_length=512))
    asked = []
    for colour in ("red", "blue"):
        file = io.BytesIO()
        Image.new("RGB", (40, 30), colour).save(file, "PNG")
        asked.append(models.asked("What is this?", [admit(file.getvalue())]))
        base, tuned = models.answer("What is this?", 2, [admit(file.getvalue())])
        assert base == tuned  # the same model here
    assert asked[0]["input_ids"].tolist() == asked[1]["input_ids"].tolist()
    first, second = (models.base(**inputs).logits for inputs in asked)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", ["qwen3_vl", "mllama"])
def test_workers_that_share_a_model_sum_the_gradients_of_those_that_see(name, folders, spec_of, tmp_path):
    """One of them has no image, and neither the other's hang nor its own zeros show."""
    changes = {"train_config.distributed.type": "fsdp", "infra_config": {"gpu_type": "cpu", "gpu_count": 2}}
    changes |= {"train_config.train_type": "full"} | freezing(False, False)
    job = spec_of(name, **changes).model_dump(mode="json")
    on_workers("tests.train_loop.test_vision_models:compare", tmp_path, 2, folders(name), job)


def compare(ctx, job):
    spec = JobSpec.model_validate(job)
    base, processor = load_base(spec, ctx.model_folder, CPU), processor_of(ctx.model_folder)
    trainee = load_trainee(spec, ctx)
    # Unsharded, of both ranks' rows: none of the second's has an image.
    batches = [micro_batch(base, processor, rows) for rows in (ROWS[:2], ROWS[2:3])]
    for batch in batches:
        supervised_loss(base.model, batch).backward()
    supervised_loss(trainee.model, batches[ctx.rank].to(ctx.device)).backward()
    expected = {n: p.grad for n, p in base.model.named_parameters()}
    for name, parameter in trainee.model.named_parameters():
        gradient = None if parameter.grad is None else whole(parameter.grad).cpu()
        wanted = expected[name]
        if wanted is not None:
            torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()), msg=name)
