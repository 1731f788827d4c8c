"""Models that see, of every family: what they compute, what of them learns, and what is handed out."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.train_loop.vision_models import FAMILIES, NOT_PACKED, make
from train_loop.data.packing import collate
from train_loop.data.tokenize import IGNORE_INDEX, Sample
from train_loop.loss import supervised_loss
from train_loop.model.load import load_base
from train_loop.model.processor import load_processor
from train_loop.model.vision import Family
from train_loop.spec import JobSpec

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


def laid_out(family, samples, pictures, packing):
    """Samples with their pictures as one micro-batch."""
    batch = collate(samples, max_length=256, packing=packing, pad_id=2)
    by_first = {tuple(s.input_ids.tolist()): p for s, p in zip(samples, pictures, strict=True)}
    in_order = []
    for ids, positions in zip(batch.input_ids, batch.position_ids, strict=True):
        edges = [*(positions == 0).nonzero()[:, 0].tolist(), len(ids)]
        for start, end in zip(edges, edges[1:], strict=False):
            document = ids[start:end].tolist()
            # Padded, the padding is of one document with it no longer than the row.
            found = next((k for k in by_first if tuple(document) == k), None)
            in_order += by_first[found] if found else []
    vision = family.collate(in_order, batch.input_ids, batch.position_ids)
    return dataclasses.replace(batch, vision=vision)


def seeing(family, folders, spec_of, **changes):
    """A family's base, its processor, and what a micro-batch is made of."""
    spec = spec_of(family, **changes)
    base = load_base(spec, folders(family), CPU)
    processor = load_processor(folders(family))
    return spec, base, processor


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_is_that_of_transformers_padded_packed_and_one_by_one(name, folders, spec_of):
    _, base, processor = seeing(name, folders, spec_of)
    model, config = base.model.eval(), base.model.config
    inputs, labels = theirs(processor, config)
    with torch.no_grad():
        expected = model(**inputs, labels=labels, use_cache=False).loss.item() * int((labels[:, 1:] != IGNORE_INDEX).sum())
        of_each = samples(processor, config)
        seen = pictures(processor)
        padded = supervised_loss(model, laid_out(base.family, of_each, seen, packing=False)).item()
        alone = sum(
            supervised_loss(model, laid_out(base.family, [s], [p], packing=False)).item()
            for s, p in zip(of_each, seen, strict=True)
        )
        others = supervised_loss(model, laid_out(base.family, of_each, pictures(processor, seed=7), packing=False)).item()
        assert padded == pytest.approx(expected, rel=1e-5)
        assert alone == pytest.approx(expected, rel=1e-5)
        assert others != pytest.approx(expected, rel=1e-4)
        assert base.family.packs is (name not in NOT_PACKED)
        if base.family.packs:
            packed = laid_out(base.family, of_each, seen, packing=True)
            assert len(packed.input_ids) < len(of_each)
            assert supervised_loss(model, packed).item() == pytest.approx(expected, rel=1e-5)
