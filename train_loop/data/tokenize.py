"""A conversation becomes tokens and labels through the model's chat template.

Labels are IGNORE_INDEX except on what the assistant says, its end-of-turn token included: that is how the model learns to stop.
Which characters those are comes from the template's own `{% generation %}` marks where it has them, else from rendering the
conversation turn by turn and comparing: a turn is what follows the prompt that inference would render for it. A template that
shows a turn otherwise once later ones follow (Qwen 3 takes the thinking out) gives no such text, and the turn carries no loss.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
from jinja2 import TemplateError

from train_loop.data.bounds import MAX_RENDER_S, Stalled
from train_loop.data.formats import Conversation, Message, RowRejected, each
from train_loop.data.image_tokens import Expansion, ImageTokens, Span, whole_pictures
from train_loop.data.pieces import Pieces, Tokens
from train_loop.data.rendering import Flood, Refused, Rendered, render
from train_loop.data.token_bounds import TokenBounds
from train_loop.errors import DatasetError
from train_loop.spec import JobSpec, Prompt

IGNORE_INDEX = -100
TEMPLATE_FIELD = "dataset_config.preprocessing.prompt.template"
GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
MAX_REASON_CHARS = 200  # of a template's own words
_NOWHERE = np.empty(0, np.int64)
Sizes: TypeAlias = Sequence[tuple[int, int]]  # (width, height) of pictures
PROBE = {"system": "Be of help.", "user": "Ask.", "assistant": "Fine."}


@dataclass(frozen=True)
class Sample:
    """One document: `input_ids [n]` and `labels [n]`, int32, labels not shifted; `images`: which of the row's are in it."""

    input_ids: np.ndarray
    labels: np.ndarray
    images: tuple[int, ...] = ()

    @property
    def is_supervised(self) -> bool:
        """Whether any token is predicted; the first one never is."""
        return bool((self.labels[1:] != IGNORE_INDEX).any())


@dataclass(frozen=True)
class _Told:
    """A conversation's text; `wanted` says of each assistant turn whether it carries loss. Plain text has no messages."""

    rendered: Rendered
    messages: Sequence[Message] = ()
    tools: Sequence[Any] | None = None
    wanted: Sequence[bool] = ()
    is_marked: bool = False  # by the template, what the assistant says


@dataclass(frozen=True)
class _Tokenised:
    """Its tokens, and where in them each picture's are."""

    told: _Told
    tokens: Tokens
    pictures: list[Span]


@dataclass(frozen=True)
class ChatTokenizer:
    """Encodes conversations of one job. Picklable."""

    tokenizer: Any
    prompt: Prompt
    truncation: Literal["right", "left", "reject"]
    train_on: Literal["assistant", "last_assistant", "all"]
    images: ImageTokens | None = None  # of a model that is to see pictures

    @classmethod
    def of(cls, spec: JobSpec, tokenizer: Any, images: ImageTokens | None = None) -> ChatTokenizer:
        """The job's tokenizer with the job's settings."""
        pre = spec.dataset_config.preprocessing
        return cls(tokenizer, pre.prompt, pre.truncation, pre.train_on, images)

    def encode(self, conversation: Conversation, sizes: Sizes = ()) -> Sample:
        """Tokenise, label, truncate to prompt.max_length. `sizes` are its pictures' (width, height), in order.

        Raises RowRejected for this row, DatasetError when the template itself is at fault.
        """
        (made,) = self.encode_each([(conversation, sizes)])
        if isinstance(made, RowRejected):
            raise made
        return made

    def encode_each(self, rows: Iterable[tuple[Conversation, Sizes] | RowRejected]) -> list[Sample | RowRejected]:
        """The same of several, with what is wrong with a row in its place.

        A step is done for all of them before the next one, so that what it needs stays in the processor's caches.
        """
        return each(self._labelled, self._tokenised_each(each(self._told, rows)))

    def _told(self, row: tuple[Conversation, Sizes]) -> _Told:
        """What the template makes of a conversation; plain text as it is."""
        conversation, sizes = row
        if "text" in conversation:
            text = conversation["text"]
            if sizes:
                raise RowRejected("plain text has no place for an image")
            self._check_written(text)
            return _Told(Rendered(text, [], []))
        messages, tools, wanted = self._talk(conversation, sizes)
        return _Told(self._render(messages, tools), messages, tools, wanted, self._is_marked(tools))

    def _tokenised_each(self, rows: list[_Told | RowRejected]) -> list[_Tokenised | RowRejected]:
        chats = [told for told in rows if isinstance(told, _Told) and told.messages]
        tokens = iter(self._text_tokens(chats))

        def tokenised(told: _Told) -> _Tokenised:
            if not told.messages:
                return _Tokenised(told, self._document(told.rendered.text), [])
            return _Tokenised(told, *self._with_pictures(told, next(tokens)))

        return each(tokenised, rows)

    def _labelled(self, row: _Tokenised) -> Sample:
        input_ids = labels = row.tokens[0]
        if row.told.messages:
            spoken = self._by_marks(row) if row.told.is_marked else self._by_prefixes(row)
            labels = np.where(spoken, input_ids, np.int32(IGNORE_INDEX))
            for start, end in row.pictures:
                labels[start:end] = IGNORE_INDEX
        return self._truncate(input_ids, labels, row.pictures)

    def check(self, conversation: Conversation, sizes: Sizes = ()) -> None:
        """Raise RowRejected exactly where `encode` would; tokens are made only where the text doesn't show the verdict.

        Raises DatasetError, too; of a template that is at fault with some rows it may leave that to `encode`.
        """
        if sizes or not self._is_surely_usable(conversation):
            self.encode(conversation, sizes)

    def _is_surely_usable(self, conversation: Conversation) -> bool:
        """Whether a text that the template renders is known to have a token to learn, without making its tokens."""
        bounds = self._bounds
        if bounds is None or self._front.size:
            return False
        if "text" in conversation:
            text = conversation["text"]
            self._check_written(text)
            return self._fits(text, self.tokenizer.num_special_tokens_to_add() + 1) and self._is_of_two(text)
        messages, tools, wanted = self._talk(conversation, ())
        everything, marked = self.train_on == "all", self._is_marked(tools)
        rendered = self._render(messages, tools)
        text = rendered.text
        if not self._fits(text) or ((everything or marked) and not all(wanted)):
            return False
        if everything:
            return self._is_of_two(text)
        if marked:
            return any(self._keeps_a_token(text, *span, self.tokenizer.eos_token or "") for span in rendered.generated)
        turns = [i for i, w in zip(_of_assistant(messages), wanted, strict=True) if w]
        # The last one, as `encode` does; it may be cut off, and the first one not.
        for i in dict.fromkeys([turns[-1], turns[0]]):
            if (span := self._span(rendered, messages, i, tools)) and self._keeps_a_token(text, *span, self._frame[1]):
                return True
        return False

    @cached_property
    def _bounds(self) -> TokenBounds | None:
        return TokenBounds.of(self.tokenizer)

    def _fits(self, text: str, more: int = 0) -> bool:
        """Whether the text's length is surely no reason to reject it."""
        assert self._bounds is not None
        most = self._bounds.most(text)
        return most is not None and (self.truncation != "reject" or most + more <= self.prompt.max_length)

    def _is_of_two(self, text: str) -> bool:
        """Whether the text surely makes two tokens: one that is predicted."""
        assert self._bounds is not None
        longest = self._bounds.longest
        return longest is not None and len(text) > longest and self._bounds.covers(text[: longest + 1])

    def _keeps_a_token(self, text: str, start: int, end: int, mark: str) -> bool:
        """Whether a whole token of text[start:end], and not the text's first one, is surely left after truncation.

        `mark` is what ends a turn.
        """
        bounds, left = self._bounds, self.truncation == "left"
        assert bounds is not None

        def is_kept(start: int, end: int) -> bool:
            most = bounds.most(text[start:] if left else text[:end])
            return most is not None and most <= self.prompt.max_length

        if bounds.stands_alone(mark) and text.endswith(mark, start, end) and bounds.covers(text[:1]):
            begins = end - len(mark)
            if begins > 0 and is_kept(begins, end):
                return True
        if bounds.longest is None or end - start < 3 * bounds.longest:
            return False
        # In so many characters there are two whole tokens, of which the second isn't the text's first.
        start, end = (end - 3 * bounds.longest, end) if left else (start, start + 3 * bounds.longest)
        return bounds.covers(text[start:end]) and is_kept(start, end)

    def _talk(self, conversation: Conversation, sizes: Sizes) -> tuple[list[Message], Sequence[Any] | None, list[bool]]:
        """The messages as the template gets them, the tools, and of each assistant turn whether it carries loss."""
        messages, tools = self._sized(self.with_system(conversation["messages"]), sizes), conversation.get("tools")
        self._check_tools(messages, tools)
        self._check_written(messages, tools)
        wanted = [messages[i].get("loss", True) for i in _of_assistant(messages)]
        if self.train_on == "last_assistant":
            wanted[:-1] = [False] * (len(wanted) - 1)
        return [{k: v for k, v in m.items() if k != "loss"} for m in messages], tools, wanted

    def _is_marked(self, tools: Sequence[Any] | None) -> bool:
        return self.train_on != "all" and bool(GENERATION_MARK.search(self._template(tools)))

    def _document(self, text: str) -> Tokens:
        """Plain text as the model was pre-trained on: its own beginning, its end-of-sequence token. Where they are isn't told."""
        ids: list[int] = self.tokenizer(text)["input_ids"]
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            del ids[0]
        if eos is not None and ids[-1:] != [eos]:
            ids.append(eos)
        return np.array(ids, dtype=np.int32), _NOWHERE, _NOWHERE

    # --- rendering ---

    def _template(self, tools: Sequence[Any] | None) -> str:
        if self.prompt.template is not None:
            return self.prompt.template
        if self.images is not None and self.images.template is not None:
            return self.images.template
        try:
            template: str = self.tokenizer.get_chat_template(tools=tools)
        except ValueError:
            raise DatasetError(
                "the base model has no chat template of its own: give prompt.template one, or rows of dataset_format text.",
                field=TEMPLATE_FIELD,
                code="no_chat_template",
            ) from None
        return template

    @cached_property
    def _names(self) -> dict[str, str]:
        return dict(self.tokenizer.special_tokens_map)

    def _render(self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, prompt: bool = False) -> Rendered:
        """What the tokenizer's apply_chat_template renders, or the processor's but for the tokens of pictures.

        Raises RowRejected where the template refuses these messages.
        """
        if self.images is None:
            return self._rendered(messages, tools, prompt=prompt)
        if not self._takes_text:
            messages = [m | {"content": _parts(m["content"])} for m in messages]
        return self.images.with_text(self._rendered(messages, tools, prompt=prompt), self._shown(messages))

    def _rendered(self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, prompt: bool = False) -> Rendered:
        template = self._template(tools)
        try:
            return render(template, messages, tools, self._names, prompt=prompt)
        except Flood:
            raise _at_fault("the chat template makes too much text of a short row") from None
        except Stalled:
            raise _at_fault(f"the chat template isn't done with a row after {MAX_RENDER_S:g} s") from None
        except MemoryError:
            raise _at_fault("the chat template takes more memory for a row than there is for it") from None
        except Refused as error:
            raise _at_fault(f"the chat template can't be used: {error}") from None
        except Exception as error:  # a template is a program of someone else's: whatever goes wrong in it is its fault
            if type(error) is TemplateError:  # its own raise_exception
                raise RowRejected(f"the chat template refuses it: {str(error)[:MAX_REASON_CHARS]}") from error
            what = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
            raise _at_fault(f"the chat template can't render a row: {what}") from error

    def _probe(self, *roles: str, prompt: bool = False) -> str:
        """A rendered conversation of known words; empty where the template refuses it."""
        try:
            return self._render([{"role": role, "content": PROBE[role]} for role in roles], prompt=prompt).text
        except RowRejected:
            return ""

    @cached_property
    def _takes_text(self) -> bool:
        """Whether the template shows what is said in plain text, and not in parts only, as that of SmolVLM."""
        said = [{"role": role, "content": PROBE[role]} for role in ("user", "assistant")]
        try:
            return all(m["content"] in self._rendered(said).text for m in said)
        except (RowRejected, DatasetError):
            return False

    @cached_property
    def _takes_pictures(self) -> bool:
        """Whether the template shows a picture."""
        assert self.images is not None
        asked = [{"type": "image"}, {"type": "text", "text": PROBE["user"]}]
        said = [{"role": "user", "content": asked}, {"role": "assistant", "content": _parts(PROBE["assistant"])}]
        return self._rendered(said).text.count(self.images.placeholder) == 1

    @cached_property
    def _takes_system(self) -> bool:
        return PROBE["system"] in self._probe("system", "user", "assistant")

    @cached_property
    def _frame(self) -> tuple[str, str, str]:
        """What a template puts around answers: before the last one only, in its turn (Qwen 3's empty thinking); the end-of-turn
        token; after that one, of the last only (a line end, Phi 3's end of sequence)."""
        opening, prompt = self._probe("user", "assistant"), self._probe("user", prompt=True)
        if opening and PROBE["assistant"] not in opening:  # such as a vision model's, which looks for parts
            raise _at_fault(
                "the chat template leaves out what the assistant says in plain text", "give prompt.template one that shows it"
            )
        head = opening.removeprefix(prompt).partition(PROBE["assistant"])[0] if opening.startswith(prompt) else ""
        last = opening.partition(PROBE["assistant"])[2]
        inner = self._probe("user", "assistant", "user").partition(PROBE["assistant"])[2]
        differ = (at for at, (a, b) in enumerate(zip(last, inner, strict=False)) if a != b)
        common = next(differ, min(len(last), len(inner)))
        # In whole tokens: `<|end|>\n` is common to `<|end|>\n<|endoftext|>` and `<|end|>\n<|user|>`.
        edges = self.tokenizer(last, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        end = last[: max((end for _, end in edges if end <= common), default=0)].rstrip() or last.rstrip()
        return head, end, last[len(end) :]

    @cached_property
    def _opening(self) -> str | None:
        """What a template that takes message after message puts after the last one, of a prompt."""
        try:
            probe = self._render([{"role": "user", "content": PROBE["user"]}], prompt=True)
        except RowRejected:
            return None
        return probe.text[probe.begins[-1] :] if probe.begins else None

    def with_system(self, messages: list[Message]) -> list[Message]:
        """With prompt.system where there is none; where the template takes none, it opens the first user turn."""
        if self.prompt.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.prompt.system}, *messages]
        if messages[0]["role"] != "system" or self._takes_system:
            return messages
        system, user, *rest = messages
        return [user | {"content": _joined(system["content"], user["content"])}, *rest]

    def _sized(self, messages: list[Message], sizes: Sizes) -> list[Message]:
        """With its size in the part of each picture."""
        places = sum(len(_pictures(m)) for m in messages)
        if places != len(sizes):
            raise RowRejected(f"images: {len(sizes)}, places for them in its messages: {places}")
        if not places:
            return messages
        if not self._takes_pictures:
            raise _at_fault("the chat template leaves out images", "give prompt.template one that shows them, or leave it null")
        rest = iter(sizes)

        def sized(part: dict[str, Any]) -> dict[str, Any]:
            return part | dict(zip(("width", "height"), next(rest), strict=True)) if part["type"] == "image" else part

        return [m | {"content": [sized(part) for part in m["content"]]} if _pictures(m) else m for m in messages]

    def _shown(self, messages: Sequence[Message]) -> list[Expansion]:
        """What stands for each of the messages' pictures. Raises RowRejected."""
        if self.images is None:
            return []
        return [self.images.expansion(part["width"], part["height"]) for m in messages for part in _pictures(m)]

    def _check_written(self, *said: Any) -> None:
        """Raise RowRejected where what is said has the token of a picture in it."""
        if self.images is not None:
            self.images.check_written(json.dumps(said, ensure_ascii=False))

    def _check_tools(self, messages: list[Message], tools: Sequence[Any] | None) -> None:
        template = self._template(tools)
        called = any(m.get("tool_calls") for m in messages)
        if (tools and not re.search(r"\btools\b", template)) or (called and "tool_calls" not in template):
            raise DatasetError(
                "rows have tools, which the chat template doesn't render: name a base model whose template does, or give "
                "prompt.template one.",
                field=TEMPLATE_FIELD,
                code="tools_not_rendered",
            )

    # --- which tokens are trained on ---

    def _with_pictures(self, told: _Told, tokens: Tokens) -> tuple[Tokens, list[Span]]:
        """The tokens of its text with those of its pictures, and where in them each picture's are."""
        if self.images is None:
            return tokens, []
        input_ids, starts, ends = tokens
        if self._front.size and not told.rendered.text.startswith(self.tokenizer.bos_token):
            input_ids, starts, ends = np.append(self._front, input_ids), np.append(0, starts), np.append(0, ends)
        return self.images.expanded((input_ids, starts, ends), self._shown(told.messages))

    @cached_property
    def _front(self) -> np.ndarray:
        """What a processor, unlike a tokenizer, puts before a rendered text without it: the token of a text's beginning."""
        bos = self.tokenizer.bos_token_id if self.images is not None else None
        begins = bos is not None and self.tokenizer("")["input_ids"][:1] == [bos]
        return np.array([bos] if begins else [], dtype=np.int32)

    def _text_tokens(self, chats: Sequence[_Told]) -> list[Tokens]:
        """The tokens of each conversation's text, and where in it each starts and ends; some that are cut off may be missing."""
        texts = [told.rendered.text for told in chats]
        if self._pieces is None:
            return [self._encoded(text) for text in texts]
        enough = self.prompt.max_length + 1 if self.truncation == "right" else None
        return self._pieces.tokens_each(texts, [None if t.is_marked and not all(t.wanted) else enough for t in chats])

    def _encoded(self, text: str) -> Tokens:
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        input_ids = np.array(out["input_ids"], dtype=np.int32)
        starts, ends = np.array(out["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
        for i in np.flatnonzero(np.isin(input_ids, self._taking_blanks)):
            ends[i] = starts[i] + len(text[starts[i] : ends[i]].rstrip())
        return input_ids, starts, ends

    @cached_property
    def _pieces(self) -> Pieces | None:
        return Pieces.of(self.tokenizer, self._bounds)

    @cached_property
    def _taking_blanks(self) -> list[int]:
        """Tokens that take the blanks after them, such as Phi 3's <|end|>: the next line's beginning isn't part of the turn."""
        return [i for i, token in self.tokenizer.added_tokens_decoder.items() if token.rstrip]

    @cached_property
    def _special(self) -> set[int]:
        return set(self.tokenizer.all_special_ids)

    def _by_marks(self, row: _Tokenised) -> np.ndarray:
        """Of each token, whether it is trained on."""
        rendered, wanted, (input_ids, starts, ends) = row.told.rendered, row.told.wanted, row.tokens
        spoken = np.zeros(len(input_ids), dtype=bool)
        for start, end in rendered.generated:
            spoken[np.searchsorted(ends, start, side="right") : np.searchsorted(starts, end)] = True
        if not all(wanted):
            edges = np.flatnonzero(np.diff(spoken.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
            if len(edges) != len(wanted):
                raise RowRejected(
                    f"{len(wanted)} assistant turns, {len(edges)} pieces between the template's {{% generation %}} marks: "
                    "which to train on can't be told"
                )
            for (start, end), keep in zip(edges, wanted, strict=True):
                spoken[start:end] = keep
        return spoken

    def _by_prefixes(self, row: _Tokenised) -> np.ndarray:
        """The same by comparing; raises RowRejected where truncation does."""
        told, (input_ids, starts, ends) = row.told, row.tokens
        messages, rendered = told.messages, told.rendered
        text = rendered.text
        everything = self.train_on == "all"  # then turns of weight 0 are taken out
        spoken = np.full(len(input_ids), everything)
        kept = self._kept(len(input_ids), row.pictures)
        low, high = starts[kept].min(initial=len(text)), ends[kept].max(initial=0)
        turns = [(i, w) for i, w in zip(_of_assistant(messages), told.wanted, strict=True) if w is not everything]
        in_order = turns if self.truncation == "right" else turns[::-1]
        # The last one first, whether it is cut off or not: there a template shows that it can't be used.
        for i, is_wanted in sorted(in_order, key=lambda turn: turn != turns[-1]):
            if (span := self._span(rendered, messages, i, told.tools)) is not None:
                first, behind = starts.searchsorted(span[0]), ends.searchsorted(span[1], side="right")
                # Where nothing ends a turn, the next one's beginning is what the model says to stop.
                behind += not self._frame[1] and behind < len(input_ids) and input_ids[behind] in self._special
                spoken[first:behind] = is_wanted
                if i != turns[-1][0] and (span[1] >= high if self.truncation == "right" else span[0] <= low):
                    break  # the turns from here on are cut off
        return spoken

    def _span(self, whole: Rendered, messages: Sequence[Message], i: int, tools: Sequence[Any] | None) -> tuple[int, int] | None:
        """Where in the `whole` text the assistant's turn `i` is, from the end of its prompt to the end of its turn.

        None where the template shows it otherwise than it was said. Raises DatasetError if it does so with the last one.
        """
        head, end, layout = self._frame
        is_last = i == len(messages) - 1
        text, begins = whole.text, whole.begins
        try:
            if begins and i > 0 and tools is None and (opening := self._opening) is not None:
                before, turn = text[: begins[i]] + opening, text[: begins[i + 1]] + text[begins[-1] :]
            else:
                before = self._render(messages[:i], tools, prompt=True).text
                turn = text if is_last else self._render(messages[: i + 1], tools).text
        except RowRejected:  # of a conversation that isn't over yet, as this template sees it
            if is_last:
                raise
            return None
        if text.startswith(before) and turn.startswith(before):
            said = turn.removesuffix(layout).rstrip()[len(before) :]
            # What later turns may take away: thinking before an answer, a mark after it that only the last one has (gpt-oss).
            for shown in (said, said.removeprefix(head), said if is_last else said.removesuffix(end)):
                if shown and text.startswith(shown, len(before)):
                    return len(before), len(before) + len(shown)
        if is_last:
            raise _at_fault(
                "the chat template rewrites earlier turns, or shows an answer otherwise than after its own prompt, so the "
                "assistant's tokens can't be told apart",
                "give prompt.template one with {% generation %} marks",
            )
        return None

    def _kept(self, length: int, pictures: Sequence[Span]) -> slice:
        """Which tokens of a sample truncation keeps. Raises RowRejected."""
        limit = self.prompt.max_length
        if length > limit and self.truncation == "reject":
            raise RowRejected(f"{length} tokens, more than max_length {limit}")
        kept = slice(0, min(limit, length)) if self.truncation == "right" else slice(max(0, length - limit), length)
        return whole_pictures(kept, pictures)

    def _truncate(self, input_ids: np.ndarray, labels: np.ndarray, pictures: Sequence[Span]) -> Sample:
        limit, length = self.prompt.max_length, len(input_ids)
        kept = self._kept(length, pictures)
        left = tuple(i for i, (start, end) in enumerate(pictures) if kept.start <= start and end <= kept.stop)
        sample = Sample(input_ids[kept], labels[kept], left)
        if not sample.is_supervised:
            raise RowRejected(
                f"no supervised token left after truncation to {limit} tokens" if length > limit else "nothing to learn from"
            )
        return sample


def _at_fault(what: str, mend: str = "correct prompt.template, or leave it null") -> DatasetError:
    return DatasetError(f"{what}: {mend}.", field=TEMPLATE_FIELD, code="template_error")


def _of_assistant(messages: Sequence[Message]) -> list[int]:
    return [i for i, m in enumerate(messages) if m["role"] == "assistant"]


def _parts(content: Any) -> Any:
    """What a message says, in parts."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _joined(first: Any, second: Any) -> Any:
    """What two messages say, as one."""
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n\n{second}"
    joined: list[dict[str, Any]] = []
    for part in [*_parts(first), *_parts("\n\n"), *_parts(second)]:
        if joined and joined[-1]["type"] == part["type"] == "text":
            joined[-1] = {"type": "text", "text": joined[-1]["text"] + part["text"]}
        else:
            joined.append(part)
    return joined


def _pictures(message: Message) -> list[dict[str, Any]]:
    """The parts that are pictures."""
    content = message["content"]
    return [part for part in content if part["type"] == "image"] if isinstance(content, list) else []
