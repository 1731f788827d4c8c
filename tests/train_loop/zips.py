"""Datasets of images for tests: zips, pictures, and a chat that counts pictures and makes no tokens of them."""

import io
import json
import zipfile

import numpy as np
from PIL import Image

from train_loop.data.formats import RowRejected, each
from train_loop.data.tokenize import Sample

FIELDS = {"model_details.model_type": "vlm", "dataset_details.dataset_type": "zip", "model_details.quantization": None}


def picture(seed=0, size=(12, 8), format="PNG"):
    """A file of coloured noise."""
    out = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(out, format)
    return out.getvalue()


def row(*images, ask=None, answer="Fine.", **more):
    """A ShareGPT row that shows these images."""
    asked = "<image>" * len(images) + "What is it?" if ask is None else ask
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return {"conversations": turns} | ({"images": list(images)} if images else {}) | more


def jsonl(rows):
    return b"".join(r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in rows)


def zipped(rows, members=(), compression=zipfile.ZIP_DEFLATED):
    """A zip with train.jsonl of the rows (None: without), and members: {name or ZipInfo: bytes}."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        if rows is not None:
            archive.writestr("train.jsonl", jsonl(rows))
        for name, data in dict(members).items():
            archive.writestr(name, data)
    return out.getvalue()


class Chat:
    """Judges conversations by their pictures: the sample of one has a token for each, of what it is as wide as high."""

    def __init__(self, most=100):
        self.most = most

    def encode(self, conversation, sizes=()):
        places = [
            p for m in conversation["messages"] if isinstance(m["content"], list) for p in m["content"] if p["type"] == "image"
        ]
        assert len(places) == len(sizes) == len(conversation.get("images", []))
        if any(width == 66 for width, _ in sizes):
            raise RowRejected("a picture that the processor refuses")
        ids = np.array([1, *(width * 1000 + height for width, height in sizes[: self.most])], np.int32)
        return Sample(ids, ids, tuple(range(min(len(sizes), self.most))))

    def check(self, conversation, sizes=()):
        self.encode(conversation, sizes)

    def encode_each(self, rows):
        return each(lambda row: self.encode(*row), rows)
