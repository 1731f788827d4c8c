from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train_loop.data.formats import RowRejected, to_conversation


def chat(*turns):
    return {"messages": [{"role": r, "content": c} for r, c in turns]}


def sharegpt(*turns):
    return {"conversations": [{"from": r, "value": v} for r, v in turns]}


@pytest.mark.parametrize(
    "row",
    [
        sharegpt(("system", "Be kind."), ("human", "Hi"), ("gpt", "Hello")),
        sharegpt(("system", "Be kind."), ("user", "Hi"), ("chatgpt", "Hello")),
        {"system": "Be kind.", "conversation": [{"human": "Hi", "assistant": "Hello"}]},
        {"system": "Be kind.", "conversations": [{"from": "human", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]},
    ],
)
def test_both_sharegpt_shapes_become_the_same_conversation(row):
    assert to_conversation(row, "sharegpt") == chat(("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"))


def test_openai_text_parts_are_joined():
    row = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {"role": "assistant", "content": "Hello"}]}
    assert to_conversation(row, "openai") == chat(("user", "Hi"), ("assistant", "Hello"))


def test_turns_are_normalised():
    row = sharegpt(("gpt", "dropped"), ("human", "a"), ("human", "b"), ("gpt", "c"), ("gpt", "d"), ("human", "unanswered"))
    assert to_conversation(row, "sharegpt") == chat(("user", "a\n\nb"), ("assistant", "c\n\nd"))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "a row must be a JSON object, not a list"),
        ({}, "no list"),
        (sharegpt(("human", "Hi")), "no assistant turn"),
        (sharegpt(("human", "Hi"), ("gpt", " ")), "empty assistant turn"),
        (sharegpt(("human", "Hi"), ("robot", "Beep")), "unknown role"),
        (sharegpt(("human", "Hi"), ("gpt", 3)), "not a string"),
        (sharegpt(("human", "Hi"), ("system", "late"), ("gpt", "x")), "must come first"),
        (sharegpt(("human", "Hi"), ("function_call", "x"), ("gpt", "y")), "tool calls are not supported yet"),
        ({"conversations": ["x"]}, "a turn must be an object"),
    ],
)
def test_unusable_rows_say_why(row, reason):
    with pytest.raises(RowRejected, match=reason):
        to_conversation(row, "sharegpt")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda v: (
        st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(["from", "value", "conversations", "conversation", "human"]), v)
    ),
    max_leaves=12,
)


@given(anything)
def test_any_json_is_either_a_good_conversation_or_rejected(row):
    try:
        messages = to_conversation(row, "sharegpt")["messages"]
    except RowRejected:
        return  # any other exception fails the test
    roles = [m["role"] for m in messages]
    assert roles[-1] == "assistant"
    assert all(a != b for a, b in pairwise(roles))
