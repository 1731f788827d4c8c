import gc
import json
import weakref
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train_loop.data.formats import Preference, RowRejected, each, parse, to_conversation

WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
SAID = '{"name": "weather", "arguments": {"city": "Oslo"}}'


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
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Hello"}]}
    assert to_conversation(row, "openai") == chat(("user", "Hi"), ("assistant", "Hello"))


def test_a_developer_message_is_the_system_message():
    row = chat(("developer", "Be kind."), ("user", "Hi"), ("assistant", "Hello"))
    assert to_conversation(row, "openai") == chat(("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"))


@pytest.mark.parametrize(
    ("row", "dataset_format", "turns"),
    [
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, "alpaca", [("user", "Add.\n1, 2"), ("assistant", "3")]),
        ({"instruction": "Sing.", "input": "", "output": "La"}, "alpaca", [("user", "Sing."), ("assistant", "La")]),
        (
            {"instruction": "b", "output": "B", "system": "Up.", "history": [["a", "A"]]},
            "alpaca",
            [("system", "Up."), ("user", "a"), ("assistant", "A"), ("user", "b"), ("assistant", "B")],
        ),
        ({"prompt": "a", "completion": "A"}, "prompt_completion", [("user", "a"), ("assistant", "A")]),
        (
            {"query": "b", "response": "B", "history": [["a", "A"]], "system": "Up."},
            "prompt_completion",
            [("system", "Up."), ("user", "a"), ("assistant", "A"), ("user", "b"), ("assistant", "B")],
        ),
    ],
)
def test_rows_of_one_question_and_one_answer(row, dataset_format, turns):
    assert to_conversation(row, dataset_format) == to_conversation(row, "auto") == chat(*turns)


def test_of_a_prompt_of_messages_only_the_completion_is_trained_on():
    row = {
        "prompt": chat(("system", "Up."), ("user", "a"), ("assistant", "A"), ("user", "b"))["messages"],
        "completion": [{"role": "assistant", "content": "B"}],
    }
    messages = to_conversation(row, "prompt_completion")["messages"]
    assert [m.get("loss", True) for m in messages if m["role"] == "assistant"] == [False, True]


def test_text_rows():
    assert to_conversation({"text": " As it is.\n"}, "text") == {"text": " As it is.\n"}
    with pytest.raises(RowRejected, match="empty text"):
        to_conversation({"text": " "}, "text")


MIXED = [
    {"text": "Once."},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "messages": None},
    {"conversation": [{"human": "Hi", "assistant": "Hello"}]},
    chat(("user", "Hi"), ("assistant", "Hello")) | {"text": "rendered before"},
    {"instruction": "Hi", "input": "", "output": "Hello", "text": "rendered before"},
    {"prompt": "Hi", "completion": "Hello"},
    {"query": "Hi", "response": "Hello"},
    {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"},
    chat(("user", "Hi"), ("assistant", "Hello")) | {"rejected_response": None},
]


def test_a_mixed_dataset_is_told_row_by_row():
    text, *others = [to_conversation(row, "auto") for row in MIXED]
    assert text == {"text": "Once."}
    assert others == [chat(("user", "Hi"), ("assistant", "Hello"))] * 8


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "Hi"}, "of no known shape: a row has the keys messages; conversations; instruction and output; prompt and"),
        (
            chat(("user", "Hi")) | {"prompt": "a", "completion": "b"},
            "fits openai and prompt_completion: name one of them in dataset_f",
        ),
    ],
)
def test_a_row_of_no_or_several_shapes_is_rejected_with_those_that_there_are(row, reason):
    with pytest.raises(RowRejected, match=reason):
        to_conversation(row, "auto")


@pytest.mark.parametrize(
    ("row", "named", "reason"),
    [
        ({"input": "1?", "output": "1"}, "openai", 'no list "messages"; it has input, output'),
        (
            {"prompt": "1?", "completion": "1"},
            "openai",
            'no list "messages"; its keys are those of dataset_format prompt_completion',
        ),
        (
            chat(("user", "Hi")),
            "sharegpt",
            'no list "conversations" or "conversation"; its keys are those of dataset_format openai',
        ),
        ({"question": "1?", "answer": "1"}, "alpaca", "instruction is not a string but null; it has question, answer"),
        ({}, "openai", 'no list "messages"; it has no keys'),
        ({"messages": None}, "openai", 'no list "messages"'),
        ({"question": "1?"}, "auto", "chosen and rejected; text; this one has question"),
        (dict.fromkeys(map(str, range(9)), "x"), "openai", 'no list "messages"; it has 0, 1, 2, 3, 4, 5, 6, 7, …'),
    ],
)
def test_of_a_row_of_another_shape_the_keys_are_told(row, named, reason):
    with pytest.raises(RowRejected) as caught:
        to_conversation(row, named)
    assert caught.value.reason.endswith(reason)


def called(content="", **arguments):
    function = {"name": "weather", "arguments": arguments}
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"type": "function", "function": function, "id": "call00001"}],
    }


@pytest.mark.parametrize("tools", [[WEATHER], json.dumps([WEATHER]), [{"type": "function", "function": WEATHER}]])
@pytest.mark.parametrize(
    ("dataset_format", "turns"),
    [
        ("sharegpt", [("human", "Hi"), ("function_call", SAID), ("observation", "3"), ("gpt", "Cold.")]),
        ("sharegpt", [("human", "Hi"), ("function_call", SAID), ("tool", "3"), ("gpt", "Cold.")]),
        ("openai", [("user", "Hi"), ("tool_call", SAID), ("tool_response", "3"), ("assistant", "Cold.")]),
    ],
)
def test_calls_written_as_turns_become_tool_calls(dataset_format, turns, tools):
    row = sharegpt(*turns) if dataset_format == "sharegpt" else chat(*turns)
    assert to_conversation(row | {"tools": tools}, dataset_format) == {
        "messages": [
            {"role": "user", "content": "Hi"},
            called(city="Oslo"),
            {"role": "tool", "content": "3", "tool_call_id": "call00001", "name": "weather"},
            {"role": "assistant", "content": "Cold."},
        ],
        "tools": [{"type": "function", "function": WEATHER}],
    }


@pytest.mark.parametrize("arguments", [{"city": "Oslo"}, '{"city": "Oslo"}'])
def test_openai_calls_are_paired_with_their_results_by_id(arguments):
    def call(name):
        return {"id": f"call_of_{name}", "type": "function", "function": {"name": name, "arguments": arguments}}

    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call("weather"), call("time")]},
        {"role": "tool", "tool_call_id": "call_of_time", "content": "noon"},
        {"role": "tool", "tool_call_id": "call_of_weather", "content": [{"type": "text", "text": "3"}]},
        {"role": "assistant", "content": "Cold at noon."},
    ]
    calling, noon, cold = to_conversation({"messages": messages}, "openai")["messages"][1:4]
    assert calling["content"] == ""
    assert [c["function"] for c in calling["tool_calls"]] == [
        {"name": "weather", "arguments": {"city": "Oslo"}},
        {"name": "time", "arguments": {"city": "Oslo"}},
    ]
    assert noon == {"role": "tool", "content": "noon", "tool_call_id": calling["tool_calls"][1]["id"], "name": "time"}
    assert cold == {"role": "tool", "content": "3", "tool_call_id": calling["tool_calls"][0]["id"], "name": "weather"}
    messages[2]["tool_call_id"] = "call_of_nobody"
    with pytest.raises(RowRejected, match="answers no call"):
        to_conversation({"messages": messages}, "openai")


def test_the_old_function_call_of_openai():
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
        {"role": "function", "name": "weather", "content": "3"},
        {"role": "assistant", "content": "Cold."},
    ]
    made = to_conversation({"messages": messages, "functions": [WEATHER]}, "openai")
    assert made["messages"][1] == called(city="Oslo")
    assert made["tools"] == [{"type": "function", "function": WEATHER}]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"loss": False}, {"weight": 0.0}])
def test_an_answer_of_weight_0_is_kept_and_not_trained_on(mark):
    row = chat(("user", "a"), ("assistant", "A"), ("user", "b"), ("assistant", "B"))
    row["messages"][1] |= mark
    row["messages"][3] |= {"weight": 1, "loss": True}
    expected = chat(("user", "a"), ("assistant", "A"), ("user", "b"), ("assistant", "B"))
    expected["messages"][1]["loss"] = False
    assert to_conversation(row, "openai") == expected


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"weight": 0.5}, "weight must be 0 or 1"),
        ({"loss": "yes"}, "loss must be 0 or 1"),
        ({"weight": 0}, "no assistant turn to learn from: each has weight 0"),
        ({"content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}, "need model_type vlm"),
        (
            {"tool_calls": [{"function": {"name": "x", "arguments": "[1]"}}]},
            "arguments of a tool call must be an object, not a list",
        ),
        ({"tool_calls": [{"function": {"name": "x", "arguments": "{"}}]}, "arguments of a tool call is not JSON"),
        ({"tool_calls": [{"function": {}}]}, "a tool call must be an object with a name"),
        ({"role": "tool_call", "content": "[]"}, "a function_call without a call"),
        ({"role": "user", "tool_calls": [{"name": "x"}]}, "tool calls in a turn of user"),
        ({"role": "user", "weight": 1}, "weight in a turn of user"),
        ({"role": "tool"}, "a tool's result must follow an assistant turn"),
    ],
)
def test_unusable_turns_say_why(turn, reason):
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"} | turn]}
    with pytest.raises(RowRejected, match=reason):
        to_conversation(row, "openai")


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
        (sharegpt(("human", "Hi"), ("function_call", "x"), ("gpt", "y")), "a tool call is not JSON"),
        (sharegpt(("human", "Hi"), ("function_call", SAID), ("gpt", "y")), "a tool call without its result"),
        (sharegpt(("human", "Hi"), ("gpt", "x")) | {"tools": "{"}, "tools is not JSON"),
        (sharegpt(("human", "Hi"), ("gpt", "x")) | {"tools": ["x"]}, "a tool must be an object with a name"),
        (sharegpt(("human", "Hi"), ("gpt", "x")) | {"images": ["a.png"]}, "images need model_type vlm"),
        ({"conversations": ["x"]}, "a turn must be an object"),
        (
            {"conversations": [{"human": "a", "assistant": "b"}, {"from": "gpt", "value": "c", "weight": 0}]},
            "different weights can't be merged",
        ),
    ],
)
def test_unusable_rows_say_why(row, reason):
    with pytest.raises(RowRejected, match=reason):
        to_conversation(row, "sharegpt")


HI, HELLO, RUDE = [{"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Hello"), ("assistant", "Go away"))]
SYSTEM = {"role": "system", "content": "Be kind."}
BEFORE = [HI, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "And?"}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"},
        {"prompt": "Hi", "chosen": HELLO, "rejected": RUDE},
        {"prompt": "Hi", "chosen": [HELLO], "rejected": "Go away"},
        {"prompt": [HI], "chosen": [HELLO], "rejected": [RUDE]},
        {"messages": [HI], "chosen": "Hello", "rejected": "Go away"},
        {"prompt": "Hi", "chosen": [HI | {"content": "Hi\n"}, HELLO], "rejected": [HI, RUDE]},
        {"prompt": "Hi", "messages": [HI, HELLO], "chosen": [HI, HELLO], "rejected": [HI, RUDE]},
        {"chosen": [HI, HELLO], "rejected": [HI, RUDE]},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Go away"},
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "Hello", "rejected": "Go away"},
        {"input": {"messages": [HI]}, "preferred_output": [HELLO], "non_preferred_output": [RUDE]},
        {"messages": [HI, HELLO], "rejected_response": "Go away"},
        {"messages": [HI, HELLO], "rejected_response": [RUDE]},
        sharegpt(("human", "Hi"))
        | {"chosen": {"from": "gpt", "value": "Hello"}, "rejected": {"from": "gpt", "value": "Go away"}},
        {"conversation": [{"human": "Hi"}], "chosen": "Hello", "rejected": "Go away"},
        sharegpt(("human", "Hi"), ("gpt", "Hello")) | {"rejected_response": "Go away"},
    ],
)
def test_every_shape_of_a_preference_is_the_same_two_conversations(row):
    pair = Preference(chat(("user", "Hi"), ("assistant", "Hello")), chat(("user", "Hi"), ("assistant", "Go away")))
    assert parse(row, "preference") == parse(row, "auto") == pair
    assert to_conversation(row, "auto") == pair.chosen


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": BEFORE, "chosen": "Hello", "rejected": "Go away"},
        {"chosen": [*BEFORE, HELLO], "rejected": [*BEFORE, RUDE]},
        {"prompt": BEFORE, "chosen": [*BEFORE, HELLO], "rejected": [RUDE]},
        {"messages": [*BEFORE, HELLO], "rejected_response": "Go away"},
        {"input": {"messages": BEFORE}, "preferred_output": [HELLO], "non_preferred_output": [RUDE]},
        {
            side: f"\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: And?\n\nAssistant: {said}"
            for side, said in (("chosen", "Hello"), ("rejected", "Go away"))
        },
    ],
)
def test_of_a_preference_only_the_answer_is_trained_on(row):
    pair = parse(row, "preference")
    for side, said in ((pair.chosen, "Hello"), (pair.rejected, "Go away")):
        assert [(m["content"], m.get("loss", True)) for m in side["messages"] if m["role"] == "assistant"] == [
            ("Yes?", False),
            (said, True),
        ]


@pytest.mark.parametrize(
    "row",
    [
        {"system": "Be kind.", "prompt": "Hi", "chosen": "Hello", "rejected": "Go away"},
        {"prompt": [SYSTEM, HI], "chosen": "Hello", "rejected": "Go away"},
        {"prompt": [SYSTEM, HI], "chosen": [HI, HELLO], "rejected": [SYSTEM, HI, RUDE]},
        {"prompt": "Hi", "chosen": [SYSTEM, HI, HELLO], "rejected": [SYSTEM, HI, RUDE]},
        {"chosen": [SYSTEM, HI, HELLO], "rejected": [SYSTEM, HI, RUDE]},
    ],
)
def test_a_preference_may_have_its_system_message_anywhere(row):
    pair = parse(row, "preference")
    assert pair.chosen["messages"] == [SYSTEM, HI, HELLO]
    assert pair.rejected["messages"] == [SYSTEM, HI, RUDE]


def test_two_answers_that_are_the_same_are_a_preference():
    assert parse({"chosen": [*BEFORE, HELLO], "rejected": [*BEFORE, HELLO]}, "preference") == parse(
        {"prompt": BEFORE, "chosen": "Hello", "rejected": "Hello"}, "preference"
    )


def test_answers_that_part_at_a_tool_call_are_whole():
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}],
    }
    result, cold = {"role": "tool", "content": "3"}, {"role": "assistant", "content": "Cold."}
    tools = {"tools": [{"type": "function", "function": WEATHER}]}
    row = {
        "input": {"messages": [HI], **tools, "parallel_tool_calls": True},
        "preferred_output": [call],
        "non_preferred_output": [RUDE],
    }
    assert to_conversation(row, "auto") == {"messages": [HI, called(city="Oslo")], **tools}
    pair = parse({"chosen": [HI, call, result, cold], "rejected": [HI, RUDE], **tools}, "auto")
    assert [m.get("loss", True) for m in pair.chosen["messages"]] == [True] * 4
    assert pair.rejected == {"messages": [HI, RUDE], **tools}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Hi", "chosen": "Hello"}, 'no "rejected"'),
        ({"prompt": "Hi", "rejected": "Hello"}, 'no "chosen"'),
        ({"prompt": "Hi", "chosen": " ", "rejected": "b"}, "chosen is empty"),
        ({"prompt": "Hi", "chosen": "a", "rejected": []}, "rejected is empty"),
        (
            {"prompt": "Hi", "chosen": 3, "rejected": "b"},
            "chosen must be a string, a message or a list of messages, not a number",
        ),
        ({"prompt": "Hi", "chosen": ["a"], "rejected": "b"}, "a turn must be an object"),
        (
            {"prompt": "Hi", "chosen": "a", "rejected": {"role": "assistant", "content": " "}},
            "isn't preferred: empty assistant turn",
        ),
        ({"prompt": "Hi", "chosen": [HI], "rejected": "b"}, "chosen holds no answer to the prompt"),
        ({"prompt": "Ho", "chosen": [HI, HELLO], "rejected": "b"}, "chosen begins with other turns than the prompt's"),
        ({"prompt": [HI, HELLO], "chosen": "a", "rejected": "b"}, "the prompt of chosen ends with an answer"),
        ({"chosen": "a", "rejected": "b"}, "no prompt: none beside chosen and rejected, and they begin with no"),
        ({"chosen": [HI, HELLO], "rejected": [BEFORE[2], RUDE]}, "no prompt: none beside"),
        ({"messages": [HI], "rejected_response": "b"}, "messages before it that end with the preferred answer"),
        ({"rejected_response": "b"}, "messages before it that end with the preferred answer"),
        ({"messages": [HELLO], "rejected_response": "b"}, "no assistant turn that answers a user"),
        ({"messages": [HI, HELLO], "rejected_response": " "}, "rejected_response is empty"),
        ({"input": {"messages": [HI]}, "preferred_output": [HELLO]}, 'no "non_preferred_output"'),
        ({"input": "Hi", "preferred_output": [HELLO], "non_preferred_output": [RUDE]}, 'no "input" with a list "messages"'),
    ],
)
def test_an_unusable_preference_says_why(row, reason):
    for dataset_format in ("preference", "auto"):
        with pytest.raises(RowRejected, match=reason):
            parse(row, dataset_format)


def test_a_row_of_one_answer_is_no_preference():
    with pytest.raises(RowRejected, match="not two answers: a preference row has the keys chosen and rejected; preferred_output"):
        parse(chat(("user", "Hi"), ("assistant", "Hello")), "preference")


ROLE_NAMES = st.sampled_from(["human", "gpt", "user", "assistant", "system", "tool", "function_call", "observation"])
scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | ROLE_NAMES | st.just(SAID)
KEYS = [
    *("from", "value", "role", "content", "conversations", "conversation", "messages", "human", "assistant", "system", "tools"),
    *("tool_calls", "function", "name", "arguments", "weight", "loss", "instruction", "input", "output", "history", "prompt"),
    *("completion", "query", "response", "text", "chosen", "rejected", "rejected_response", "preferred_output"),
    "non_preferred_output",
]
anything = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(KEYS), v, max_size=6), max_leaves=12
)
turns = st.lists(
    st.fixed_dictionaries(
        {"role": ROLE_NAMES, "content": st.sampled_from(["a", "b", SAID]) | anything},
        optional={"weight": scalars, "loss": scalars},
    ),
    max_size=7,
)
sides = st.sampled_from(["a", " "]) | turns | anything
pairs = (
    st.fixed_dictionaries({"messages": turns, "rejected_response": sides})
    | st.fixed_dictionaries({"chosen": sides, "rejected": sides}, optional={"prompt": sides, "messages": turns})
    | st.fixed_dictionaries(
        {"preferred_output": sides, "non_preferred_output": sides, "input": st.fixed_dictionaries({"messages": turns})}
    )
)
FORMATS = ["sharegpt", "openai", "alpaca", "prompt_completion", "text", "preference", "auto"]


@given(anything | st.fixed_dictionaries({"messages": turns}) | pairs, st.sampled_from(FORMATS))
def test_any_json_is_either_a_good_conversation_or_rejected(row, dataset_format):
    try:
        made = parse(row, dataset_format)
    except RowRejected:
        return  # any other exception fails the test
    for side in (made.chosen, made.rejected) if isinstance(made, Preference) else (made,):
        check_conversation(side)


def check_conversation(made):
    assert json.loads(json.dumps(made)) == made
    if "text" in made:
        return
    roles = [m["role"] for m in made["messages"]]
    assert roles[-1] == "assistant"
    assert next(r for r in roles if r != "system") == "user"
    assert all(a != b or a == "tool" for a, b in pairwise(roles))
    assert all(isinstance(m["content"], str) for m in made["messages"])


def test_a_rejected_row_holds_nothing_of_the_others():
    class Made:
        def __init__(self, row):
            if row == "bad":
                raise RowRejected("it is bad")

    gc.disable()
    try:
        made = each(Made, ["good", "bad", "good"])
        assert made[1].reason == "it is bad"
        held = [weakref.ref(made[0]), weakref.ref(made[2])]
        del made
        assert [ref() for ref in held] == [None, None]
    finally:
        gc.enable()
