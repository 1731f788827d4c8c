"""The adapter as a user gets it: PEFT layout plus tokenizer, chat template and a README."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train_loop.data.sources import make_folder
from train_loop.metrics import MetricLog
from train_loop.spec import JobSpec

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

README = """---
base_model: {base}
library_name: peft
---
# {name}

LoRA adapter for `{base}`, trained by Tuneyard.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("<this folder>")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "<this folder>")
```

Evaluation loss: {before} before training, {after} after.
"""


def write_adapter(folder: Path, spec: JobSpec, model: Any, tokenizer: Any, log: MetricLog) -> None:
    """Write the adapter's files into the local `folder`."""
    model.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    show = lambda v: "not measured" if v is None else f"{v:.4f}"  # noqa: E731
    (folder / "README.md").write_text(
        README.format(
            base=spec.model_details.base_model,
            name=spec.experiment_name,
            before=show(log.eval_before),
            after=show(log.eval_after),
        )
    )


def upload(folder: Path, storage: FileSystem, path: str) -> None:
    """Copy the local `folder` to `path` in object storage, replacing files of the same name."""
    from pyarrow.fs import LocalFileSystem, copy_files

    make_folder(storage, path)
    copy_files(str(folder), path, source_filesystem=LocalFileSystem(), destination_filesystem=storage)


def digest(storage: FileSystem, path: str) -> list[dict[str, Any]]:
    """Name, size and sha256 of each file under `path`, read back from storage: what is really there."""
    from pyarrow.fs import FileSelector, FileType

    files = []
    for info in storage.get_file_info(FileSelector(path, recursive=True)):
        if info.type == FileType.File:
            sha = hashlib.sha256()
            with storage.open_input_stream(info.path) as stream:
                while block := stream.read(1 << 20):
                    sha.update(block)
            files.append({"name": info.path.removeprefix(f"{path}/"), "size_bytes": info.size, "sha256": sha.hexdigest()})
    return sorted(files, key=lambda f: str(f["name"]))
