"""What rows are prepared with is the base model's tokenizer, without transformers' classes and without torch."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.train_loop.test_chat_templates import FAMILIES, TALK, TOOL_TALK, made_as
from train_loop.data.tokenize import ChatTokenizer
from train_loop.errors import ModelError
from train_loop.model.tokenizer import TextTokenizer, load_tokenizer
from train_loop.spec import Prompt

# The class that a folder names and the model's kind decide together what transformers makes of the files.
CLASSES = {
    f"{model_type} {class_name}": (model_type, class_name)
    for model_type, class_name in [
        ("llama", "GPT2Tokenizer"),
        ("llama", "LlamaTokenizer"),
        ("llama", "PreTrainedTokenizerFast"),
        ("qwen2", "Qwen2Tokenizer"),
        ("gemma2", "GemmaTokenizer"),
        ("phi3", "LlamaTokenizerFast"),
        ("mistral", "LlamaTokenizer"),
        ("deepseek_v3", "LlamaTokenizerFast"),
        ("gpt2", None),
    ]
}
WITHOUT_TORCH = """
import json, sys
from pathlib import Path
sys.modules["torch"] = None
from train_loop.model.tokenizer import TextTokenizer, load_tokenizer
made = [TextTokenizer.of(load_tokenizer(Path(folder))).to_json() for folder in sys.argv[2:]]
Path(sys.argv[1]).write_text(json.dumps(made))
"""
AGAIN = """
import subprocess, sys
from pathlib import Path
from train_loop.model.tokenizer import load_text_tokenizer
started, real = [], subprocess.run
subprocess.run = lambda command, **how: started.append(command) or real(command, **how)
made = load_text_tokenizer(Path(sys.argv[1])).to_json()
print(len(started), *(name for name in ("torch", "transformers") if name in sys.modules), file=sys.stderr)
print(made)
"""
FRESH = """
import json, sys
from pathlib import Path
from pyarrow.fs import LocalFileSystem
from train_loop.data.pipeline import prepare_with_ray
from train_loop.data.prepare import prepare_local
from train_loop.data.sources import find_files
from train_loop.data.tokenize import ChatTokenizer
from train_loop.launch import launch
from train_loop.model.tokenizer import load_text_tokenizer
from train_loop.spec import JobSpec

spec, local = JobSpec.model_validate_json(sys.argv[1]), LocalFileSystem()
chat = ChatTokenizer.of(spec, load_text_tokenizer(Path(sys.argv[2])))
prepared = prepare_local(spec, local, find_files(spec, local), local, sys.argv[3], chat)
print(json.dumps([prepared.num_rows, [name for name in ("torch", "transformers.models") if name in sys.modules]]))
"""


def in_fresh_process(script, *args):
    done = subprocess.run([sys.executable, "-c", script, *map(str, args)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_again(folder, cache):
    """What a fresh process says of how it came by the folder's tokenizer, and the tokenizer as JSON."""
    env = os.environ | {"TUNEYARD_MODEL_CACHE": str(cache)}
    done = subprocess.run([sys.executable, "-c", AGAIN, str(folder)], capture_output=True, text=True, check=True, env=env)
    return done.stderr.splitlines()[-1], done.stdout.strip()


MADE, KEPT = "1", "0"  # processes started


def test_what_was_made_before_is_taken_from_the_disk_without_transformers(mirror, tmp_path):
    folder, cache = tmp_path / "model", tmp_path / "cache"
    shutil.copytree(mirror / "tuneyard/tiny-random-llama", folder)
    how, first = loaded_again(folder, cache)
    assert how == MADE
    assert first == TextTokenizer.of(load_tokenizer(folder)).to_json()
    assert loaded_again(folder, cache) == (KEPT, first)

    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    how, changed = loaded_again(folder, cache)
    assert (how, json.loads(changed)["chat_template"]) == (MADE, template.read_text())

    for entry in cache.glob("tokenizer-*/*"):
        entry.write_text(entry.read_text()[:100])  # as a machine may leave them that lost its power
    assert loaded_again(folder, cache) == (MADE, changed)
    assert loaded_again(folder, cache) == (KEPT, changed)


def test_a_disk_that_takes_nothing_keeps_nothing(mirror, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    folder = mirror / "tuneyard/tiny-random-llama"
    for _ in range(2):
        assert loaded_again(folder, tmp_path / "cache") == (MADE, TextTokenizer.of(load_tokenizer(folder)).to_json())


@pytest.mark.parametrize("lazy", [True, False])
def test_preparing_rows_imports_no_torch(local_job, tmp_path, mirror, lazy):
    job = json.dumps(local_job({"dataset_config.preprocessing.lazy_tokenize": lazy}))
    said = in_fresh_process(FRESH, job, mirror / "tuneyard/tiny-random-llama", tmp_path / "run")
    assert json.loads(said.splitlines()[-1]) == [40, []]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer, mirror):
    """The families' tokenizers as they would be published, and one as those of several kinds of models."""
    made = {}
    for one in FAMILIES:
        made[one.name] = tmp_path_factory.mktemp("family")
        made_as(one, tokenizer).tokenizer.save_pretrained(made[one.name])
        (made[one.name] / "config.json").write_text((mirror / "tuneyard/tiny-random-llama/config.json").read_text())
    for name, (model_type, class_name) in CLASSES.items():
        made[name] = tmp_path_factory.mktemp("kind")
        tokenizer.save_pretrained(made[name])
        (made[name] / "config.json").write_text(json.dumps({"model_type": model_type}))
        config = json.loads((made[name] / "tokenizer_config.json").read_text()) | {"tokenizer_class": class_name}
        (made[name] / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    made["smollm2 itself"] = mirror / "HuggingFaceTB/SmolLM2-135M-Instruct"
    return made


@pytest.fixture(scope="module")
def without_torch(folders, tmp_path_factory):
    file = tmp_path_factory.mktemp("made") / "tokenizers.json"
    in_fresh_process(WITHOUT_TORCH, file, *folders.values())
    return dict(zip(folders, map(TextTokenizer.from_json, json.loads(file.read_text())), strict=True))


@pytest.mark.parametrize("name", [*(f.name for f in FAMILIES), *CLASSES, "smollm2 itself"])
def test_it_is_the_tokenizer_that_transformers_makes_with_torch(folders, without_torch, name):
    theirs, ours = load_tokenizer(folders[name]), without_torch[name]
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    for field in ("special_tokens_map", "all_special_ids", "bos_token_id", "eos_token_id", "eos_token", "split_special_tokens"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.get_vocab() == theirs.get_vocab()
    assert {i: str(t) for i, t in ours.added_tokens_decoder.items()} == {
        i: str(t) for i, t in theirs.added_tokens_decoder.items()
    }
    assert ours.num_special_tokens_to_add() == theirs.num_special_tokens_to_add()
    text = "  It's 2026:\n\nnäïve 日本 🚢<|im_end|> <s>[INST]\t"
    for add in (True, False):
        how = {"add_special_tokens": add, "return_offsets_mapping": True}
        assert ours(text, **how) == {k: v for k, v in theirs(text, **how).items() if k != "attention_mask"}
    assert ours(text) == {"input_ids": theirs(text)["input_ids"]}


@pytest.mark.parametrize("name", [f.name for f in FAMILIES])
def test_it_makes_the_same_samples(folders, without_torch, name):
    ours, theirs = (
        ChatTokenizer(made, Prompt(max_length=4096), "right", "assistant")
        for made in (pickle.loads(pickle.dumps(without_torch[name])), load_tokenizer(folders[name]))
    )
    has_tools = next(f.has_tools for f in FAMILIES if f.name == name)
    for talk in ({"messages": TALK}, {"text": "Plain text."}, *([TOOL_TALK] if has_tools else [])):
        made, expected = ours.encode(talk), theirs.encode(talk)
        np.testing.assert_array_equal(made.input_ids, expected.input_ids)
        np.testing.assert_array_equal(made.labels, expected.labels)


def test_a_chat_with_tools_has_the_template_for_it(folders):
    theirs = load_tokenizer(folders["smollm2"])
    for templates in ({"default": "a", "tool_use": "b"}, {"default": "a"}, {"rag": "c"}, "d", None):
        theirs.chat_template = templates
        ours = TextTokenizer.of(theirs)
        for tools in (None, [], [{"name": "one"}]):
            try:
                expected = theirs.get_chat_template(tools=tools)
            except ValueError:
                with pytest.raises(ValueError, match="template"):
                    ours.get_chat_template(tools=tools)
            else:
                assert ours.get_chat_template(tools=tools) == expected


def test_truncation_that_a_file_asks_for_is_not_done(folders):
    tokenizer = load_tokenizer(folders["smollm2"])
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    assert TextTokenizer.of(tokenizer)("One two three.") == {
        "input_ids": load_tokenizer(folders["smollm2"])("One two three.").input_ids
    }


def test_a_folder_that_has_none_says_so_without_torch_too(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    said = in_fresh_process(
        "import sys; from pathlib import Path; from train_loop.errors import ModelError;"
        "from train_loop.model.tokenizer import load_text_tokenizer\n"
        "try: load_text_tokenizer(Path(sys.argv[1]))\n"
        "except ModelError as error: print(error.message)",
        tmp_path,
    )
    assert "the base model's tokenizer can't be loaded: " in said


def test_one_that_is_not_of_tokenizers_is_refused_in_plain_words():
    with pytest.raises(ModelError, match="give the model a tokenizer"):
        TextTokenizer.of(object())
