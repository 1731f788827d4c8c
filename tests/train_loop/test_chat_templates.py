"""Which tokens are trained on, under the templates of the families that people train.

The templates in templates/ are short versions of the published ones, with `{% generation %}` marks; each is tested with the marks
and without, where turns are found by comparing renderings.
"""

import copy
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from tokenizers import AddedToken, Regex, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as SplitsInTurn
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from train_loop.data.formats import RowRejected, to_conversation
from train_loop.data.tokenize import ChatTokenizer
from train_loop.errors import DatasetError
from train_loop.spec import Prompt


@dataclass(frozen=True)
class Family:
    """A template's name, the end of a turn, the tokens that it needs, and what it does in its own way."""

    name: str
    end: str
    tokens: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")
    bos: str | None = None
    eos: str | None = None
    before: str = ""  # of an answer, inside its turn
    last: str = ""  # of the last answer only
    has_system: bool = True
    has_tools: bool = False
    takes_blanks: bool = False  # the tokens do, after them


FAMILIES = [
    Family(
        "llama3",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        "<|eot_id|>",
        has_tools=True,
    ),
    Family("qwen2.5", "<|im_end|>", has_tools=True),
    Family("qwen3", "<|im_end|>", last="<think>\n\n</think>\n\n", has_tools=True),
    Family("gemma2", "<end_of_turn>", ("<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>", has_system=False),
    Family(
        "mistral",
        "</s>",
        ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        "<s>",
        "</s>",
        before=" ",
        has_system=False,
        has_tools=True,
    ),
    Family("phi3", "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), eos="<|endoftext|>", takes_blanks=True),
    Family("phi4", "<|im_end|>", ("<|im_start|>", "<|im_sep|>", "<|im_end|>")),
    Family("smollm2", "<|im_end|>", bos="<|im_start|>", eos="<|im_end|>"),
]
TALK = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "First answer."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Second: <b>näïve</b>\n\n日本 🚢"},
    {"role": "user", "content": "Three?"},
    {"role": "assistant", "content": "Third."},
]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "Of a place.", "parameters": {"type": "object", "properties": {}}},
    }
]
CALL = {"role": "function_call", "content": '{"name": "weather", "arguments": {"city": "Łódź"}}'}
TOOL_TALK = to_conversation(
    {
        "messages": [
            {"role": "user", "content": "Is it warm?"},
            CALL,
            {"role": "tool", "content": "21 degrees"},
            {"role": "assistant", "content": "It is warm."},
        ],
        "tools": TOOLS,
    },
    "openai",
)


BY_NAME = {f.name: f for f in FAMILIES}


def only(*names):
    """Run a test with these families' templates alone."""
    return pytest.mark.parametrize("family", [BY_NAME[n] for n in names], indirect=True, ids=names)


def unmarked(template):
    """The same template without marks; an `if` keeps the blanks around them as they were."""
    return re.sub(r"\bendgeneration\b", "endif", re.sub(r"(\{%-?) generation\b", r"\1 if true", template))


@pytest.fixture(params=FAMILIES, ids=lambda f: f.name, scope="module")
def family(request, tokenizer):
    return made_as(request.param, tokenizer)


def made_as(one, tokenizer):
    """The tiny tokenizer with the tokens and the template of a family."""
    marked = (Path(__file__).parent / f"templates/{one.name}.jinja").read_text()
    return made_with(unmarked(marked), marked, one, tokenizer)


def made_with(template, marked, one, tokenizer):
    made = copy.deepcopy(tokenizer)
    # Line ends are pieces of their own, as with the families' tokenizers: the text after a prompt doesn't move its tokens.
    splits = [Split(Regex("\n+"), "isolated"), made.backend_tokenizer.pre_tokenizer]
    made.backend_tokenizer.pre_tokenizer = SplitsInTurn(splits)
    tokens = [AddedToken(token, rstrip=one.takes_blanks, normalized=False) for token in one.tokens]
    made.add_special_tokens({"additional_special_tokens": tokens})
    if one.bos:
        made.add_special_tokens({"bos_token": one.bos})
        # As the families' own tokenizers do: plain text gets its beginning from the tokenizer, a chat from the template.
        bos = (one.bos, made.bos_token_id)
        made.backend_tokenizer.post_processor = TemplateProcessing(single=f"{one.bos} $A", special_tokens=[bos])
    if one.eos:
        made.add_special_tokens({"eos_token": one.eos})
    made.chat_template = template
    return SimpleNamespace(**vars(one), tokenizer=made, marked=marked)


def encode(family, messages=TALK, *, tools=None, train_on="assistant", truncation="right", **prompt):
    chat = ChatTokenizer(family.tokenizer, Prompt(**{"max_length": 4096} | prompt), truncation, train_on)
    return chat.encode({"messages": messages} | ({"tools": tools} if tools else {}))


def trained_text(family, sample):
    return family.tokenizer.decode(sample.labels[sample.labels != -100])


def said(family, messages):
    *earlier, last = (m["content"] + family.end for m in messages if m["role"] == "assistant")
    return "".join(family.before + answer for answer in (*earlier, family.last + last))


def test_each_answer_and_its_end_of_turn_is_trained_on_and_nothing_else(family):
    assert trained_text(family, encode(family)) == said(family, TALK)


@pytest.mark.parametrize(
    ("published", "like"),
    [
        *[("llama3", "llama3"), ("llama3_1", "llama3"), ("llama3_2", "llama3"), ("qwen2_5", "qwen2.5"), ("qwen3", "qwen3")],
        *[("qwen3_instruct_2507", "qwen2.5"), ("gemma", "gemma2"), ("gemma3", "gemma2"), ("phi3", "phi3"), ("phi3_5", "phi3")],
    ],
)
def test_the_published_templates_are_labelled_as_the_short_ones(tokenizer, published, like):
    family = made_as(BY_NAME[like], tokenizer)
    family.tokenizer.chat_template = (TRL / f"{published}.jinja").read_text()
    assert trained_text(family, encode(family)) == said(family, TALK)


SYSTEM = {"role": "system", "content": "Be brief."}
ENDED = [m | {"content": m["content"] + "!"} for m in TALK]  # transformers cuts a mark's end within a character of several tokens
SHAPES = [
    (ENDED, None),
    ([SYSTEM, *ENDED], None),
    ([*TOOL_TALK["messages"], *ENDED], TOOLS),
    ([SYSTEM, *TOOL_TALK["messages"], *ENDED], TOOLS),
]
TRL = Path(find_spec("trl").origin).parent / "chat_templates"
# Templates that show a plain answer otherwise than behind their own prompt, which ends in thinking; or as a list of parts only.
REFUSED = re.compile("deepseek.*|nemotron.*|idefics3|smolvlm|llava_next")
# TRL's training templates show thinking, if empty, in every turn: only the last is as inference has it.
REWRITTEN = re.compile("qwen3|qwen3_5.*|qwen3_6")
# Its prompt after a tool's answer opens no turn, but its text does: what inference has to say itself is trained on.
OWN_WAY = ("diffusion_gemma",)
# What TRL trains besides: the end of an answer's prompt, and what no model says any more once its answer has ended.
BEFORE = r"(\n|<think>\n|<think>\n\n</think>\n\n|<\|start\|>assistant)?"
AFTER = r"(\s|<EOS>|<\|end\|>|<\|user\|>)*"


@pytest.fixture(scope="module")
def letters():
    """A tokenizer of single bytes."""
    signs = sorted(ByteLevel.alphabet())
    made = Tokenizer(BPE({sign: i for i, sign in enumerate(signs)}, []))
    made.pre_tokenizer, made.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("name", sorted(path.name.removesuffix("_training.jinja") for path in TRL.glob("*_training.jinja")))
def test_the_answers_are_what_trl_marks_in_the_published_templates(letters, name):
    marked = (TRL / f"{name}_training.jinja").read_text()
    tokens = {*re.findall(r"<[^<>\s'\"=]{1,40}>|\[gMASK\]", marked)} - {"<EOS>"}
    one = Family(name, "", tuple(sorted(tokens)), "<BOS>", "<EOS>")
    family = made_with((TRL / f"{name}.jinja").read_text(), marked, one, letters)

    def pieces(labels):
        edges = np.flatnonzero(np.diff(labels != -100, prepend=False, append=False)).reshape(-1, 2)
        return [family.tokenizer.decode(labels[start:end]) for start, end in edges]

    compared = []
    for messages, tools in SHAPES:
        shows = all(re.search(rf"\b{word}\b", family.tokenizer.chat_template) for word in ("tools", "tool_calls"))
        if REFUSED.fullmatch(name) or (tools and not shows):
            with pytest.raises(DatasetError) as caught:
                encode(family, messages, tools=tools)
            assert caught.value.code in ("template_error", "tools_not_rendered")
            continue
        ours = encode(family, messages, tools=tools)
        try:
            how = {"tools": tools, "chat_template": marked, "return_assistant_tokens_mask": True, "return_dict": True}
            theirs = family.tokenizer.apply_chat_template(messages, **how)
        except TemplateError:  # of a system message, which ours puts into the user's
            assert messages[0] == SYSTEM
            continue
        mask = np.where(np.array(theirs["assistant_masks"]) == 1, theirs["input_ids"], -100)
        np.testing.assert_array_equal(encode(family, messages, tools=tools, template=marked).labels, mask)
        pairs = pieces(ours.labels), pieces(mask)
        if tools is None or name not in OWN_WAY:
            compared += zip(*(p[-1:] for p in pairs) if REWRITTEN.fullmatch(name) else pairs, strict=True)
    assert compared or REFUSED.fullmatch(name)
    for mine, its in compared:
        assert re.fullmatch(BEFORE + re.escape(mine) + AFTER, its), (mine, its)


ENDLESS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
OPENED = (
    "{% for m in messages %}{{ '' if m.role == 'assistant' else '<|' ~ m.role ~ '|>' }}{{ m.content }}<|end|>"
    "{{ '<|assistant|>' if m.role == 'user' }}{% endfor %}"
)


@only("phi3")
@pytest.mark.parametrize(
    ("template", "trained"),
    [
        # As GLM's: only the next turn's beginning ends one.
        (ENDLESS, "First answer.<|user|>Second: <b>näïve</b>\n\n日本 🚢<|user|>Third."),
        # As Phi 4's first: a user's turn opens the answer.
        (OPENED, "First answer.<|end|>Second: <b>näïve</b>\n\n日本 🚢<|end|>Third.<|end|>"),
    ],
    ids=["endless", "opened"],
)
def test_turns_without_an_end_or_a_beginning_of_their_own(family, template, trained):
    assert trained_text(family, encode(family, template=template)) == trained


@only("mistral")
def test_a_mistral_template_without_blanks_is_labelled_alike(family):
    nemo = family.marked.replace('] "', ']"').replace("] [", "][").replace('" " + ', "")
    found = encode(family, template=unmarked(nemo))
    assert trained_text(family, found) == said(SimpleNamespace(**vars(family) | {"before": ""}), TALK)
    calls = encode(family, **TOOL_TALK, template=unmarked(nemo))
    assert trained_text(family, calls).startswith('[TOOL_CALLS][{"name": "weather"')
    np.testing.assert_array_equal(encode(family, **TOOL_TALK, template=nemo).labels, calls.labels)


def test_marks_and_comparing_agree(family):
    compared = encode(family)
    marked = encode(family, template=family.marked)
    np.testing.assert_array_equal(marked.input_ids, compared.input_ids)
    np.testing.assert_array_equal(marked.labels, compared.labels)


def test_the_prompt_of_every_answer_is_what_inference_renders(family):
    sample = encode(family)
    for i in (1, 3, 5):
        prompt = family.tokenizer.apply_chat_template(TALK[:i], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert sample.input_ids[: len(prompt)].tolist() == prompt
        assert sample.labels[len(prompt)] != -100
        assert sample.labels[len(prompt) - 1] == -100


@only(*(f.name for f in FAMILIES if f.has_tools))
def test_the_prompt_is_what_inference_renders_also_with_tools_and_a_system_message(family):
    opening = [{"role": "system", "content": "Be brief."}] if family.has_system else []
    talk = [*opening, *TOOL_TALK["messages"]]
    sample = encode(family, talk, tools=TOOLS)
    for i in (i for i, m in enumerate(talk) if m["role"] == "assistant"):
        prompt = family.tokenizer.apply_chat_template(talk[:i], tools=TOOLS, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        assert sample.input_ids[: len(prompt)].tolist() == prompt
        assert sample.labels[len(prompt)] != -100
        assert sample.labels[len(prompt) - 1] == -100


def test_there_is_one_beginning_of_sequence(family):
    ids = encode(family).input_ids.tolist()
    assert ids[:2] != [ids[0], ids[0]]
    if family.bos not in (None, *family.tokens):
        assert ids.count(family.tokenizer.bos_token_id) == 1
        assert ids[0] == family.tokenizer.bos_token_id


def test_the_last_answer_alone_and_weights(family):
    _, last = said(family, TALK).split("日本 🚢" + family.end)
    weighted = [m | {"loss": False} if i in (1, 3) else m for i, m in enumerate(TALK)]
    for template in (None, family.marked):
        assert trained_text(family, encode(family, train_on="last_assistant", template=template)) == last
        assert trained_text(family, encode(family, weighted, template=template)) == last
    everything = encode(family, train_on="all")
    assert (everything.labels == everything.input_ids).all()
    most = encode(family, weighted, train_on="all")
    assert "First answer." not in trained_text(family, most)
    assert "One?" in trained_text(family, most)


@pytest.mark.parametrize("own", [True, False])
def test_the_system_prompt_reaches_the_model_also_where_the_template_has_no_such_role(family, own):
    talk = [{"role": "system", "content": "Be brief."}, *TALK] if own else TALK
    text = family.tokenizer.decode(encode(family, talk, system=None if own else "Be brief.").input_ids)
    assert text.count("Be brief.") == 1
    assert text.index("Be brief.") < text.index("One?")
    assert ("Be brief.\n\nOne?" in text) is not family.has_system
    assert trained_text(family, encode(family, talk, system="Be long.")) == said(family, TALK)


@only("qwen2.5", "smollm2")
def test_the_templates_own_system_message_is_for_rows_without_one(family):
    default = {"qwen2.5": "You are Qwen", "smollm2": "You are SmolLM"}[family.name]
    assert default in family.tokenizer.decode(encode(family).input_ids)
    assert default not in family.tokenizer.decode(encode(family, system="Be brief.").input_ids)


def test_tools_are_rendered_and_calls_trained_on_or_the_job_is_refused(family):
    if not family.has_tools:
        with pytest.raises(DatasetError, match="rows have tools, which the chat template doesn't render") as caught:
            encode(family, **TOOL_TALK)
        assert caught.value.code == "tools_not_rendered"
        with pytest.raises(DatasetError):
            encode(family, TOOL_TALK["messages"])  # calls, but no list of tools
        return
    for template in (None, family.marked):
        sample = encode(family, **TOOL_TALK, template=template)
        trained, text = trained_text(family, sample), family.tokenizer.decode(sample.input_ids)
        assert text.index('"weather"') < text.index("Is it warm?" if family.name != "llama3" else "Łódź")
        assert trained.count(family.end) == 2
        assert trained.index('"weather"') < trained.index("Łódź") < trained.index("It is warm.")
        assert "21 degrees" not in trained
        assert "Is it warm?" not in trained
        assert "21 degrees" in text


@only("llama3")
def test_a_row_that_the_template_refuses_is_rejected_in_its_words(family):
    twice = to_conversation({"messages": [TALK[0], CALL, CALL]}, "openai")
    with pytest.raises(RowRejected, match="the chat template refuses it: one call a turn"):
        encode(family, twice["messages"])


@only("qwen3")
def test_thinking_is_trained_on_where_the_template_shows_it(family):
    inline = [m | {"content": f"<think>\nHm {i}\n</think>\n\n{m['content']}"} if i % 2 else m for i, m in enumerate(TALK)]
    apart = [m | {"reasoning_content": f"Hm {i}"} if i % 2 else m for i, m in enumerate(TALK)]
    for talk in (inline, apart):
        # Earlier turns are shown without the thinking that inference would have them start with: they carry no loss.
        sample = encode(family, talk)
        assert trained_text(family, sample) == "<think>\nHm 5\n</think>\n\nThird.<|im_end|>"
        assert "First answer." in family.tokenizer.decode(sample.input_ids)


words = st.text(st.sampled_from("ab .,\n日é🚢<|>{}%"), min_size=1, max_size=20).map(str.strip).filter(bool)
talks = st.lists(st.tuples(words, words), min_size=1, max_size=4)


@settings(max_examples=40)
@given(pairs=talks, limit=st.integers(16, 80), truncation=st.sampled_from(["right", "left"]))
def test_any_conversation_is_trained_on_exactly_where_the_assistant_speaks(family, pairs, limit, truncation):
    talk = [{"role": r, "content": c} for pair in pairs for r, c in zip(("user", "assistant"), pair, strict=True)]
    whole = encode(family, talk)
    assert len(whole.input_ids) == len(whole.labels)
    assert trained_text(family, whole) == said(family, talk)
    assert ((whole.labels == -100) | (whole.labels == whole.input_ids)).all()
    try:
        cut = encode(family, talk, max_length=limit, truncation=truncation)
    except RowRejected:
        return
    kept = slice(0, limit) if truncation == "right" else slice(max(0, len(whole.labels) - limit), None)
    np.testing.assert_array_equal(cut.input_ids, whole.input_ids[kept])
    np.testing.assert_array_equal(cut.labels, whole.labels[kept])
