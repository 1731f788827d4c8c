"""What looking at images takes: the share of a vlm's plan that its language model has no part in."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from train_loop.data.image_tokens import ImageTokens
from train_loop.data.images import Picture
from train_loop.model.adapters import ALL_LINEAR, linear_layers, named, rank
from train_loop.model.load import learning_part
from train_loop.model.vision import Family
from train_loop.spec import JobSpec

Size = tuple[int, int]  # width, height
NUM_BATCHES = 64  # micro-batches drawn from rows to find a large one


@dataclass(frozen=True)
class Sight:
    """The vision tower and the aligner of a base that is to see. Their parameters aren't among the language model's."""

    config: Any  # of the whole model
    params: int
    trained_params: int  # with a gradient: adapters', or the weights themselves
    whole_params: int  # of the base, with a gradient themselves
    tower_learns: bool
    num_layers: int  # of the tower
    hidden: int
    intermediate: int
    gated: bool  # its MLP multiplies two such widths

    @classmethod
    def of(cls, spec: JobSpec, model: Any, family: Family) -> Sight:
        """The sight of a base model, which may be without its weights."""
        freeze, adapter = spec.train_config.freeze, spec.train_config.adapter_config
        config = model.config.vision_config
        # Qwen2-VL's hidden_size is that of what comes out.
        hidden = getattr(config, "embed_dim", None) or config.hidden_size
        seeing = {n: m for n, m in learning_part(model, freeze).items() if family.is_of_sight(n)}
        saved = {n: m for n, m in named(model, adapter.modules_to_save or [], freeze).items() if n in seeing}
        whole = list(seeing.values()) if spec.train_config.train_type == "full" else list(saved.values())
        whole_params = sum(p.numel() for p in {p for module in whole for p in module.parameters()})
        trained_params = whole_params
        if spec.train_config.train_type != "full":
            layers = linear_layers(model, freeze) if adapter.targets == ALL_LINEAR else named(model, adapter.targets, freeze)
            inside = {module for kept in saved.values() for module in kept.modules()}
            shapes = [m.weight.shape for n, m in layers.items() if n in seeing and m not in inside and hasattr(m, "weight")]
            trained_params += sum(rank(adapter) * sum(shape) for shape in shapes if len(shape) == 2)
        parts = [model.get_submodule(name) for name in family.parts]
        return cls(
            config=model.config,
            params=sum(p.numel() for p in {p for part in parts for p in part.parameters()}),
            trained_params=trained_params,
            whole_params=whole_params,
            tower_learns=not freeze.vision,
            num_layers=getattr(config, "num_hidden_layers", None) or config.depth,
            hidden=hidden,
            intermediate=getattr(config, "intermediate_size", None) or 4 * hidden,
            gated=any(name.endswith("gate_proj") for name, _ in model.get_submodule(family.tower).named_modules()),
        )

    def kept_bytes(self, patches: float, width: int, *, recomputes: bool) -> float:
        """What of so many patches is kept for the backward pass, in numbers of `width` bytes."""
        if not self.tower_learns:
            return 0.0
        return patches * self.num_layers * (self.hidden * width if recomputes else self._block_bytes(width))

    def passing_bytes(self, patches: float, width: int) -> float:
        """What of so many patches a block holds while it computes, besides what is kept.

        Not while the language model does: that comes after in the forward pass, and before in the backward pass.
        """
        return patches * self._block_bytes(width) * (1.5 if self.tower_learns else 1.0)

    def _block_bytes(self, width: int) -> float:
        return 8 * self.hidden + width * (7 * self.hidden + (4 if self.gated else 2) * self.intermediate)

    def flops_per_patch(self, *, recomputes: bool) -> float:
        """FLOPs of one patch in training."""
        passes = 3 + recomputes if self.tower_learns else 1
        return 2.0 * passes * self.params


def patches_per_token(images: ImageTokens, config: Any, size: Size) -> float:
    """How many patches the tower looks at for each image token that the language model gets, of an image of this size."""
    vision = config.vision_config
    patch = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    pixels = images.inputs([Picture(file.getvalue(), *size)])[0]["pixel_values"]
    tokens = image_tokens(images, config, size)
    return float(pixels.numel() / (3 * patch**2 * getattr(vision, "temporal_patch_size", 1)) / max(1, tokens))


def image_tokens(images: ImageTokens, config: Any, size: Size) -> int:
    """How many tokens the tower's output takes the place of, of an image of this size: without the marks around them."""
    return int((images.expansion(*size).ids == config.image_token_id).sum())


def largest_sum(counts: Sequence[float], batch_size: int) -> float:
    """What a large micro-batch of rows like these has in all."""
    drawn = random.Random(0)
    return max((sum(drawn.choices(counts, k=batch_size)) for _ in range(NUM_BATCHES)), default=0.0) if counts else 0.0


def image_spans(input_ids: np.ndarray, sizes: Sequence[Size], images: ImageTokens) -> list[tuple[int, int]]:
    """Where in a sample's tokens those of its images are, which are all there, in order."""
    spans: list[tuple[int, int]] = []
    at = 0
    for size in sizes:
        ids = images.expansion(*size).ids
        places = at + np.flatnonzero(input_ids[at:] == ids[0])
        start = next(int(i) for i in places if np.array_equal(input_ids[i : i + len(ids)], ids))
        spans.append((start, at := start + len(ids)))
    return spans
