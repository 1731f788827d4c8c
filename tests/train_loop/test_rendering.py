"""Templates that take message after message: the beginning of a conversation is rendered as the whole begins."""

import re
from copy import copy
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train_loop.data import rendering
from train_loop.data.formats import RowRejected
from train_loop.data.rendering import grows, render
from train_loop.data.tokenize import IGNORE_INDEX, ChatTokenizer
from train_loop.errors import DatasetError
from train_loop.spec import Prompt

TURN = "<|im_start|>{{ message.role }}\n{{ message['content'] | trim }}<|im_end|>\n"
LOOP = "{% for message in messages %}" + TURN + "{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
GROWING = [
    LOOP + PROMPT,
    LOOP + "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}",
    "{% if messages[0].role != 'system' %}Help.{% endif %}" + LOOP + PROMPT,
    "{% set ns = namespace(n=0) %}{% for message in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}"
    + TURN
    + "{% endfor %}"
    + PROMPT,
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}{{ loop.index }}" + TURN + "{% endfor %}" + PROMPT,
    "{{ bos_token }}{% for message in messages %}{% for c in message.content %}{{ c }}{% endfor %}|{% endfor %}" + PROMPT,
]
OTHERS = [
    "{% for message in messages %}{% if loop.last %}last: {% endif %}" + TURN + "{% endfor %}" + PROMPT,
    "{% for message in messages %}{{ loop.length }}" + TURN + "{% endfor %}" + PROMPT,
    "{% for message in messages %}{{ loop.nextitem }}" + TURN + "{% endfor %}" + PROMPT,
    "{% for message in messages %}{{ loop['last'] }}" + TURN + "{% endfor %}" + PROMPT,
    "{{ messages | length }}" + LOOP + PROMPT,
    "{{ messages[-1].role }}" + LOOP + PROMPT,
    LOOP + "{% if add_generation_prompt and messages[0].role == 'user' %}<|im_start|>assistant\n{% endif %}",
    "{% set turns = messages %}{% for message in turns %}" + TURN + "{% endfor %}" + PROMPT,
    "{% for message in messages[1:] %}" + TURN + "{% endfor %}" + PROMPT,
    "{% for message in messages if message.role != 'tool' %}" + TURN + "{% endfor %}" + PROMPT,
    "{% for message in messages | reverse %}" + TURN + "{% endfor %}" + PROMPT,
    "{% for message in messages %}{% if add_generation_prompt %}!{% endif %}" + TURN + "{% endfor %}" + PROMPT,
    "{% set ns = namespace(n=0) %}{% for message in messages %}{% set ns.n = ns.n + 1 %}"
    + TURN
    + "{% endfor %}{{ ns.n }}"
    + PROMPT,
    LOOP + "{% if tools %}tools{% endif %}" + PROMPT,
    LOOP + LOOP + PROMPT,
    "{% if true %}" + LOOP + "{% endif %}" + PROMPT,
    "{% macro say(message) %}" + TURN + "{% endmacro %}{% for message in messages %}{{ say(message) }}{% endfor %}" + PROMPT,
    "{% set messages = messages %}" + LOOP + PROMPT,
    PROMPT,
]
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}

said = st.text(st.sampled_from("ab \n<|im_end|>"), min_size=1, max_size=9)
talks = st.lists(st.tuples(said, said.filter(str.strip)), min_size=1, max_size=4).map(
    lambda pairs: [
        {"role": role, "content": text} for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
)


@pytest.mark.parametrize("template", GROWING)
@given(messages=talks)
def test_the_beginning_of_a_conversation_is_rendered_as_the_whole_begins(template, messages):
    whole = render(template, messages, None, NAMES, prompt=False)
    asked = render(template, messages[:1], None, NAMES, prompt=True)
    opening, end = asked.text[asked.begins[-1] :], whole.text[whole.begins[-1] :]
    for count in range(1, len(messages) + 1):
        begun = whole.text[: whole.begins[count]]
        assert render(template, messages[:count], None, NAMES, prompt=True).text == begun + opening
        assert render(template, messages[:count], None, NAMES, prompt=False).text == begun + end


@pytest.mark.parametrize("template", OTHERS)
def test_others_are_rendered_again(template):
    assert not grows(template)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert render(template, messages, None, NAMES, prompt=False).begins == []


@pytest.mark.parametrize("truncation", ["right", "left"])
@pytest.mark.parametrize("template", GROWING)
@settings(max_examples=30)
@given(data=st.data())
def test_labels_are_those_of_rendering_again(tokenizer, template, truncation, data):
    knowing, other = (chat_of(tokenizer, template, truncation, number) for number in range(2))

    def encode(chat, messages):
        try:
            sample = chat.encode({"messages": messages})
        except (RowRejected, DatasetError) as error:
            return str(error)
        return sample.input_ids.tolist(), sample.labels.tolist()

    messages = data.draw(talks)
    found = encode(knowing, messages)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rendering, "grows", lambda template: False)
        assert encode(other, messages) == found


@cache
def chat_of(tokenizer, template, truncation, number):
    """One that has looked at its vocabulary; each number has its own."""
    del number
    return ChatTokenizer(tokenizer, Prompt(template=template, max_length=40), truncation, "assistant")


def test_a_template_for_tools_has_a_prompt_of_its_own(tokenizer):
    two = copy(tokenizer)
    two.chat_template = {"default": LOOP + PROMPT, "tool_use": "{{ tools }}" + LOOP + PROMPT.replace("\n{% endif", "{% endif")}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": messages}, {"messages": messages, "tools": [{"name": "f"}]}]
    chat = ChatTokenizer(two, Prompt(max_length=200), "right", "assistant")
    for row in (*rows, *rows):
        sample = chat.encode(row)
        spoken = tokenizer.decode(sample.input_ids[sample.labels != IGNORE_INDEX])
        assert spoken == ("\nb<|im_end|>" if "tools" in row else "b<|im_end|>")


def test_published_templates_that_go_message_by_message_are_known():
    folder = Path(__file__).parent / "templates"
    marks = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
    growing = {path.stem for path in folder.glob("*.jinja") if grows(marks.sub("", path.read_text()))}
    assert {"gemma2", "phi3", "phi4", "smollm2"} <= growing
    assert growing.isdisjoint({"qwen2.5", "qwen3", "mistral", "llama3"})
