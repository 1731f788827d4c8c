"""Models that see: the families that train on images, where each has its parts, and how a micro-batch's images become its inputs.

Importable without torch, for whoever only asks which families there are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    Pictures = Sequence[Mapping[str, torch.Tensor]]  # what the image processor makes of each
    Inputs = dict[str, torch.Tensor]
    Layout = Callable[[Any, Pictures, torch.Tensor, torch.Tensor], Inputs]


@dataclass(frozen=True)
class Family:
    """What one architecture does in its own way. `tower` and `aligner` are modules of the model, by name."""

    name: str  # as people call it
    tower: str
    aligner: tuple[str, ...]  # what makes the tower's output the language model's input; may be inside the tower
    layout: Layout
    packs: bool = True  # several samples in a row
    shards: bool = True  # its language model is the same whether a batch has images or not
    mixes: bool = True  # embeddings of text and images of different dtypes
    config: Any = None

    @classmethod
    def of(cls, config: Any) -> Family | None:
        """The family of a model's configuration; None where it is none of these."""
        family = FAMILIES.get(config.model_type)
        if family is None or getattr(config.vision_config, "model_type", None) in OTHER_TOWERS:
            return None
        return replace(family, config=config)

    def collate(self, pictures: Pictures, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Inputs:
        """The model's inputs for the pictures of a micro-batch in the order of its rows, beside input_ids[rows, seq].

        `position_ids` start again at 0 with each document. What comes back may hold others in their place. Empty without
        pictures.
        """
        return self.layout(self.config, pictures, input_ids, position_ids) if pictures else {}

    def is_of_aligner(self, name: str) -> bool:
        """Whether a module or parameter of that name, in the model or an adapter around it, is the aligner's."""
        return any(_is_inside(name, part) for part in self.aligner)

    def is_of_tower(self, name: str) -> bool:
        """Whether one of that name is the vision tower's, and not the aligner's."""
        return _is_inside(name, self.tower) and not self.is_of_aligner(name)

    def is_of_sight(self, name: str) -> bool:
        """Whether one of that name is of either, and not the language model's."""
        return any(_is_inside(name, part) for part in self.parts)

    @property
    def parts(self) -> tuple[str, ...]:
        """The modules that aren't the language model's."""
        return self.tower, *self.aligner


def _is_inside(name: str, module: str) -> bool:
    return f".{module}." in f".{name}."


# --- how images are laid together -------------------------------------------------------------------------------


def _joined(pictures: Pictures, name: str, dim: int = 0) -> torch.Tensor:
    import torch

    return torch.cat([picture[name] for picture in pictures], dim=dim)


def _tiles(config: Any, pictures: Pictures, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Inputs:
    """Tiles [n, 3, height, width], one after another; the model finds their places by the image tokens."""
    return {"pixel_values": _joined(pictures, "pixel_values")}


def _rows_of_tiles(config: Any, pictures: Pictures, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Inputs:
    """Tiles [1, n, 3, height, width] as if of one row: by rows, those with few would be filled up with empty ones."""
    names = ("pixel_values", "pixel_attention_mask")
    return {name: _joined(pictures, name, dim=1) for name in names if name in pictures[0]}


def _with_types(config: Any, pictures: Pictures, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Inputs:
    """Tiles, and which tokens are of images: those of an image see each other."""
    types = (input_ids == config.image_token_id).long()
    return {"pixel_values": _joined(pictures, "pixel_values"), "token_type_ids": types}


def _grids(config: Any, pictures: Pictures, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Inputs:
    """Patches [n, width], the grid [1, 3] of each image, and positions [4, rows, seq]: in the text, by which documents are told
    apart, and in time, height and width. An image takes as many of the latter as its longer side, not as it has tokens.

    transformers makes the same for a row that is one document.
    """
    import torch

    grids = _joined(pictures, "image_grid_thw")
    merged = config.vision_config.spatial_merge_size
    sizes = iter([(t, h // merged, w // merged) for t, h, w in grids.tolist()])
    positions = position_ids.expand(4, *position_ids.shape).clone()
    is_image = input_ids == config.image_token_id
    for row, at in enumerate(position_ids):
        starts = (at == 0).nonzero()[:, 0].tolist()
        for start, end in itertools.pairwise([*starts, len(at)]):
            saved = 0  # positions, by the images so far
            after = start
            while len(found := is_image[row, after:end].nonzero()):
                first = after + int(found[0])
                positions[1:, row, after:first] -= saved
                t, h, w = next(sizes)
                grid = torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w)).reshape(-1, 3)
                after = first + len(grid)
                positions[1:, row, first:after] = grid.T + (at[first] - saved)
                saved += len(grid) - max(h, w)
            positions[1:, row, after:end] -= saved
    return {"pixel_values": _joined(pictures, "pixel_values"), "image_grid_thw": grids, "position_ids": positions}


def _cross_attended(config: Any, pictures: Pictures, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Inputs:
    """Tiles [rows, images, tiles, 3, height, width], rows filled up with empty images, and which of them each token looks at."""
    import torch
    from transformers.models.mllama.processing_mllama import (
        convert_sparse_cross_attention_mask_to_dense,
        get_cross_attention_token_mask,
    )

    counts = (input_ids == config.image_token_id).sum(dim=1).tolist()
    in_order = iter(pictures)
    of_rows = [list(itertools.islice(in_order, count)) for count in counts]
    inputs: Inputs = {}
    for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        like = pictures[0][name]
        empty = torch.zeros_like(like)
        if name == "aspect_ratio_mask":
            empty[..., 0] = 1  # as the processor has it
        rows = [[picture[name] for picture in row] + [empty] * (max(counts) - len(row)) for row in of_rows]
        inputs[name] = torch.cat([torch.cat(row, dim=1) for row in rows])
    max_tiles = inputs["aspect_ratio_mask"].shape[-1]
    mask = convert_sparse_cross_attention_mask_to_dense(
        [get_cross_attention_token_mask(ids, config.image_token_id) for ids in input_ids.tolist()],
        num_tiles=[[int(picture["aspect_ratio_mask"].sum()) for picture in row] for row in of_rows],
        max_num_tiles=max_tiles,
        length=input_ids.shape[1],
    )
    return inputs | {"cross_attention_mask": torch.from_numpy(mask)}


# --- the families -----------------------------------------------------------------------------------------------

IDEFICS3 = Family("Idefics3 and SmolVLM", "model.vision_model", ("model.connector",), _rows_of_tiles)
PROJECTED = Family("", "model.vision_tower", ("model.multi_modal_projector",), _tiles)
QWEN = Family("", "model.visual", ("model.visual.merger",), _grids)
DEEPSTACK = ("model.visual.merger", "model.visual.deepstack_merger_list")
# By model_type of their configuration.
FAMILIES: dict[str, Family] = {
    "idefics3": IDEFICS3,
    "smolvlm": replace(IDEFICS3, name="SmolVLM2", mixes=False),
    "qwen2_vl": replace(QWEN, name="Qwen2-VL"),
    "qwen2_5_vl": replace(QWEN, name="Qwen2.5-VL"),
    "qwen3_vl": replace(QWEN, name="Qwen3-VL", aligner=DEEPSTACK),
    "internvl": replace(PROJECTED, name="InternVL3"),
    # In layers with a sliding window, transformers looks for a packed document's images where the first one has its own.
    "gemma3": replace(PROJECTED, name="Gemma 3", layout=_with_types, packs=False),
    "llava": replace(PROJECTED, name="LLaVA 1.5"),
    "mllama": Family(
        "Llama 3.2 Vision",
        "model.vision_model",
        ("model.multi_modal_projector",),
        _cross_attended,
        packs=False,  # which images a token looks at is told by row
        shards=False,  # layers that look at images are left out where there is none, and all ranks must run the same
    ),
}
# Of models that pass for LLaVA and lay their images out in their own way.
OTHER_TOWERS = ("pixtral",)
