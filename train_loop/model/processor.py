"""The processor of a model that sees: what makes tensors of an image, and says which tokens stand for it in the text.

transformers' own loader wants torchvision for nearly every one of them, as they take videos too. Here their parts are put
together without those for videos, which no job has.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from train_loop.errors import ModelError, why_unloadable
from train_loop.model.tokenizer import BASE_MODEL

# What a processor is described by, besides the tokenizer; each base has some of them.
FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def load_processor(folder: Path, tokenizer: Any) -> Any:
    """The base model's processor for text and images. Raises ModelError where it has none.

    It has the base's chat template, and a copy of the `tokenizer` that `load_tokenizer` gives: some add tokens of theirs to it,
    which what is handed out goes without. Images are processed by Pillow, whatever else is installed, so that a machine with
    torchvision makes the same tensors.
    """
    from transformers import AutoImageProcessor

    try:
        images = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
        kind = _for_images(_class(folder))
        described, _ = kind.get_processor_dict(folder)
        return kind.from_args_and_dict([images, copy.deepcopy(tokenizer)], described, video_processor=None)
    except ModelError:
        raise
    except Exception as error:  # files that anyone may have written, read by code that expects its own
        message = f"the base model's image processor can't be loaded: {why_unloadable(error)}"
        raise ModelError(message, field=BASE_MODEL) from error


def save_processor(base: Path, folder: Path) -> None:
    """Copy what describes the processor of the model in `base` beside a tokenizer that is saved in `folder`."""
    for name in FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)


def _class(folder: Path) -> Any:
    """transformers' class: the one that the files name, else the one that goes with the architecture."""
    from transformers import AutoConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name

    for name in (*FILES[:2], "tokenizer_config.json"):
        path = folder / name
        named = json.loads(path.read_text()).get("processor_class") if path.is_file() else None
        if named and (found := processor_class_from_name(named)) is not None:
            return found
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if type(config) not in PROCESSOR_MAPPING:
        raise ValueError(f"none is known for {config.model_type}")
    return PROCESSOR_MAPPING[type(config)]


def _for_images(kind: Any) -> Any:
    """A processor's class without its part for videos."""
    from transformers import ProcessorMixin
    from transformers.models.smolvlm import processing_smolvlm

    if processing_smolvlm.num2words is None:  # it spells out how many frames a video has, and nothing else
        processing_smolvlm.num2words = str
    parts = [part for part in kind.get_attributes() if "video" not in part]
    without = {
        "get_attributes": classmethod(lambda cls: parts),
        "apply_chat_template": ProcessorMixin.apply_chat_template,  # SmolVLM2's own looks at that part first
        "__module__": kind.__module__,
    }
    return type(kind.__name__, (kind,), without)
