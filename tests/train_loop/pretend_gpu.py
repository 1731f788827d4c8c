"""A GPU that isn't there. Its tensors are computed on the CPU, and say that they are on `cuda:0`.

A run on it fails as one on a GPU does where a tensor was made on the other device, where a kernel is told what it refuses, and
where a copy is read before the GPU has made it. It knows nothing of memory, speed, NCCL, and what a kernel rounds.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from types import SimpleNamespace

import torch
from torch.nn.attention import varlen
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

aten = torch.ops.aten
GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
# What takes numbers of the CPU for positions in a GPU's tensor.
BY_POSITION = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
TO_NUMBERS = {aten._local_scalar_dense.default, aten.equal.default}


class OnGpu(torch.Tensor):
    """To torch's own code a tensor of the CPU, so that its autograd and autocast work; to Python's one of a GPU."""

    device, is_cuda, is_cpu = property(lambda self: GPU), True, False

    @staticmethod
    def __new__(cls, held):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype
        )
        tensor.held = held
        return tensor

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, other):
        torch.Tensor.data.__set__(self, other)
        self.held = other.held

    def data_ptr(self):
        return self.held.data_ptr()

    def untyped_storage(self):
        return self.held.untyped_storage()

    def tolist(self):
        return self.held.tolist()

    def numpy(self):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _computed(function, args, kwargs or {})


def _held(tensor):
    return tensor.held if isinstance(tensor, OnGpu) else tensor


def _type(device):
    return None if device is None else torch.device(device).type


def _computed(function, args, kwargs):
    flat, shape = tree_flatten((args, kwargs))
    there = [t for t in flat if isinstance(t, OnGpu)]
    here = [t for t in flat if isinstance(t, torch.Tensor) and not isinstance(t, OnGpu) and t.ndim > 0]
    if function is aten.copy_.default:
        is_there = isinstance(args[0], OnGpu)
    else:
        is_there = bool(there) or _type(kwargs.get("device")) == "cuda"
        moves = function is aten._to_copy.default or (function in BY_POSITION and isinstance(args[0], OnGpu))
        assert not (there and here) or moves, (
            f"{function} of tensors on both devices, {[tuple(t.shape) for t in here]} on the CPU"
        )
    ours = {id(t.held): t for t in there}
    args, kwargs = tree_unflatten([_held(t) for t in flat], shape)
    is_async = function is aten.copy_.default and there and not is_there and kwargs.get("non_blocking", args[2:] == (True,))
    if is_async:
        GpuThatIsnt.queue.append((args[0], args[1].clone()))
        return args[0]
    kwargs.pop("pin_memory", None)
    if _type(kwargs.get("device")) == "cuda":
        kwargs["device"] = CPU
    if function in KERNELS:
        GpuThatIsnt.calls[function.__name__] += 1
    out = KERNELS.get(function, function)(*args, **kwargs)
    if not is_there or function in TO_NUMBERS or _type(kwargs.get("device")) == "meta":
        return out

    def placed(t):
        return ours[id(t)] if id(t) in ours else OnGpu(t) if isinstance(t, torch.Tensor) else t

    return tree_map(placed, out)


class _ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, dtype):
        ctx.dtype = tensor.dtype
        return tensor.held.to(dtype, copy=True)

    @staticmethod
    def backward(ctx, gradient):
        return OnGpu(gradient.to(ctx.dtype)), None


def _moved(function, tensor, *args, **kwargs):
    """What `to`, `cuda` and `cpu` return, whose own code asks torch's where a tensor is."""
    device, dtype = {torch.Tensor.cuda: (GPU, None), torch.Tensor.cpu: (CPU, None)}.get(function, (None, None))
    if function is torch.Tensor.to:
        told = {name: value for name, value in kwargs.items() if name in ("device", "dtype")}
        device, dtype, *_ = torch._C._nn._parse_to(*args, **told)
    device, dtype = torch.device(device or tensor.device), dtype or tensor.dtype
    if device.type == tensor.device.type:
        same = dtype is tensor.dtype and not kwargs.get("copy")
        return tensor if same else aten._to_copy(tensor, dtype=dtype)
    if device.type == "cuda":
        return aten._to_copy(tensor, dtype=dtype, device=GPU)
    return _ToHost.apply(tensor, dtype) if device.type == "cpu" else function(tensor, *args, **kwargs)


class _Places(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in (torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu):
            return _moved(function, *args, **kwargs)
        if function is torch.tensor and _type(kwargs.get("device")) == "cuda":
            del kwargs["device"]
            return torch.tensor(*args, **kwargs).to(GPU)
        if function is torch.Tensor.new_tensor and isinstance(args[0], OnGpu):
            return torch.tensor(args[1], dtype=args[0].dtype).to(GPU)
        return function(*args, **kwargs)


class _Event:
    def __init__(self, blocking=False):
        self.recorded = 0

    def record(self, stream=None):
        self.recorded = len(GpuThatIsnt.queue)

    def synchronize(self):
        for place, value in GpuThatIsnt.queue[: self.recorded]:
            place.copy_(value)
        del GpuThatIsnt.queue[: self.recorded]
        self.recorded = 0


class GpuThatIsnt(TorchDispatchMode):
    """Inside, torch finds a GPU. `calls` counts those of its own kernels, `queue` is what it has been asked to copy."""

    calls, queue = Counter(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _computed(function, args, kwargs or {})


@contextlib.contextmanager
def gpu(monkeypatch):
    """A machine with one, of Hopper's kind."""
    found = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "is_bf16_supported": lambda **_: True,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: SimpleNamespace(major=9, minor=0, total_memory=80 << 30),
        "Event": _Event,
        "current_stream": lambda device=None: None,
        "synchronize": lambda device=None: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "manual_seed_all": lambda seed: None,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
    }
    with monkeypatch.context() as patched:
        for name, value in found.items():
            patched.setattr(torch.cuda, name, value)
        for name in ("is_autocast_enabled", "get_autocast_dtype"):
            patched.setattr(torch, name, lambda device="cpu", of=getattr(torch, name): of("cpu"))
        patched.setattr(torch, "autocast", lambda device, *args, of=torch.autocast, **kwargs: of("cpu", *args, **kwargs))
        patched.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a mode is a thread's own
        GpuThatIsnt.calls.clear()
        GpuThatIsnt.queue.clear()
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter can't be given memory elsewhere
        try:
            with _Places(), GpuThatIsnt():
                yield
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)


# --- kernels that only a GPU has, and what they refuse ------------------------------------------------------------


def _check(q, k, v, edges, longest, window):
    """As `mha_varlen_fwd` of torch's flash_api.cpp does."""
    assert {t.dtype for t in (q, k, v)} < {torch.float16, torch.bfloat16}
    assert {t.stride(-1) for t in (q, k, v)} == {1}
    assert q.shape[-1] % 8 == 0, "head_size must be a multiple of 8"
    assert q.shape[-1] <= 256
    assert k.shape == v.shape
    assert len(k) == len(q)
    assert q.shape[1] % k.shape[1] == 0
    assert edges.dtype is torch.int32
    assert edges.is_contiguous()
    # What it doesn't look at.
    assert (int(edges[0]), int(edges[-1])) == (0, len(q))
    assert longest == max(edges.diff().tolist())
    assert window[1] == 0


def _by_head(tensor, heads):
    """[heads, n, width] in float32 of tensor[n, some heads, width]."""
    return tensor.float().transpose(0, 1).repeat_interleave(heads // tensor.shape[1], dim=0)


def _shares(q, k, scale, window):
    """[heads, n, n]: what each position takes of those before it."""
    at = torch.arange(len(q))
    behind = at[:, None] - at
    sees = (behind >= 0) & (behind <= (window[0] if window[0] >= 0 else len(q)))
    return (_by_head(q, q.shape[1]) @ _by_head(k, q.shape[1]).mT * scale).masked_fill(~sees, -torch.inf).softmax(-1)


def _forward(q, k, v, edges, _, longest, __, is_causal=False, scale=None, window=None, *more):
    _check(q, k, v, edges, longest, window)
    out = torch.empty_like(q)
    for part in map(slice, edges.tolist(), edges.tolist()[1:]):
        shares = _shares(q[part], k[part], scale or q.shape[-1] ** -0.5, window)
        out[part] = (shares @ _by_head(v[part], q.shape[1])).transpose(0, 1).to(q.dtype)
    return out, torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)


def _backward(of_out, q, k, v, out, lse, edges, _, longest, __, is_causal, random, scale=None, window=None):
    _check(q, k, v, edges, longest, window)
    assert of_out.dtype is q.dtype
    scale, heads, gradients = scale or q.shape[-1] ** -0.5, q.shape[1], [torch.empty_like(t) for t in (q, k, v)]
    for part in map(slice, edges.tolist(), edges.tolist()[1:]):
        shares, of_o = _shares(q[part], k[part], scale, window), _by_head(of_out[part], heads)
        of_shares = of_o @ _by_head(v[part], heads).mT
        of_scores = shares * (of_shares - (of_shares * shares).sum(-1, keepdim=True)) * scale
        parts = of_scores @ _by_head(k[part], heads), of_scores.mT @ _by_head(q[part], heads), shares.mT @ of_o
        for gradient, of in zip(gradients, parts, strict=True):
            summed = of.view(gradient.shape[1], -1, *of.shape[1:]).sum(1)  # heads that share keys and values
            gradient[part] = summed.transpose(0, 1).to(gradient.dtype)
    return tuple(gradients)


KERNELS = {torch.ops.torch_attn._varlen_attn.default: _forward, torch.ops.torch_attn._varlen_attn_backward.default: _backward}
assert varlen  # it names them
