"""Tokens made piece by piece are those of the text."""

import pickle
import threading
from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from train_loop.data import pieces
from train_loop.data.pieces import Pieces
from train_loop.data.token_bounds import TokenBounds
from train_loop.data.words import PATTERNS

TEXT = "You're right:\n\n  it's 3.14 (or 22/7), isn't it? <|im_end|>\n<|im_start|>assistant\nNo.\r\nx = [1, 2]\t# done "

words = [
    "word",
    " word",
    "Über",
    "é",
    "e\u0301",
    "\u0301",
    "日本",
    "🚢",
    "1",
    "2345",
    "½",
    "'s",
    "'RE",
    "'\u017f",
    "_",
    "//",
    "(a",
]
marks = ["<|im_end|>", "<|im_", "end|>", "<|endoftext|>"]
parts = st.sampled_from([*words, *marks, *' \n\r\t.,"*/)(a5\x00\x0b\x1c\x85\u2003', "  ", "\r\n"])
texts = st.lists(parts | st.text(max_size=3), max_size=30).map("".join)


def variant(tokenizer, change):
    """The tokenizer with its backend changed."""
    made = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    change(made)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>")


def pieces_of(tokenizer):
    return Pieces.of(tokenizer, TokenBounds.of(tokenizer))


def split_by(pattern, behavior="isolated"):
    def change(backend):
        over_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior), over_bytes])

    return change


def composing(backend):
    backend.normalizer = normalizers.NFC()


def digits(individual):
    def change(backend):
        over_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=individual), over_bytes])

    return change


def added(backend):
    backend.add_tokens([AddedToken("word", normalized=False), AddedToken("_", normalized=True), AddedToken("<|im_end|>_")])


def added_where_words_end(backend):
    backend.add_tokens(["a5", "5a", ".b", "((c", "*/", "  ", "\n\n", "\n"])


@pytest.fixture(scope="module")
def cut_up(tokenizer):
    """Tokenizers of every kind that is cut up, with their pieces."""
    changes = [
        lambda backend: None,
        composing,
        digits(True),
        digits(False),
        added,
        added_where_words_end,
        *map(split_by, sorted(PATTERNS)),
    ]
    made = [variant(tokenizer, change) for change in changes]
    return [(each, pieces_of(each)) for each in made]


def by_itself(tokenizer, text):
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return np.array([(i, *where) for i, where in zip(out["input_ids"], out["offset_mapping"], strict=True)]).reshape(-1, 3).T


@given(texts)
@example("")
@example(TEXT)
@example(TEXT * 30)
@example("<|im_end|>_ word \U00040000word")
@example("  word\n\nword  <|im_end|>\n\n")
@example(")\n/(x */(x <|im_end|>(x ((x .'s '(s \u3000 \nx \x0b\nx\r\nx   5\n5\n\n5 \t (x  'x\t'x")
def test_the_tokens_of_a_text_are_those_of_its_pieces(cut_up, text):
    for tokenizer, its in cut_up:
        np.testing.assert_array_equal(its.tokens(text), by_itself(tokenizer, text))


@given(st.lists(texts | st.text(), max_size=5), st.lists(st.none() | st.integers(0, 40), min_size=5, max_size=5))
@example([TEXT, "", TEXT * 30, "a\x00"], [None, 3, 7, None, None])
@example(["  ", "word", " (", "(x", "\n\nword"], [None] * 5)
def test_the_tokens_of_several_texts_are_those_of_each(cut_up, several, at_least):
    for tokenizer, its in (cut_up[0], cut_up[-1]):
        for found, text, wanted in zip(its.tokens_each(several, at_least), several, at_least, strict=False):
            whole = by_itself(tokenizer, text)
            assert found[0].dtype == np.int32
            assert len(found[0]) >= min(whole.shape[1], whole.shape[1] if wanted is None else wanted)
            np.testing.assert_array_equal(found, whole[:, : len(found[0])])


def test_of_many_texts_some_are_cut_up_at_a_time(tokenizer, monkeypatch):
    monkeypatch.setattr(pieces, "MAX_TOGETHER", 2 * len(TEXT))
    several = [TEXT, "", *(f"{TEXT} {i}" * i for i in range(6))]
    for at_least in (None, 50):
        made = pieces_of(tokenizer).tokens_each(several, [at_least] * len(several))
        for found, text in zip(made, several, strict=True):
            whole = by_itself(tokenizer, text)
            assert len(found[0]) >= min(whole.shape[1], at_least or whole.shape[1])
            np.testing.assert_array_equal(found, whole[:, : len(found[0])])


def cut_where_it_is(its, text):
    """The text's pieces."""
    if not text:
        return []
    written = text.encode()
    cuts = [0, *np.flatnonzero(its._cuts.within([written]))[1:], len(written)]
    return [written[start:end].decode() for start, end in pairwise(cuts)]


@given(texts | st.text())
@example(TEXT)
@example(" ".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)])))
def test_a_text_is_cut_only_where_no_token_is(cut_up, text):
    for tokenizer, its in cut_up:
        pieces = cut_where_it_is(its, text)
        made = tokenizer([text, *pieces], add_special_tokens=False)["input_ids"]
        assert made[0] == [*chain(*made[1:])]


@pytest.mark.parametrize(
    ("gpt2", "others"),
    [
        ("You|'re| right|:\n\n | it|'s", None),
        ("Yes|.\n|\n|No|.\r|\n|x", "Yes|.\n\n|No|.\r\n|x"),
        ("f|(|x|2|)| ==| [\"|a|.|b|\",| 'c|']", "f|(x|2|)| ==| [\"|a|.b|\",| 'c|']"),
        ("\tif| x|:\n\t\treturn| 3|.|14| | #| so", None),
        ("Voilà,| le| café| est| à| côté;| так| вот| он| ест| ,| 日本| 語| “so”| …| ", None),
    ],
)
def test_a_text_is_cut_where_its_words_are(cut_up, gpt2, others):
    for its, marked in ((cut_up[0][1], gpt2), (cut_up[-1][1], others or gpt2)):
        assert "|".join(cut_where_it_is(its, marked.replace("|", ""))) == marked


def test_no_added_token_is_cut(tokenizer):
    other = variant(tokenizer, lambda backend: backend.add_tokens(["[A-B]", "x.y"]))
    for text in ("a.b <|im_end|>[A-B] x.y-z", "(x.y)[A-B][A-B]\nx.y<|im_start|>a"):
        np.testing.assert_array_equal(pieces_of(other).tokens(text), by_itself(other, text))


def test_a_limit_in_the_tokenizers_file_is_none_here(tokenizer):
    other = variant(tokenizer, lambda backend: backend.enable_truncation(8))
    np.testing.assert_array_equal(pieces_of(other).tokens(TEXT), by_itself(tokenizer, TEXT))


def test_what_was_known_before_still_is(tokenizer, monkeypatch):
    monkeypatch.setattr(pieces, "MAX_KNOWN", 20)
    its, made = pieces_of(tokenizer), []
    make = its._words.tokens_each
    monkeypatch.setattr(its._words, "tokens_each", lambda pieces: made.extend(pieces) or make(pieces))
    its.tokens(" ".join(f"a{i}" for i in range(30)))
    its.tokens("begin again")
    made.clear()
    for text in ("x a7 a8", "x a9"):
        np.testing.assert_array_equal(its.tokens(text), by_itself(tokenizer, text))
    assert made == ["x"]


def test_a_text_of_which_some_makes_no_token_keeps_its_places(tokenizer):
    lost = [c for c in map(chr, range(32)) if not tokenizer(c, add_special_tokens=False)["input_ids"]]
    assert lost
    for text in (f"a {lost[0]}b c", f"a{lost[0]} b", f"{lost[0]} a", f"a {lost[0]}", lost[0]):
        np.testing.assert_array_equal(pieces_of(tokenizer).tokens(text), by_itself(tokenizer, text))


@given(texts.map(lambda text: text * 20), st.integers(1, 99))
def test_the_first_tokens_are_those_of_the_whole_text(cut_up, text, at_least):
    for tokenizer, its in cut_up[:2]:
        found, whole = np.array(its.tokens(text, at_least)), by_itself(tokenizer, text)
        assert found.shape[1] >= min(at_least, whole.shape[1])
        np.testing.assert_array_equal(found, whole[:, : found.shape[1]])


def test_what_is_remembered_is_bounded_and_threads_share_it(tokenizer, monkeypatch):
    monkeypatch.setattr(pieces, "MAX_KNOWN", 20)
    shared, whole = pieces_of(tokenizer), by_itself(tokenizer, TEXT)
    wrong = []

    def encode(number):
        for i in range(200):
            lead = f" n{number} m{i}"
            if not np.array_equal(shared.tokens(lead + TEXT), by_itself(tokenizer, lead + TEXT)):
                wrong.append(lead)

    threads = [threading.Thread(target=encode, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(shared._known) < 200
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(shared)).tokens(TEXT), whole)


@pytest.mark.parametrize(
    "change",
    [
        split_by(r"\n+"),
        split_by(min(PATTERNS), "merged_with_next"),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        lambda backend: setattr(backend, "normalizer", normalizers.Lowercase()),
        lambda backend: setattr(backend, "post_processor", processors.ByteLevel(trim_offsets=True)),
        lambda backend: setattr(backend.model, "dropout", 0.1),
        lambda backend: backend.add_tokens([AddedToken("two words")]),
        lambda backend: backend.add_tokens([AddedToken("greedy", rstrip=True)]),
    ],
    ids=[
        "pattern",
        "merges words",
        "blank first",
        "no pattern",
        "lower case",
        "trims",
        "dropout",
        "with a blank",
        "takes blanks",
    ],
)
def test_other_tokenizers_are_left_alone(tokenizer, change):
    assert pieces_of(variant(tokenizer, change)) is None
