"""Rows with pictures: the tokens that the model's own processor makes, cut off between pictures, laid out with what they show."""

import copy
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow.fs import LocalFileSystem
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, ProcessorMixin

from tests.train_loop.test_check import over_characters
from tests.train_loop.vision_models import FAMILIES, make
from train_loop.data.formats import RowRejected
from train_loop.data.image_tokens import ImageTokens
from train_loop.data.loader import Collator, Vision, eval_batches, step_batches
from train_loop.data.sampler import BatchPlan
from train_loop.data.shards import BYTES_PER_IMAGE, IMAGES, LAZY, PreparedDataset, ShardInfo, ShardSet, write_shard
from train_loop.data.tokenize import IGNORE_INDEX, ChatTokenizer
from train_loop.errors import DatasetError, RunFault
from train_loop.model.processor import load_processor
from train_loop.model.tokenizer import load_tokenizer
from train_loop.model.vision import Family
from train_loop.spec import Prompt

SIZES = [(40, 28), (28, 64), (33, 33), (64, 64), (100, 10)]
# Written by a user, these would have the model look for a picture: the template's placeholder, and what it becomes.
STAND_INS = {
    "idefics3": ["<image>"],
    "smolvlm": ["<image>"],
    "internvl": ["<IMG_CONTEXT>", "<video>"],
    "gemma3": ["<start_of_image>", "<image_soft_token>"],
    "llava": ["<image>"],
    "mllama": ["<|image|>"],
} | {name: ["<|image_pad|>", "<|video_pad|>"] for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")}
IMAGE = {"type": "image"}
MET = {}  # tokenizers, by processor: what they find out of it takes a while


def text(words):
    return {"type": "text", "text": words}


def user(*parts):
    return {"role": "user", "content": [text(part) if isinstance(part, str) else part for part in parts]}


def said(words, **more):
    return {"role": "assistant", "content": words, **more}


# Three pictures in two turns, between words, and a turn without any.
MESSAGES = [
    user(IMAGE, "\nWhat is ", IMAGE, " beside it?\n"),
    said("A cat."),
    {"role": "user", "content": "And now?"},
    said("Nothing new."),
    user("This one:\n", IMAGE),
    said("Two dogs."),
]
SHOWN = SIZES[:3]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    made = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in made.items():
        make(family, folder, tokenizer)
    return made


@pytest.fixture(scope="module")
def processors(folders):
    return {family: load_processor(folder, load_tokenizer(folder)) for family, folder in folders.items()}


@pytest.fixture(scope="module")
def gemma(folders, processors):
    """The processor of a family whose pictures are one tile each, and how they are laid together."""
    config = AutoConfig.from_pretrained(folders["gemma3"])
    return processors["gemma3"], Family.of(config).collate


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def chat_of(processor, truncation="right", train_on="assistant", max_length=4096, **prompt):
    """A job's tokenizer, made once: what differs only in max_length (a job's is 16 or more, and here any) is the same one."""
    met = MET.setdefault(id(processor), {})
    key = (truncation, train_on, *sorted(prompt.items()))
    if key not in met:
        images = met.setdefault("images", ImageTokens(processor))
        met[key] = ChatTokenizer(processor.tokenizer, Prompt(**prompt), truncation, train_on, images)
    object.__setattr__(met[key], "prompt", met[key].prompt.model_copy(update={"max_length": max_length}))
    return met[key]


def by_the_processor(processor, messages, sizes):
    """The tokens of the processor's own template call."""
    blank = iter([Image.new("RGB", size) for size in sizes])

    def whole(content):
        parts = [text(content)] if isinstance(content, str) else content
        return [part | {"image": next(blank)} if part["type"] == "image" else part for part in parts]

    messages = [{"role": m["role"], "content": whole(m["content"])} for m in messages]
    # The base class's: SmolVLM's own asks for a video processor.
    ids = ProcessorMixin.apply_chat_template(processor, messages, tokenize=True)
    return ids[0] if isinstance(ids[0], list) else ids


def spans_of(processor, ids, sizes):
    """Where each picture's tokens are in `ids`, looked for from the left."""
    spans, at = [], 0
    for size in sizes:
        tokens = chat_of(processor).images.expansion(*size).ids.tolist()
        at = next(i for i in range(at, len(ids)) if ids[i : i + len(tokens)] == tokens)
        spans.append((at, at + len(tokens)))
        at += len(tokens)
    return spans


@dataclass(frozen=True)
class Plain:
    """A picture of one colour."""

    width: int
    height: int
    grey: int = 0

    def open(self):
        return Image.new("RGB", (self.width, self.height), (self.grey,) * 3)


# --- the same tokens as the processor's --------------------------------------------------------------------------

words = st.sampled_from(["a", "What is this?\n", "\n", "\n\n", " ", "日本", "<", "word " * 5, "\n\n\n", "image"])
turns = st.lists(
    st.tuples(st.lists(words.map(text) | st.just(IMAGE), min_size=1, max_size=5), st.sampled_from(["Yes", "A dog.\n\nAnd."])),
    min_size=1,
    max_size=2,
)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=40)
@given(turns=turns, sizes=st.lists(st.sampled_from(SIZES), min_size=10, max_size=10), system=st.none() | words.filter(str.strip))
def test_tokens_are_those_of_the_processors_own_template_call(family, processors, turns, sizes, system):
    messages = [{"role": "system", "content": system}] if system else []
    for parts, answer in turns:
        messages += [{"role": "user", "content": parts}, said(answer)]
    shown = sizes[: sum(part is IMAGE or part == IMAGE for parts, _ in turns for part in parts)]
    sample = chat_of(processors[family]).encode({"messages": messages}, shown)
    assert sample.input_ids.tolist() == by_the_processor(processors[family], messages, shown)
    assert sample.images == tuple(range(len(shown)))


@pytest.mark.parametrize("messages", [MESSAGES, [user("Hi"), said("Yes")], [user(IMAGE), said("Yes")]])
def test_what_is_learned_is_what_the_assistant_says(family, processors, messages):
    shown = SHOWN[: sum(part == IMAGE for m in messages for part in m["content"])]
    sample = chat_of(processors[family]).encode({"messages": messages}, shown)
    learned = processors[family].tokenizer.decode(sample.input_ids[sample.labels != IGNORE_INDEX])
    for message in messages:
        for part in [text(message["content"])] if isinstance(message["content"], str) else message["content"]:
            if part["type"] == "text":
                assert (part["text"].strip() in learned) is (message["role"] == "assistant")


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen3_vl"])  # whose answers show none
@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_no_token_of_a_picture_is_learned_whoever_shows_it(family, processors, train_on):
    messages = [user("Draw, like this: ", IMAGE), {"role": "assistant", "content": [text("Look: "), IMAGE]}]
    sample = chat_of(processors[family], train_on=train_on).encode({"messages": messages}, SHOWN[:2])
    spans = spans_of(processors[family], sample.input_ids.tolist(), SHOWN[:2])
    assert all((sample.labels[start:end] == IGNORE_INDEX).all() for start, end in spans)
    outside = np.ones(len(sample.labels), bool)
    for start, end in spans:
        outside[start:end] = False
    # LLaVA's template shows pictures first, wherever they are.
    assert (sample.labels[outside] != IGNORE_INDEX).sum() >= (outside.sum() if train_on == "all" else 2)


def test_plain_rows_of_a_model_that_sees_are_those_of_the_processor(family, processors):
    messages = [{"role": "user", "content": "Hi"}, said("Yes")]
    sample = chat_of(processors[family]).encode({"messages": messages})
    assert sample.input_ids.tolist() == by_the_processor(processors[family], messages, [])
    assert sample.images == ()


@pytest.mark.parametrize("over_bytes", [True, False])
def test_a_text_begins_as_the_processor_begins_it(processors, over_bytes):
    processor = copy.copy(processors["llava"])
    if over_bytes:
        processor.tokenizer = copy.deepcopy(processor.tokenizer)
        processor.tokenizer.add_special_tokens({"bos_token": "<s>"})
    else:  # of Llama 2's kind, with a blank before what stands between two of the special tokens
        processor.tokenizer = over_characters()
        processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<s>", "<image>"]})
    processor.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    begins = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", processor.tokenizer.bos_token_id)])
    processor.tokenizer.backend_tokenizer.post_processor = begins
    asked = {"role": "user", "content": "and now?"}
    for messages, sizes in [(MESSAGES, SHOWN), ([asked, said("a bad cab.")], [])]:
        for template in (None, "{{ bos_token }}" + processor.chat_template):
            chat = ChatTokenizer(processor.tokenizer, Prompt(template=template), "right", "assistant", ImageTokens(processor))
            sample = chat.encode({"messages": messages}, sizes)
            assert sample.input_ids[0] == processor.tokenizer.bos_token_id
            if template is None:
                assert sample.input_ids.tolist() == by_the_processor(processor, messages, sizes)
            learned = sample.labels[sample.labels != IGNORE_INDEX].tolist()
            assert 0 < len(learned) < len(sample.labels) - len(sample.images) - 2


def test_what_the_model_is_given_of_a_picture_is_what_the_processor_makes(family, processors):
    processor = processors[family]
    picture = Plain(40, 28, grey=90)
    (ours,) = ImageTokens(processor).inputs([picture])
    theirs = processor(text=processor.image_token, images=[picture.open()], return_tensors="pt")
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    shared = ours.keys() & theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in shared)
    assert {name for name in theirs if name.startswith(("pixel", "image_", "aspect"))} <= shared


def test_a_size_that_the_processor_refuses_rejects_the_row(processors):
    with pytest.raises(RowRejected, match="no image of 1 x 500 pixels"):
        chat_of(processors["qwen2_vl"]).encode({"messages": [user(IMAGE), said("Yes")]}, [(1, 500)])


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (400, 2), (1, 200), (200, 1), (3000, 20)])
def test_the_smallest_and_the_longest_pictures_become_tokens(family, processors, size):
    processor = processors[family]
    sample = chat_of(processor).encode({"messages": [user(IMAGE), said("Yes")]}, [size])
    assert sample.input_ids.tolist() == by_the_processor(processor, [user(IMAGE), said("Yes")], [size])
    (tensors,) = ImageTokens(processor).inputs([Plain(*size)])
    assert tensors["pixel_values"].isfinite().all()


# --- truncation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("truncation", ["right", "left"])
@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_no_length_cuts_a_picture(family, processors, truncation, train_on):
    chat = chat_of(processors[family], truncation, train_on)
    full = chat.encode({"messages": MESSAGES}, SHOWN)
    ids, labels = full.input_ids.tolist(), full.labels.tolist()
    spans = spans_of(processors[family], ids, SHOWN)
    usable = 0
    for limit in range(1, len(ids) + 2):
        # What fits, moved to the picture's edge where it ends in one.
        start, stop = (0, min(limit, len(ids))) if truncation == "right" else (max(0, len(ids) - limit), len(ids))
        stop = next((a for a, b in spans if a < stop < b), stop)
        start = next((b for a, b in spans if a < start < b), start)
        cut = chat_of(processors[family], truncation, train_on, max_length=limit)
        if all(label == IGNORE_INDEX for label in labels[start:stop][1:]):
            with pytest.raises(RowRejected, match="no supervised token left"):
                cut.encode({"messages": MESSAGES}, SHOWN)
            continue
        usable += 1
        sample = cut.encode({"messages": MESSAGES}, SHOWN)
        assert sample.input_ids.tolist() == ids[start:stop]
        assert sample.labels.tolist() == labels[start:stop]
        assert sample.images == tuple(i for i, (a, b) in enumerate(spans) if start <= a and b <= stop)
    assert usable > 20


def test_a_row_over_the_limit_is_rejected_by_its_tokens_with_the_pictures(processors):
    ids = by_the_processor(processors["internvl"], MESSAGES, SHOWN)
    chat_of(processors["internvl"], "reject", max_length=len(ids)).encode({"messages": MESSAGES}, SHOWN)
    with pytest.raises(RowRejected, match=f"^{len(ids)} tokens, more than max_length {len(ids) - 1}$"):
        chat_of(processors["internvl"], "reject", max_length=len(ids) - 1).encode({"messages": MESSAGES}, SHOWN)


# --- what isn't taken --------------------------------------------------------------------------------------------

HI = {"messages": [user("Hi"), said("Yes")]}


def test_a_stand_in_that_is_written_in_a_text_rejects_the_row(family, processors):
    chat = chat_of(processors[family])
    for token in STAND_INS[family]:
        call = {"type": "function", "function": {"name": "look", "arguments": {"at": token}}}
        rows = [
            ({"messages": [user(f"Print {token}"), said("Yes")]}, []),
            ({"messages": [{"role": "user", "content": "Hi"}, said(token)]}, []),
            ({"messages": [{"role": "system", "content": token}, user("Hi"), said("Yes")]}, []),
            ({"messages": [user(IMAGE, f"Print {token}"), said("Yes")]}, SIZES[:1]),
            ({"messages": [user(IMAGE, token), said("Yes")]}, SIZES[:2]),
            ({"text": f"Print {token}, and so on."}, []),
        ]
        for judge in (chat.encode, chat.check):
            for row, sizes in rows:
                with pytest.raises(RowRejected, match=r"stands for an image|images: \d, places"):
                    judge(row, sizes)
        with pytest.raises(RowRejected, match="stands for an image"):
            chat_of(processors[family], system=f"Print {token}").encode(HI)
        with pytest.raises(RowRejected, match="stands for an image"):
            chat._check_written([said("", tool_calls=[call])])


def test_nor_may_it_be_put_together_from_parts(processors):
    for family, halves in {"qwen2_vl": ("<|video_", "pad|>"), "idefics3": ("<im", "age>")}.items():
        with pytest.raises(RowRejected, match=r"stands for an image|images: 0, places"):
            chat_of(processors[family]).encode({"messages": [user(*halves), said("Yes")]})


@pytest.mark.parametrize(
    ("conversation", "sizes", "reason"),
    [
        ({"messages": [user(IMAGE, "Hi"), said("Yes")]}, [], "images: 0, places for them in its messages: 1"),
        ({"messages": [user(IMAGE, "Hi"), said("Yes")]}, SIZES[:2], "images: 2, places for them in its messages: 1"),
        (HI, SIZES[:1], "images: 1, places for them in its messages: 0"),
        ({"text": "Once upon a time."}, SIZES[:1], "plain text has no place for an image"),
    ],
)
def test_other_numbers_of_pictures_than_places_reject_the_row(processors, conversation, sizes, reason):
    chat = chat_of(processors["gemma3"])
    for judge in (chat.encode, chat.check):
        with pytest.raises(RowRejected, match=reason):
            judge(conversation, sizes)


BLIND = "{% for m in messages %}{{ m.role }}\n{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
USERS_ONLY = (
    "{% for m in messages %}{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% elif m.role == 'user' %}<image>{% endif %}{% endfor %}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + USERS_ONLY


def test_a_template_that_shows_no_picture_is_at_fault(processors):
    chat = chat_of(processors["idefics3"], template=BLIND)
    assert chat.encode({"messages": [{"role": "user", "content": "Hi"}, said("Yes")]}).is_supervised
    with pytest.raises(DatasetError, match="leaves out images") as raised:
        chat.encode({"messages": [user(IMAGE), said("Yes")]}, SIZES[:1])
    assert raised.value.field == "dataset_config.preprocessing.prompt.template"


def test_a_picture_that_the_template_leaves_out_rejects_its_row(processors):
    row = {"messages": [user("Draw"), {"role": "assistant", "content": [text("Here"), IMAGE]}]}
    with pytest.raises(RowRejected, match="images: 1, places for them in what the chat template makes of it: 0"):
        chat_of(processors["idefics3"], template=USERS_ONLY).encode(row, SIZES[:1])
    with pytest.raises(RowRejected, match="images: 1, places for them in what the chat template makes of it: 0"):
        chat_of(processors["qwen3_vl"]).encode(row, SIZES[:1])


def test_a_system_message_that_the_template_does_not_take_opens_the_first_turn(processors):
    processor = processors["idefics3"]
    chat = chat_of(processor, template=NO_SYSTEM, system="Be brief.")
    for content, expected in [
        ("Hi", "user\nBe brief.\n\nHi\nassistant\nYes\n"),
        ([text("Hi "), IMAGE], "user\nBe brief.\n\nHi <image>\nassistant\nYes\n"),
        ([IMAGE, text("Hi")], "user\nBe brief.\n\n<image>Hi\nassistant\nYes\n"),
    ]:
        shown = SIZES[:1] if isinstance(content, list) else []
        sample = chat.encode({"messages": [{"role": "user", "content": content}, said("Yes")]}, shown)
        ids = sample.input_ids.tolist()
        for start, end in spans_of(processor, ids, shown):
            ids[start:end] = [processor.image_token_id]
        assert processor.tokenizer.decode(ids) == expected


# --- judged without tokens ---------------------------------------------------------------------------------------


def verdict(judge, *row):
    try:
        judge(*row)
    except RowRejected as error:
        return error.reason
    except DatasetError as error:
        return error.code
    return None


pieces = st.sampled_from(["a", "word " * 9, "\n", "<image>", "<|im_end|>", "日本"])


@settings(max_examples=150)
@given(
    name=st.sampled_from(["idefics3", "qwen2_vl", "gemma3", "llava"]),
    truncation=st.sampled_from(["right", "left", "reject"]),
    train_on=st.sampled_from(["assistant", "last_assistant", "all"]),
    limit=st.sampled_from([16, 32, 64, 100, 4096]),
    turns=st.lists(
        st.tuples(st.lists(pieces.map(text) | st.just(IMAGE), max_size=4), pieces, st.booleans()), min_size=1, max_size=3
    ),
    num_sizes=st.sampled_from([0, 0, 1, 2, None]),
)
def test_the_verdict_of_the_preparation_is_that_of_the_tokens(processors, name, truncation, train_on, limit, turns, num_sizes):
    messages = []
    for parts, answer, plain in turns:
        spoken = "".join(part.get("text", "") for part in parts)
        messages += [{"role": "user", "content": spoken if plain else [*parts, text("?")]}, said(answer)]
    places = sum(part == IMAGE for parts, _, plain in turns if not plain for part in parts)
    sizes = [SIZES[i % len(SIZES)] for i in range(places if num_sizes is None else num_sizes)]
    chat = chat_of(processors[name], truncation, train_on, max_length=limit)
    row = {"messages": messages}
    assert verdict(chat.check, row, sizes) == verdict(chat.encode, row, sizes)


# --- batches -----------------------------------------------------------------------------------------------------

LIMIT = 100


class Rows:
    """Rows with pictures, each of one grey: row r has r % 3 of them, from 7 r on."""

    streamed = False

    def __init__(self, count, chat=None):
        self.count, self.chat = count, chat

    def pictures(self, row):
        shown = [Plain(*SIZES[(row + i) % len(SIZES)], grey=7 * row + i) for i in range(row % 3)]
        return shown if self.chat is None else [shown[i] for i in self._whole(row).images]

    def conversation(self, row):
        parts = [part for i in range(row % 3) for part in (IMAGE, f"is picture {7 * row + i}. ")]
        return {"messages": [user(*parts, f"Of row {row}, " + "and so on " * (row % 5)), said(f"It is {row}.")]}

    def _whole(self, row):
        shown = [SIZES[(row + i) % len(SIZES)] for i in range(row % 3)]
        return self.chat.encode(self.conversation(row), shown)

    def sample(self, row):
        sample = self._whole(row)
        return replace(sample, images=tuple(range(len(sample.images))))

    def sizes(self, ids):
        return np.array([10 + 40 * (row % 3) for row in ids])


def greys(vision, processor):
    """Which picture each tile was."""
    if not vision:
        return []
    mean, std = processor.image_processor.image_mean[0], processor.image_processor.image_std[0]
    return [round(float(tile.mean() * std + mean) * 255) for tile in vision["pixel_values"]]


def documents(batch):
    """The token lists of a micro-batch's documents, in order."""
    found = []
    for r, (ids, positions) in enumerate(zip(batch.input_ids, batch.position_ids, strict=True)):
        end = len(ids) if batch.attention_mask is None else int(batch.attention_mask[r].sum())
        starts = [i for i in range(end) if positions[i] == 0]
        found += [ids[a:b].tolist() for a, b in zip(starts, [*starts[1:], end], strict=True)]
    return [document for document in found if len(set(document)) > 1]  # the rest is padding


def collator_of(gemma, packing, *, lazy=True, max_length=LIMIT):
    processor, collate = gemma
    chat = chat_of(processor, max_length=max_length)
    vision = Vision(chat.images, collate)
    capacity = max_length if packing else None
    return Collator(chat if lazy else None, max_length, capacity, processor.tokenizer.pad_token_id, vision), chat


def told(document, processor):
    """The pictures that a document shows, by what it says of each."""
    shown = processor.tokenizer.decode(document).split(processor.tokenizer.boi_token)[1:]
    return [int(words.split("is picture ")[1].split(".")[0]) for words in shown]


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("packing", [True, False])
def test_a_micro_batch_has_the_pictures_of_its_documents_in_their_order(gemma, packing, lazy):
    processor, _ = gemma
    collator, chat = collator_of(gemma, packing, lazy=lazy)
    batch = collator.micro_batch(Rows(12, None if lazy else chat), range(12))
    assert (len(batch.input_ids) < 12) is packing
    shown = [told(document, processor) for document in documents(batch)]
    assert sum(map(len, shown)) == 12
    assert greys(batch.vision, processor) == [picture for of_one in shown for picture in of_one]
    moved = batch.to(torch.device("meta"))
    assert moved.vision["pixel_values"].device.type == "meta"


def test_pictures_that_are_cut_off_are_not_laid_out(gemma):
    processor, _ = gemma
    for lazy in (True, False):
        collator, chat = collator_of(gemma, packing=False, lazy=lazy, max_length=38)
        chat = replace(chat, truncation="left")
        collator = replace(collator, tokenizer=chat if lazy else None)
        batch = collator.micro_batch(Rows(12, None if lazy else chat), [2, 5, 3])
        shown = [told(document, processor) for document in documents(batch)]
        assert greys(batch.vision, processor) == [picture for of_one in shown for picture in of_one]
        assert shown == [[15], [36], []]


def test_rows_without_pictures_have_none(gemma):
    collator, _ = collator_of(gemma, packing=True)
    assert collator.micro_batch(Rows(12), [0, 3, 6]).vision == {}


def test_the_same_rows_and_pictures_make_a_step_whatever_the_number_of_workers(gemma):
    processor, _ = gemma
    collator, _ = collator_of(gemma, packing=True)
    rows, ids = Rows(18), np.arange(18)
    plan = BatchPlan(18, 3, 2, 1, 1.0, None, 0)

    def steps(world_size):
        made = [Counter() for _ in range(plan.total_steps)]
        for rank in range(world_size):
            for step, batches in step_batches(rows, ids, plan, rank, world_size, collator, num_workers=0, start_step=1):
                for batch in batches:
                    tiles = iter(greys(batch.vision, processor))
                    for document in documents(batch):
                        shown = told(document, processor)
                        assert [next(tiles) for _ in shown] == shown
                        made[step - 1][tuple(document)] += 1
                    assert next(tiles, None) is None
        return made

    assert sum(sum(step.values()) for step in steps(1)) == 18
    assert steps(1) == steps(2) == steps(3)


def test_evaluation_sees_every_picture_once(gemma):
    processor, _ = gemma
    collator, _ = collator_of(gemma, packing=False)
    seen = []
    for rank in range(2):
        for batch in eval_batches(Rows(12), np.arange(12), rank, 2, 4, collator):
            seen += greys(batch.vision, processor) if batch is not None else []
    assert sorted(seen) == sorted(7 * row + i for row in range(12) for i in range(row % 3))


def test_a_row_that_was_usable_and_now_is_not_names_its_line(gemma):
    class Changed(Rows):
        def pictures(self, row):
            return []

        def source(self, row):
            return "s3://b/rows.zip", row + 1

    collator, _ = collator_of(gemma, packing=False)
    with pytest.raises(RunFault, match=r"line 3 of s3://b/rows\.zip was found usable"):
        collator.micro_batch(Changed(12), [2])


def test_a_tokenizer_without_a_processor_makes_what_it_made(processors, tokenizer):
    seeing = chat_of(processors["qwen2_vl"])
    plain = replace(seeing, images=None)
    row = {"messages": [{"role": "user", "content": "Hi"}, said("Yes")]}
    assert plain.encode(copy.deepcopy(row)).input_ids.tolist() == seeing.encode(row).input_ids.tolist()


def test_rows_with_pictures_are_dealt_out_as_longer_ones(tmp_path):
    line = {"file": 0, "offset": 0, "u": 0.0, "conversation": "{}"}
    rows = [line | {"line": 1, "images": []}, line | {"line": 2, "images": [0, 1]}]
    write_shard(LocalFileSystem(), str(tmp_path / "shard.arrow"), pa.Table.from_pylist(rows, LAZY.append(IMAGES)))
    prepared = PreparedDataset("", [ShardInfo("shard.arrow", 2)], [1.0], {"train": 2}, 2, 2, 0, "", [], False, [], 0)
    plain, shown = ShardSet(prepared, tmp_path).sizes(np.arange(2))
    assert shown - plain == 2 * BYTES_PER_IMAGE
