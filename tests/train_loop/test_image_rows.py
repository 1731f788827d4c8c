"""Rows that show images, in every shape that datasets have: one conversation, and its images in order."""

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train_loop.data.formats import RowRejected, to_conversation

IMAGE = {"type": "image"}
DATA = "data:image/png;base64,AAAA"


def text(said):
    return {"type": "text", "text": said}


def made(row, dataset_format="auto"):
    """(contents of the user's turns, images) of the conversation that the row becomes."""
    conversation = to_conversation(row, dataset_format, vision=True)
    asked = [m["content"] for m in conversation["messages"] if m["role"] == "user"]
    return asked, conversation.get("images")


def asking(content, **more):
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}]} | more


def sharegpt(*turns, **more):
    return {"conversations": [{"from": who, "value": said} for who, said in turns], **more}


CAT = ([[IMAGE, text("What is it?")]], ["cat.png"])
SHAPES = {
    "ShareGPT": (sharegpt(("human", "<image>What is it?"), ("gpt", "A cat."), images=["cat.png"]), CAT),
    "LLaVA": (
        sharegpt(("human", "<image>\nWhat is it?"), ("gpt", "A cat."), image="cat.png", id="7"),
        ([[IMAGE, text("\nWhat is it?")]], ["cat.png"]),
    ),
    "no placeholder": (sharegpt(("human", "What is it?"), ("gpt", "A cat."), image="cat.png"), CAT),
    "pairs": ({"conversation": [{"human": "<image>What is it?", "assistant": "A cat."}], "image": "cat.png"}, CAT),
    "objects with a path": (
        sharegpt(("human", "What is it?"), ("gpt", "A cat."), images=[{"path": "cat.png", "bytes": None}]),
        CAT,
    ),
    "an object with a URL": (
        sharegpt(("human", "What is it?"), ("gpt", "A cat."), image={"url": "s3://b/cat.png"}),
        ([[IMAGE, text("What is it?")]], ["s3://b/cat.png"]),
    ),
    "bytes": (
        sharegpt(("human", "What is it?"), ("gpt", "A cat."), images=[{"bytes": "AAAA", "path": "cat.png"}]),
        ([[IMAGE, text("What is it?")]], ["data:;base64,AAAA"]),
    ),
    "OpenAI": (asking([{"type": "image_url", "image_url": {"url": "cat.png", "detail": "low"}}, text("What is it?")]), CAT),
    "OpenAI, in short": (asking([{"type": "image_url", "image_url": "cat.png"}, text("What is it?")]), CAT),
    "OpenAI's responses": (
        asking([{"type": "input_text", "text": "What is it?"}, {"type": "input_image", "image_url": DATA}]),
        ([[text("What is it?"), IMAGE]], [DATA]),
    ),
    "Qwen": (asking([{"type": "image", "image": "cat.png"}, text("What is it?")]), CAT),
    "transformers": (asking([{"type": "image", "url": "cat.png"}, text("What is it?")]), CAT),
    "a path in a part": (asking([{"type": "image", "path": "cat.png"}, text("What is it?")]), CAT),
    "TRL": (asking([IMAGE, text("What is it?")], images=["cat.png"]), CAT),
    "text with a placeholder": (asking("<image>What is it?", images=["cat.png"]), CAT),
    "Alpaca": ({"instruction": "<image>What is it?", "input": "", "output": "A cat.", "image": "cat.png"}, CAT),
    "prompt and completion": ({"prompt": "What is it?", "completion": "A cat.", "images": ["cat.png"]}, CAT),
    "a placeholder that is text": (
        asking([IMAGE, text("What is <image> in HTML?")], images=["cat.png"]),
        ([[IMAGE, text("What is <image> in HTML?")]], ["cat.png"]),
    ),
    "no image": (asking("What is it?", images=[]), (["What is it?"], None)),
    "parts of text alone": (asking([text("What "), text("is it?")]), (["What is it?"], None)),
    "two in a turn": (
        asking("<image> or <image>?", images=["a.png", "b.png"]),
        ([[IMAGE, text(" or "), IMAGE, text("?")]], ["a.png", "b.png"]),
    ),
    "in several turns": (
        sharegpt(("human", "<image>"), ("gpt", "x"), ("human", "And <image>"), ("gpt", "y"), images=["a.png", "b.png"]),
        ([[IMAGE], [text("And "), IMAGE]], ["a.png", "b.png"]),
    ),
    "no placeholder for two": (
        sharegpt(("human", "Hi"), ("gpt", "x"), ("human", "And?"), ("gpt", "y"), images=["a.png", "b.png"]),
        ([[IMAGE, IMAGE, text("Hi")], "And?"], ["a.png", "b.png"]),
    ),
    "turns that are merged": (
        sharegpt(("human", "<image>"), ("human", "What?"), ("gpt", "x"), images=["a.png"]),
        ([[IMAGE, text("\n\nWhat?")]], ["a.png"]),
    ),
    "turns that are dropped": (
        sharegpt(("human", "<image>a"), ("gpt", "x"), ("human", "<image>b"), images=["a.png", "b.png"]),
        ([[IMAGE, text("a")]], ["a.png"]),
    ),
    "an image of which nothing is left": (
        sharegpt(("human", "a"), ("gpt", "x"), ("human", "<image>"), images=["b"]),
        (["a"], None),
    ),
    "a placeholder that the assistant says": (
        sharegpt(("human", "<image>Tag?"), ("gpt", "It is <image>."), images=["a.png"]),
        ([[IMAGE, text("Tag?")]], ["a.png"]),
    ),
    "a name with blanks around": (sharegpt(("human", "What is it?"), ("gpt", "A cat."), image=" cat.png\n"), CAT),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_a_row_with_images(shape):
    row, expected = SHAPES[shape]
    assert made(row) == expected
    assert json.loads(json.dumps(to_conversation(row, "auto", vision=True)))["messages"][-1]["role"] == "assistant"


def test_a_tool_may_answer_with_an_image():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": "{}"}}]}
    shown = {"role": "tool", "content": [{"type": "image_url", "image_url": {"url": "screen.png"}}]}
    messages = [{"role": "user", "content": "Look."}, call, shown, {"role": "assistant", "content": "A cat."}]
    conversation = to_conversation({"messages": messages}, "openai", vision=True)
    assert conversation["messages"][2]["content"] == [IMAGE]
    assert conversation["images"] == ["screen.png"]


REFUSED = {
    "too many images": (asking("<image>?", images=["a", "b"]), "2 images for 1 placeholders"),
    "too few": (asking("<image><image>?", images=["a"]), "1 images for 2 placeholders"),
    "none": (asking("<image>?"), "0 images for 1 placeholders"),
    "too few for parts": (asking([IMAGE, IMAGE], images=["a"]), "1 images for 2 placeholders (image parts)"),
    "besides those of parts": (asking([{"type": "image", "image": "a"}], images=["b"]), "1 images for 0 placeholders"),
    "image and images": (asking("?", image="a", images=["b"]), "has both image and images"),
    "a number": (asking("?", images=[5]), "an image must be a path, a URI or an object with path, url or bytes, not a number"),
    "null": (asking("?", images=[None]), "an image must be a path, a URI"),
    "an empty object": (asking("?", images=[{}]), "an image must be a path, a URI"),
    "a list in a list": (asking("?", images=[["a"]]), "an image must be a path, a URI"),
    "no name": (asking("?", images=[" "]), "an image without a name"),
    "a part without a URL": (asking([{"type": "image_url", "image_url": {}}]), "an image must be a path, a URI"),
    "the assistant's": (
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": [{"type": "image", "image": "a"}]}]},
        "an image in a turn of assistant",
    ),
    "the system's": (
        {"messages": [{"role": "system", "content": [IMAGE]}, *asking("?")["messages"]]},
        "an image in a turn of system",
    ),
    "a video": (asking("?", videos=["a.mp4"]), "videos: of media only images can be trained on"),
    "a part of sound": (asking([{"type": "input_audio", "input_audio": {}}]), "content parts other than text and images"),
    "text alone": ({"text": "Once upon a time", "image": "a"}, "images need a conversation"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_row_whose_images_have_no_place_says_why(kind):
    row, reason = REFUSED[kind]
    with pytest.raises(RowRejected) as refused:
        to_conversation(row, "text" if "text" in row else "auto", vision=True)
    assert refused.value.reason.startswith(reason)


@pytest.mark.parametrize("shape", [name for name, (_, (_, images)) in SHAPES.items() if images])
def test_an_llm_takes_no_row_with_images(shape):
    with pytest.raises(RowRejected, match="images need model_type vlm"):
        to_conversation(SHAPES[shape][0], "auto")


def test_what_looks_like_a_mark_of_ours_is_no_other_image():
    """Whoever writes the marks names images as every row may: they are counted, looked up and refused like others."""
    for content in ("\ufdd0", "\ufdd1", "\ufdd0\ufdd1", "\ufdd0x\ufdd1", "\ufdd0x"):
        for images in ([], ["a"]):
            try:
                conversation = to_conversation(asking(content, images=images), "openai", vision=True)
            except RowRejected:
                continue
            shown = [p for m in conversation["messages"] if isinstance(m["content"], list) for p in m["content"] if p == IMAGE]
            assert len(shown) == len(conversation.get("images", []))


references = st.sampled_from(
    ["a.png", "", DATA, None, 3, {"path": "a"}, {"bytes": base64.b64encode(b"x").decode()}, {"url": None}]
)
parts = st.sampled_from([IMAGE, text("a"), text("<image>"), {"type": "image_url"}, {"type": "video"}, "x", None])
contents = st.text(max_size=3) | st.lists(parts | st.builds(lambda r: {"type": "image", "image": r}, references), max_size=4)
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": contents | st.just("<image>")}
)


@given(st.lists(turns, max_size=6), st.lists(references, max_size=3) | references)
def test_any_row_has_as_many_image_parts_as_images_or_is_rejected(messages, images):
    try:
        conversation = to_conversation({"messages": messages, "images": images}, "openai", vision=True)
    except RowRejected:
        return
    lists = [m["content"] for m in conversation["messages"] if not isinstance(m["content"], str)]
    assert sum(part == IMAGE for content in lists for part in content) == len(conversation.get("images", []))
    assert all(IMAGE in content for content in lists)
