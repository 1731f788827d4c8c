"""Which tokens stand for a picture in a text, and which tensors the model is given of it: what the model's processor makes.

A chat template renders one placeholder for a picture. The processor puts what stands for it there before it makes tokens: so many
tokens as the picture's size asks for, between marks of its own, and at times text around them. Here only that text goes into the
rendered one; the tokens, thousands of them, take the placeholder's place later. They are the same: each of the marks, as the
placeholder, is a token that a text is cut at before all else.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from train_loop.data.formats import RowRejected
from train_loop.data.pieces import Tokens
from train_loop.data.rendering import Rendered

if TYPE_CHECKING:
    from torch import Tensor

    from train_loop.data.images import Picture

MAX_KNOWN = 4096  # sizes of pictures: some 4 KB each
# Tokens that a model puts something else in the place of.
STAND_INS = ("image_token", "video_token", "audio_token")

Span = tuple[int, int]


@dataclass(frozen=True)
class Expansion:
    """What stands in a placeholder's place: `ids [n]`, int32, and the text around them."""

    before: str
    ids: np.ndarray
    after: str

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class ImageTokens:
    """A base model's processor, as far as rows need it."""

    processor: Any

    @property
    def placeholder(self) -> str:
        """What a chat template renders once for each picture."""
        token: str = self.processor.image_token
        return token

    @property
    def placeholder_id(self) -> int:
        """Its token."""
        found: int = self.processor.tokenizer.convert_tokens_to_ids(self.placeholder)
        return found

    @property
    def template(self) -> str | None:
        """The processor's chat template, if it has one."""
        template = self.processor.chat_template
        return template.get("default") if isinstance(template, dict) else template

    def expansion(self, width: int, height: int) -> Expansion:
        """What stands for a picture of this size, in pixels. Raises RowRejected where the processor refuses it."""
        known = self._known.get((width, height))
        if known is None:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            known = self._known[width, height] = self._expansion(width, height)
        return known

    @cached_property
    def _known(self) -> dict[tuple[int, int], Expansion]:
        return {}

    def _expansion(self, width: int, height: int) -> Expansion:
        blank = np.broadcast_to(np.uint8(0), (3, height, width))
        try:
            # Only how large what comes out is matters.
            inputs = self._processed(
                blank,
                input_data_format="channels_first",
                return_tensors="np",
                resample=0,
                do_rescale=False,
                do_normalize=False,
            )
        except (ValueError, ArithmeticError) as error:
            raise RowRejected(f"the model takes no image of {width} x {height} pixels: {error}") from error
        text = self.processor.replace_image_token(inputs, image_idx=0, **self._options)
        tokenizer = self.processor.tokenizer
        out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        marks = [i for i, token in enumerate(out["input_ids"]) if token in tokenizer.added_tokens_decoder]
        first, last = marks[0], marks[-1]
        ids = np.array(out["input_ids"][first : last + 1], dtype=np.int32)
        return Expansion(text[: out["offset_mapping"][first][0]], ids, text[out["offset_mapping"][last][1] :])

    def inputs(self, pictures: Sequence[Picture]) -> list[dict[str, Tensor]]:
        """The image processor's tensors, of each picture by itself."""
        import torch

        made = (self._processed(picture.open(), return_tensors="pt") for picture in pictures)
        return [{name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)} for tensors in made]

    def _processed(self, image: Any, **changes: Any) -> Any:
        return self.processor.image_processor(image, **self._options, **changes)

    @property
    def _options(self) -> dict[str, Any]:
        """What the processor tells its image processor."""
        return getattr(self.processor, "images_kwargs", {})

    @cached_property
    def _stand_ins(self) -> tuple[str, ...]:
        found = (getattr(part, name, None) for part in (self.processor, self.processor.tokenizer) for name in STAND_INS)
        return tuple(dict.fromkeys(token for token in found if isinstance(token, str)))

    def check_written(self, text: str) -> None:
        """Raise RowRejected where a text has a token in it that the model would look for a picture at."""
        for token in self._stand_ins:
            if token in text:
                raise RowRejected(f"its text has {token} in it, which stands for an image")

    def with_text(self, rendered: Rendered, shown: Sequence[Expansion]) -> Rendered:
        """With the text around the pictures that are `shown`, in order. Raises RowRejected if others are rendered."""
        places = [match.span() for match in re.finditer(re.escape(self.placeholder), rendered.text)]
        if len(places) != len(shown):
            raise RowRejected(f"images: {len(shown)}, places for them in what the chat template makes of it: {len(places)}")
        self.check_written(rendered.text.replace(self.placeholder, " "))  # as parts put together may have it
        if not any(picture.before or picture.after for picture in shown):
            return rendered
        pieces, at = [], 0
        for (start, end), picture in zip(places, shown, strict=True):
            pieces += [rendered.text[at:start], picture.before, self.placeholder, picture.after]
            at = end
        begins = [start for start, _ in places]
        added = [0, *accumulate(len(picture.before) + len(picture.after) for picture in shown)]

        def moved(place: int) -> int:
            return place + added[bisect_left(begins, place)]

        return Rendered(
            "".join([*pieces, rendered.text[at:]]),
            [(moved(start), moved(end)) for start, end in rendered.generated],
            [moved(place) for place in rendered.begins],
        )

    def expanded(self, tokens: Tokens, shown: Sequence[Expansion]) -> tuple[Tokens, list[Span]]:
        """The tokens with what stands for each picture in its placeholder's place, and where that is.

        Of a text's first tokens, as many of the pictures as are there.
        """
        ids, starts, ends = tokens
        places = np.flatnonzero(ids == self.placeholder_id)
        sizes = np.ones(len(ids), dtype=np.int64)
        sizes[places] = [len(picture) for picture in shown[: len(places)]]
        behind = np.cumsum(sizes)
        spans = [(int(behind[i] - sizes[i]), int(behind[i])) for i in places]
        ids = np.repeat(ids, sizes)
        for (start, end), picture in zip(spans, shown, strict=False):
            ids[start:end] = picture.ids
        return (ids, np.repeat(starts, sizes), np.repeat(ends, sizes)), spans


def whole_pictures(kept: slice, pictures: Sequence[Span]) -> slice:
    """What is kept of a sample's tokens, less those of pictures that aren't kept whole."""
    start = next((b for a, b in pictures if a < kept.start < b), kept.start)
    stop = next((a for a, b in pictures if a < kept.stop < b), kept.stop)
    return slice(start, stop)
