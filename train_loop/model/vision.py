"""Models that see: the families that train on images, where each has its parts, and how a micro-batch's images become its inputs.

Importable without torch, for whoever only asks which families there are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    Pictures = Sequence[Mapping[str, torch.Tensor]]  # what the image processor makes of each
    Inputs = dict[str, torch.Tensor]
    Layout = Callable[[Any, Pictures, torch.Tensor, torch.Tensor], Inputs]
    Hook = Callable[[Any, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]] | None]


@dataclass(frozen=True)
class Family:
    """What one architecture does in its own way. `tower` and `aligner` are modules of the model, by name."""

    name: str  # as people call it
    tower: str
    aligner: tuple[str, ...]  # what makes the tower's output the language model's input; may be inside the tower
    layout: Layout
    before: tuple[str, Hook] | None = None  # a module of the loaded model, and what its inputs go through first
    mixes: bool = True  # embeddings of text and images of different dtypes
    joins: bool = True  # rows of any length: no mask has a place for each of their tokens with all others, or all images
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

    def prepare(self, model: Any) -> None:
        """Have a loaded model of the family, in place, keep the documents of a row apart."""
        if self.before is not None:
            name, hook = self.before
            model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)

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


def _documents(positions: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Where each document of a row begins and ends, by its positions [seq]. Padding is one of them."""
    return itertools.pairwise([*(positions == 0).nonzero()[:, 0].tolist(), len(positions)])


def _tiles(config: Any, pictures: Pictures, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Inputs:
    """Tiles [n, 3, height, width], one after another; the model finds their places by the image tokens."""
    return {"pixel_values": _joined(pictures, "pixel_values")}


def _rows_of_tiles(config: Any, pictures: Pictures, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Inputs:
    """Tiles [1, n, 3, height, width] as if of one row: by rows, those with few would be filled up with empty ones."""
    names = ("pixel_values", "pixel_attention_mask")
    return {name: _joined(pictures, name, dim=1) for name in names if name in pictures[0]}


def _with_documents(config: Any, pictures: Pictures, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Inputs:
    """Tiles, and which document of its row each token is of, for `_masked`."""
    return {"pixel_values": _joined(pictures, "pixel_values"), "documents": (position_ids == 0).cumsum(1)}


def _masked(model: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Masks [rows, 1, seq, seq] of Gemma 3's two kinds of layers: a token sees what is before it in its document, and one of an
    image all of that image.

    transformers makes the same of token_type_ids for rows of one document. Of others it looks for the images, in layers with a
    sliding window, where the first document has its own.
    """
    import torch

    if (documents := inputs.pop("documents", None)) is None:
        return None
    is_image = inputs["input_ids"] == model.config.image_token_id
    image = (is_image & ~torch.nn.functional.pad(is_image, (1, 0))[:, :-1]).cumsum(1)
    at = torch.arange(documents.shape[1], device=documents.device)
    behind = at[:, None] - at
    of_image = (image[:, :, None] == image[:, None]) & is_image[:, :, None] & is_image[:, None]
    sees = ((documents[:, :, None] == documents[:, None]) & ((behind >= 0) | of_image))[:, None]
    near = sees & (behind < model.config.get_text_config().sliding_window)
    return args, inputs | {"attention_mask": {"full_attention": sees, "sliding_attention": near}}


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
        for start, end in _documents(at):
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
    """Tiles [rows, images, tiles, 3, height, width], rows filled up with empty images; which of them each token looks at, and for
    `_looking`, which tokens come after an image of their document.

    Those before its first one look at all of its images, tiles without a picture included: so does transformers in a row of one
    document.
    """
    import torch
    from transformers.models.mllama.processing_mllama import get_cross_attention_token_mask

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
    tiles = inputs["aspect_ratio_mask"]
    looks = torch.zeros((*input_ids.shape, *tiles.shape[1:]), dtype=torch.uint8)
    after = torch.zeros(input_ids.shape)
    for row, positions in enumerate(position_ids):
        image = 0
        for start, end in _documents(positions):
            spans = get_cross_attention_token_mask(input_ids[row, start:end].tolist(), config.image_token_id)
            if spans:
                first = start + spans[0][0]
                looks[row, start:first, image : image + len(spans)] = 1
                after[row, first:end] = 1
            for begin, last in spans:
                looks[row, start + begin : end if last == -1 else start + last, image] = tiles[row, image].to(torch.uint8)
                image += 1
    return inputs | {"cross_attention_mask": looks, "after_images": after}


def _looking(reader: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Give tokens of documents without images nothing to look at: zeros, which come out of a layer's attention as zeros.

    transformers has them look at all images of their row, empty ones included, and leaves such layers out where no row has any:
    what is computed of a document would depend on those beside it, and sharded workers would run different layers.
    """
    import torch

    after, states = inputs.pop("after_images", None), inputs.get("cross_attention_states")
    if inputs.get("use_cache") is not False:
        return None  # not in training
    if states is None:
        rows = len(inputs["input_ids"])
        nothing = torch.zeros((rows, 1, reader.config.hidden_size), dtype=reader.dtype, device=inputs["input_ids"].device)
        return args, inputs | {
            "cross_attention_states": nothing,
            "full_text_row_masked_out_mask": nothing.new_zeros(rows, 1, 1, 1),
        }
    if after is None:
        return None  # laid out by others
    bias, looks = inputs["cross_attention_mask"], inputs["full_text_row_masked_out_mask"].bool()
    never = torch.finfo(bias.dtype).min
    bias = torch.cat([bias.masked_fill(~looks, never), torch.zeros_like(bias[..., :1]).masked_fill(looks, never)], dim=-1)
    states = states.reshape(len(bias), -1, states.shape[-1])
    return args, inputs | {
        "cross_attention_states": torch.nn.functional.pad(states, (0, 0, 0, 1)),
        "cross_attention_mask": bias,
        "full_text_row_masked_out_mask": after[:, None, :, None].to(bias.dtype),
    }


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
    "gemma3": replace(PROJECTED, name="Gemma 3", layout=_with_documents, before=("model", _masked), joins=False),
    "llava": replace(PROJECTED, name="LLaVA 1.5"),
    "mllama": Family(
        "Llama 3.2 Vision",
        "model.vision_model",
        ("model.multi_modal_projector",),
        _cross_attended,
        before=("model.language_model", _looking),
        joins=False,
    ),
}
# Of models that pass for LLaVA and lay their images out in their own way.
OTHER_TOWERS = ("pixtral",)
