"""A conversation becomes tokens and labels through the model's chat template.

Labels are IGNORE_INDEX except on what the assistant says, its end-of-turn token included: that is how the model learns to stop.
Which characters those are comes from the template's own `{% generation %}` marks where it has them, else from rendering the
conversation turn by turn and comparing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jinja2 import TemplateError

from train_loop.data.formats import Conversation, Message, RowRejected
from train_loop.errors import DatasetError
from train_loop.spec import JobSpec, Prompt

IGNORE_INDEX = -100
TEMPLATE_FIELD = "dataset_config.preprocessing.prompt.template"


@dataclass(frozen=True)
class Sample:
    """One document: `input_ids [n]` and `labels [n]`, int32, labels not shifted."""

    input_ids: np.ndarray
    labels: np.ndarray

    @property
    def is_supervised(self) -> bool:
        """Whether any token is predicted; the first one never is."""
        return bool((self.labels[1:] != IGNORE_INDEX).any())


@dataclass(frozen=True)
class ChatTokenizer:
    """Encodes conversations of one job. Picklable."""

    tokenizer: Any
    prompt: Prompt
    truncation: Literal["right", "left", "reject"]
    train_on: Literal["assistant", "last_assistant", "all"]

    @classmethod
    def of(cls, spec: JobSpec, tokenizer: Any) -> ChatTokenizer:
        """The job's tokenizer with the job's settings."""
        pre = spec.dataset_config.preprocessing
        return cls(tokenizer, pre.prompt, pre.truncation, pre.train_on)

    def encode(self, conversation: Conversation) -> Sample:
        """Tokenise, label, truncate to prompt.max_length.

        Raises RowRejected for this row, DatasetError when the template itself is at fault.
        """
        messages = conversation["messages"]
        if self.prompt.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.prompt.system}, *messages]
        try:
            if self.train_on != "all" and "{% generation" in self._template().replace("{%- ", "{% "):
                input_ids, spoken = self._by_marks(messages)
            else:
                input_ids, spoken = self._by_prefixes(messages)
        except TemplateError as error:
            raise DatasetError(
                f"the chat template can't render a row: {error}. Correct prompt.template, or leave it null.",
                field=TEMPLATE_FIELD,
                code="template_error",
            ) from None
        if self.train_on == "last_assistant":
            # Keep the last unbroken run of spoken tokens only.
            starts = np.flatnonzero(spoken & ~np.concatenate([[False], spoken[:-1]]))
            if len(starts):
                spoken[: starts[-1]] = False
        return self._truncate(Sample(input_ids, np.where(spoken, input_ids, IGNORE_INDEX).astype(np.int32)))

    def _template(self) -> str:
        template: str | None = self.prompt.template or self.tokenizer.get_chat_template()
        return template or ""

    def _render(self, messages: list[Message], **options: Any) -> str:
        text: str = self.tokenizer.apply_chat_template(messages, chat_template=self.prompt.template, tokenize=False, **options)
        return text

    def _by_marks(self, messages: list[Message]) -> tuple[np.ndarray, np.ndarray]:
        out = self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.prompt.template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return np.array(out["input_ids"], dtype=np.int32), np.array(out["assistant_masks"], dtype=bool)

    def _by_prefixes(self, messages: list[Message]) -> tuple[np.ndarray, np.ndarray]:
        text = self._render(messages)
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        input_ids = np.array(out["input_ids"], dtype=np.int32)
        if self.train_on == "all":
            return input_ids, np.ones(len(input_ids), dtype=bool)
        spoken = np.zeros(len(input_ids), dtype=bool)
        starts, ends = np.array(out["offset_mapping"]).reshape(-1, 2).T
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:i], add_generation_prompt=True)
            after = self._render(messages[: i + 1])
            if not text.startswith(after) or not after.startswith(before):
                raise DatasetError(
                    "the chat template rewrites earlier turns, so the assistant's tokens can't be told apart: give "
                    "prompt.template one with {% generation %} marks.",
                    field=TEMPLATE_FIELD,
                    code="template_error",
                )
            # What follows the end-of-turn token (a line end) belongs to the layout, not to the answer.
            spoken |= (starts >= len(before)) & (ends <= len(after.rstrip()))
        return input_ids, spoken

    def _truncate(self, sample: Sample) -> Sample:
        limit, length = self.prompt.max_length, len(sample.input_ids)
        if length > limit:
            if self.truncation == "reject":
                raise RowRejected(f"{length} tokens, more than max_length {limit}")
            kept = slice(0, limit) if self.truncation == "right" else slice(length - limit, length)
            sample = Sample(sample.input_ids[kept], sample.labels[kept])
        if not sample.is_supervised:
            raise RowRejected(
                f"no supervised token left after truncation to {limit} tokens" if length > limit else "nothing to learn from"
            )
        return sample
