"""What was trained as a user gets it: an adapter in PEFT layout or the whole model, plus tokenizer, template and a README."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train_loop import weights
from train_loop.layout import ADAPTER_FOLDER, MERGED_FOLDER
from train_loop.metrics import MetricLog
from train_loop.model.load import DTYPES, auto_class
from train_loop.model.processor import save_processor
from train_loop.spec import JobSpec

README = """---
base_model: {base}
library_name: peft
---
# {name}

LoRA adapter for `{base}`, trained by Tuneyard.

```python
from peft import PeftModel
from transformers import {auto}, {reader}

{reads} = {reader}.from_pretrained("<this folder>")
model = PeftModel.from_pretrained({auto}.from_pretrained("{base}"), "<this folder>")
```

Evaluation loss: {before} before training, {after} after.
"""


FULL_README = """---
base_model: {base}
library_name: transformers
---
# {name}

`{base}`, fine-tuned by Tuneyard.

```python
from transformers import {auto}, {reader}

{reads} = {reader}.from_pretrained("<this folder>")
model = {auto}.from_pretrained("<this folder>")
```

Evaluation loss: {before} before training, {after} after.
"""


def write(folder: Path, spec: JobSpec, model: Any, tensors: Mapping[str, Any], tokenizer: Any, log: MetricLog, base: Path) -> str:
    """Write the files of what was trained into the local `folder`; return the name of their folder in the run's.

    `tensors` is what `weights.handed_out` returned, `base` the folder of the base model.
    """
    is_adapter = weights.is_adapter(model)
    if is_adapter:
        weights.FileFormat.of(model).write(folder, tensors)
    else:
        _write_model(folder, spec, model, tensors)
    tokenizer.save_pretrained(folder)
    sees = spec.model_details.model_type == "vlm"
    if sees:
        save_processor(base, folder)
    show = lambda v: "not measured" if v is None else f"{v:.4f}"  # noqa: E731
    (folder / "README.md").write_text(
        (README if is_adapter else FULL_README).format(
            base=spec.model_details.base_model,
            name=spec.experiment_name,
            auto=auto_class((model.get_base_model() if is_adapter else model).config, images=sees).__name__,
            reader="AutoProcessor" if sees else "AutoTokenizer",
            reads="processor" if sees else "tokenizer",
            before=show(log.eval_before),
            after=show(log.eval_after),
        )
    )
    return ADAPTER_FOLDER if is_adapter else MERGED_FOLDER


def _write_model(folder: Path, spec: JobSpec, model: Any, tensors: Mapping[str, Any]) -> None:
    """transformers' layout, in the job's torch_dtype."""
    dtype = DTYPES[spec.train_config.torch_dtype]
    saved = model.state_dict().keys()
    buffers = {name: t for name, t in model.named_buffers() if name in saved}
    model.save_pretrained(folder, state_dict={name: t.to(dtype) for name, t in tensors.items()} | buffers)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": spec.train_config.torch_dtype}, indent=2) + "\n")
