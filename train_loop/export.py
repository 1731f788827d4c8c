"""The adapter as a user gets it: PEFT layout plus tokenizer, chat template and a README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train_loop.metrics import MetricLog
from train_loop.spec import JobSpec
from train_loop.storage import hash_of, list_files

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


def verify(storage: FileSystem, path: str, files: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the `files` (name, size_bytes, sha256) are under `path`, read back from storage: what is really there."""
    sizes = list_files(storage, path) if files else {}
    return all(sizes.get(f["name"]) == f["size_bytes"] for f in files) and all(
        hash_of(storage, f"{path}/{f['name']}") == f["sha256"] for f in files
    )
