"""The preparation's verdict on a row, mostly without its tokens, is that of the tokens."""

import functools
import sys
import threading
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.train_loop.test_chat_templates import BY_NAME, made_as
from train_loop.data.formats import RowRejected
from train_loop.data.token_bounds import TokenBounds
from train_loop.data.tokenize import ChatTokenizer
from train_loop.errors import DatasetError
from train_loop.spec import Prompt

# Without a token that ends a turn; with one alone; one that refuses a conversation that isn't over; one with marks.
BARE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
ENDED = "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
REFUSES = "{% if messages | length == 3 %}{{ raise_exception('odd') }}{% endif %}" + ENDED
MARKED = (
    "{% for m in messages %}{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
)
TEMPLATES = {"own": None, "bare": BARE, "ended": ENDED, "refuses": REFUSES, "marked": MARKED}


def over_characters(prepends=True):
    """A tokenizer like Llama 2's: characters, and bytes for those it doesn't know."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz.:?|<>\n"]
    vocabulary = {token: i for i, token in enumerate([*(f"<0x{b:02X}>" for b in range(256)), *letters, "ab", "▁ab", "as", "▁as"])}
    merges = [("a", "b"), ("▁", "ab"), ("a", "s"), ("▁", "as")]
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    blanks = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blanks]) if prepends else blanks
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>")
    made.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' else ':' }}{% endfor %}"
    )
    return made


@pytest.fixture(scope="module")
def tokenizers(tokenizer):
    made = {name: made_as(BY_NAME[name], tokenizer).tokenizer for name in ("llama3", "qwen3", "phi3", "mistral")}
    composing = made_as(BY_NAME["qwen2.5"], tokenizer).tokenizer
    composing.backend_tokenizer.normalizer = normalizers.NFC()
    return made | {"tiny": tokenizer, "composing": composing, "characters": over_characters(), "gemma": over_characters(False)}


def verdict(judge, conversation):
    """Why the row is rejected, None if it isn't; or that the template is at fault."""
    try:
        judge(conversation)
    except RowRejected as error:
        return error.reason
    except DatasetError as error:
        return error.code
    return None


pieces = st.sampled_from(
    ["a", "ab ", "word ", "é", "日本", "🚢", "\n", "\n\n", " ", "<|im_end|>", "</s>", "\x06", "e\u0301", "\u2adc"]
)
texts = st.builds(
    lambda parts, times: "".join(parts) * times, st.lists(pieces, min_size=1, max_size=5), st.sampled_from([1, 1, 9, 99])
)
answers = texts.filter(str.strip)
turns = st.lists(st.tuples(texts, answers, st.booleans()), min_size=1, max_size=3)


def talk(turns, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    for asked, answered, loss in turns:
        said = {"role": "assistant", "content": answered} | ({} if loss else {"loss": False})
        messages += [{"role": "user", "content": asked}, said]
    messages[-1].pop("loss", None)
    return {"messages": messages}


conversations = st.builds(talk, turns, st.none() | texts) | st.builds(lambda text: {"text": text}, answers)
NAMES = ["tiny", "llama3", "qwen3", "phi3", "mistral", "composing", "characters", "gemma"]


@settings(max_examples=200)
@given(
    name=st.sampled_from(NAMES),
    template=st.sampled_from(list(TEMPLATES)),
    truncation=st.sampled_from(["right", "left", "reject"]),
    train_on=st.sampled_from(["assistant", "last_assistant", "all"]),
    limit=st.sampled_from([16, 32, 64, 100, 300, 1000, 4096]),
    conversation=conversations,
)
@example("tiny", "own", "right", "all", 16, {"text": "<|im_end|>"})
@example("tiny", "bare", "right", "assistant", 4096, talk([("a", "\x06", True)]))
@example("tiny", "bare", "right", "assistant", 4096, talk([("a", "\x06" * 999, True)]))
@example("tiny", "ended", "right", "assistant", 4096, talk([("\x06", "\x06", True)]))
@example("tiny", "refuses", "right", "assistant", 4096, talk([("a", "b", True)] * 3))
@example("composing", "bare", "reject", "assistant", 1000, talk([("\u2adc" * 300, "b", True)]))
@example("phi3", "own", "right", "assistant", 32, talk([("a", "b", True), ("c", "d" * 999, True)]))
def test_it_is_the_verdict_of_the_tokens(tokenizers, name, template, truncation, train_on, limit, conversation):
    chat = ChatTokenizer(tokenizers[name], Prompt(max_length=limit, template=TEMPLATES[template]), truncation, train_on)
    by_tokens, checked = verdict(chat.encode, conversation), verdict(chat.check, conversation)
    assert checked == by_tokens or (by_tokens == "template_error" and checked is None)


def words(n):
    return "tell me more about the sea " * n


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("changes", "conversation"),
    [
        ({}, talk([("Hi", "Yes", True)])),
        ({}, talk([("Hi", "Yes", True), ("And?", words(9000), True)])),
        ({"truncation": "left"}, talk([(words(9000), "No", True), (words(9000), "Yes", True)])),
        ({"truncation": "reject"}, talk([("Hi", words(30), True)])),
        ({"train_on": "last_assistant"}, talk([("Hi", "No", True), ("Hi", "Yes", True)])),
        ({"train_on": "all"}, talk([(words(9000), "Yes", True)])),
        ({}, {"text": words(9000)}),
    ],
)
def test_of_usual_rows_no_token_is_made(tokenizers, name, changes, conversation):
    chat = ChatTokenizer(tokenizers[name], Prompt(max_length=2048), **{"truncation": "right", "train_on": "assistant"} | changes)
    # Phi 3's tokens take all blanks after them, so that as long a text may be one token.
    assert chat._is_surely_usable(conversation) or name == "phi3"


@settings(max_examples=100)
@given(name=st.sampled_from(NAMES), text=texts, more=texts, cut=st.integers(0, 400))
def test_no_text_makes_more_tokens_than_its_bound(tokenizers, name, text, more, cut):
    tokenizer = tokenizers[name]
    bounds, whole = TokenBounds.of(tokenizer), (text + more)
    made = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    most = bounds.most(whole)
    assert most is None or len(made["input_ids"]) <= most
    if most is not None and (head := bounds.most(whole[:cut])) is not None:
        assert sum(end <= cut for _, end in made["offset_mapping"]) <= head
    if bounds.longest is not None:
        assert all(end - start <= bounds.longest for start, end in made["offset_mapping"])


def test_a_text_that_the_tokenizer_would_lengthen_has_no_bound(tokenizers):
    assert TokenBounds.of(tokenizers["composing"]).most("\u2adc") is None
    assert TokenBounds.of(tokenizers["composing"]).most("é") == 3


@functools.cache
def bpe(**options):
    return models.BPE({"a": 0, "b": 1}, [], **options)


@pytest.mark.parametrize(
    "backend",
    [
        SimpleNamespace(model=models.WordPiece({"a": 0}, unk_token="a")),
        SimpleNamespace(model=bpe(), pre_tokenizer=pre_tokenizers.Whitespace()),
        SimpleNamespace(model=bpe(byte_fallback=True)),
        SimpleNamespace(model=bpe(), pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        SimpleNamespace(model=bpe(), normalizer=normalizers.NFKC()),
    ],
)
def test_other_tokenizers_have_no_bounds(backend):
    made = Tokenizer(backend.model)
    for part in ("pre_tokenizer", "normalizer"):
        if hasattr(backend, part):
            setattr(made, part, getattr(backend, part))
    assert TokenBounds.of(PreTrainedTokenizerFast(tokenizer_object=made)) is None


def test_what_another_token_may_swallow_does_not_stand_alone(tokenizer):
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    made.add_tokens([AddedToken(t, normalized=False) for t in ("<a>", "<a><b>", "x<", "<c>", "dd", "<e>")])
    made.add_tokens([AddedToken(" <f>", normalized=False), AddedToken("<g>", normalized=False, lstrip=True)])
    bounds = TokenBounds.of(made)
    assert not any(bounds.stands_alone(t) for t in ("<a>", "<a><b>", "<c>", "dd", " <f>", "<g>", "<unknown>", ""))
    assert bounds.stands_alone("<|im_end|>") is False  # `x<|im_end|>` is read from its x on


@pytest.fixture
def hasty():
    """Threads take turns often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hasty")
def test_threads_may_render_marked_templates_at_once(tokenizer):
    chat = ChatTokenizer(tokenizer, Prompt(template=MARKED), "right", "assistant")
    long = talk([("Hi", words(20), True)] * 20)
    faults = []

    def encode():
        faults.extend(v for v in (verdict(chat.encode, long) for _ in range(30)) if v)

    threads = [threading.Thread(target=encode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
