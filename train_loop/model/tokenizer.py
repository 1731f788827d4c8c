"""The base model's tokenizer: transformers' own, and what making tokens needs of it.

transformers tells a tokenizer's class by the model's, for which it imports torch: seconds, and hundreds of MB in every process
that prepares rows. It does without where there is no torch, so a process that has none yet asks one that can't have any. That
takes seconds too: the answer is kept on this machine's disk, under a name that tells what it was made of.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from train_loop.errors import ModelError, why_unloadable
from train_loop.model import cache

BASE_MODEL = "model_details.base_model"
OLD_TEMPLATE = "chat_template.json"  # where models that see had theirs, before it went into a file of its own
FILES = {".json", ".jinja", ".model", ".txt"}  # that say how a base model makes tokens
MAKERS = ("tuneyard", "transformers", "tokenizers")
KEPT = "text_tokenizer.json"
WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # not to be imported
from train_loop.model.tokenizer import hand_over
hand_over(sys.argv[1])
"""


def load_tokenizer(folder: Path) -> Any:
    """The model's tokenizer; one without a pad token pads with its end-of-sequence token. Raises ModelError.

    Its chat template may be one that the base has for its processor only.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if tokenizer.chat_template is None and (folder / OLD_TEMPLATE).is_file():
            tokenizer.chat_template = json.loads((folder / OLD_TEMPLATE).read_text())["chat_template"]
    except Exception as error:  # tokenizers raises nothing narrower of a file that it can't read
        raise ModelError(f"the base model's tokenizer can't be loaded: {why_unloadable(error)}", field=BASE_MODEL) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@dataclass(frozen=True)
class TextTokenizer:
    """What of a tokenizer turns text into tokens, by the names that it has in transformers. Picklable, and free of torch."""

    backend_tokenizer: Tokenizer
    chat_template: str | dict[str, str] | None
    special_tokens_map: dict[str, str]
    all_special_ids: list[int]
    bos_token_id: int | None
    eos_token_id: int | None
    split_special_tokens: bool

    @classmethod
    def of(cls, tokenizer: Any) -> TextTokenizer:
        """Of one of transformers, which mustn't be changed from then on. Raises ModelError if it isn't one of `tokenizers`."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ModelError(
                f"the base model's tokenizer is a {type(tokenizer).__name__}, which doesn't say where in a text its tokens are: "
                "give the model a tokenizer.json.",
                field=BASE_MODEL,
            )
        return cls(
            backend,
            tokenizer.chat_template,
            tokenizer.special_tokens_map,
            tokenizer.all_special_ids,
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            tokenizer.split_special_tokens,
        )

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(vars(self) | {"backend_tokenizer": self.backend_tokenizer.to_str()})

    @classmethod
    def from_json(cls, text: str) -> TextTokenizer:
        """What `to_json` wrote."""
        fields = json.loads(text)
        return cls(**fields | {"backend_tokenizer": Tokenizer.from_str(fields["backend_tokenizer"])})

    @property
    def eos_token(self) -> str | None:
        """What ends a text."""
        return self.special_tokens_map.get("eos_token")

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The tokens that are looked for in a text before all others, by id."""
        return self.backend_tokenizer.get_added_tokens_decoder()

    def get_vocab(self) -> dict[str, int]:
        """The id of each token."""
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def num_special_tokens_to_add(self) -> int:
        """How many tokens a text gets besides its own."""
        return self.backend_tokenizer.num_special_tokens_to_add(False)

    def get_chat_template(self, tools: Any = None) -> str:
        """The template for a chat with these tools. Raises ValueError where there is none."""
        templates = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        template = templates.get("tool_use") if tools is not None else None
        template = templates.get("default") if template is None else template
        if template is None:
            raise ValueError("no chat template")
        return template

    def __call__(self, text: str, *, add_special_tokens: bool = True, return_offsets_mapping: bool = False) -> dict[str, Any]:
        """The text's `input_ids`, and the `offset_mapping` of where in it each token is, in characters."""
        backend = self.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = self.split_special_tokens
        made = backend.encode(text, add_special_tokens=add_special_tokens)
        return {"input_ids": made.ids} | ({"offset_mapping": made.offsets} if return_offsets_mapping else {})


def load_text_tokenizer(folder: Path, cache_bytes: int = cache.DEFAULT_BYTES) -> TextTokenizer:
    """The same for text alone, without importing torch. Raises ModelError."""
    if "torch" in sys.modules:
        return TextTokenizer.of(load_tokenizer(folder))
    made_by = " ".join([tokenizer_hash(folder), *map(version, MAKERS)])
    entry = cache.root() / f"tokenizer-{hashlib.sha256(made_by.encode()).hexdigest()[:24]}"
    with contextlib.suppress(OSError), cache.entry(entry, cache_bytes):  # a disk that can't be written to keeps nothing
        with contextlib.suppress(FileNotFoundError, ValueError):  # none, or half of one
            return TextTokenizer.from_json((entry / KEPT).read_text())
        made = TextTokenizer.from_json(text := _made(folder))
        part = entry.with_suffix(cache.PART)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        (part / KEPT).write_text(text)
        shutil.rmtree(entry, ignore_errors=True)
        os.replace(part, entry)
        return made
    return TextTokenizer.from_json(_made(folder))


def tokenizer_hash(folder: Path) -> str:
    """sha256 over the files of a base model that its tokenizer may be made of."""
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.suffix in FILES and p.is_file()):
        digest.update(str(file.relative_to(folder)).encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _made(folder: Path) -> str:
    """The folder's TextTokenizer as JSON, by a process of its own."""
    made = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(folder)],
        # The modules that this process finds, wherever Ray told it to look for them.
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=False,
        text=True,
    )
    if made.returncode == 0 and made.stdout:  # where signals of children are ignored, any end looks like a good one
        return made.stdout
    return TextTokenizer.of(load_tokenizer(folder)).to_json()


def hand_over(folder: str) -> None:
    """Write the folder's TextTokenizer to standard output."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)  # libraries may print
        out.write(TextTokenizer.of(load_tokenizer(Path(folder))).to_json())
