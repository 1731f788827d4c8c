"""Copies that a checkpoint is written from."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from train_loop.snapshot import CPU_BYTES, Snapshot, affordable

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HOST_BYTES = 16 << 30


def tensors():
    torch.manual_seed(0)
    return [
        torch.randn(3, 5, device=DEVICE),
        torch.tensor(7.0),  # a step counter
        torch.arange(11, dtype=torch.uint8, device=DEVICE),
        torch.randn(6, 4, device=DEVICE).t(),
        torch.randn(8, 4, device=DEVICE)[:, ::2],
        torch.empty(0, 3, device=DEVICE),
        torch.randn(2, dtype=torch.bfloat16, device=DEVICE),
    ]


def taken(snapshot, live):
    copies = snapshot.take(live)
    snapshot.wait()
    return copies


def test_copies_are_equal_and_stay_so_when_the_tensors_change():
    live = tensors()
    before = [t.clone() for t in live]
    snapshot = Snapshot(DEVICE)
    copies = snapshot.take(live)
    for tensor in live:
        tensor.zero_()  # as the next step does, without waiting
    snapshot.wait()
    for copy, tensor in zip(copies, before, strict=True):
        assert copy.device.type == "cpu"
        assert copy.dtype == tensor.dtype
        assert copy.stride() == torch.empty_like(tensor).stride()
        assert torch.equal(copy, tensor.cpu())


def test_the_next_ones_are_made_at_the_same_places_unless_they_have_other_shapes():
    snapshot, live = Snapshot(DEVICE), tensors()
    places = [t.data_ptr() for t in taken(snapshot, live)]
    live[0] += 1
    again = taken(snapshot, live)
    assert [t.data_ptr() for t in again] == places
    assert torch.equal(again[0], live[0].cpu())
    fewer = taken(snapshot, live[:2])
    assert [t.tolist() for t in fewer] == [t.tolist() for t in live[:2]]


def test_a_file_of_copies_holds_each_and_nothing_twice(tmp_path):
    live = tensors()
    copies = {str(i): t.contiguous() for i, t in enumerate(taken(Snapshot(DEVICE), live))}
    save_file(copies, tmp_path / "file.safetensors")
    assert all(torch.equal(t, live[int(name)].cpu()) for name, t in load_file(tmp_path / "file.safetensors").items())
    torch.save(copies, tmp_path / "file.pt")
    assert all(torch.equal(t, live[int(name)].cpu()) for name, t in torch.load(tmp_path / "file.pt", mmap=True).items())


@pytest.mark.parametrize(
    ("device", "size", "copied"),
    [("cpu", CPU_BYTES, True), ("cpu", CPU_BYTES + 1, False), ("cuda", CPU_BYTES + 1, True), ("cuda", HOST_BYTES // 2, False)],
)
def test_a_machine_s_memory_isn_t_taken_twice_by_what_is_large(device, size, copied, monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": HOST_BYTES // 4096}.__getitem__)
    assert affordable(size, device) == copied
