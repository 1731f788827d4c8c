"""bitsandbytes, without torch's compiler.

It marks some functions with torch.compile, which loads the compiler at once: a second and a half, and 40 MB, of every process
that trains, quantised or not, for PEFT imports it for any adapter. Imported here first, each is compiled when it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial, wraps
from logging import getLogger
from typing import Any

import torch

_compile: Callable[..., Any] = torch.compile


def _later(function: Any = None, **options: Any) -> Any:
    """What torch.compile returns, made when it is first called."""
    if function is None:
        return partial(_later, **options)
    compiled = cache(lambda: _compile(function, **options))
    return wraps(function)(lambda *arguments, **named: compiled()(*arguments, **named))


# When it is imported it asks for an optional package by which it would fetch a kernel from the hub.
getLogger("bitsandbytes").setLevel("ERROR")
torch.compile = _later  # type: ignore[assignment]
try:
    from bitsandbytes import MatmulLtState, matmul
    from bitsandbytes.functional import QuantState, dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
finally:
    torch.compile = _compile

__all__ = ["Linear4bit", "Linear8bitLt", "MatmulLtState", "QuantState", "dequantize_4bit", "matmul"]
