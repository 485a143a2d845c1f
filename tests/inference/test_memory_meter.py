"""What a worker says of its memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tursi.inference.memory import Meter
from tursi.model import Peaks


def status(path: Path, highest: int, present: int) -> None:
    path.write_text(f"Name:\tpython\nVmHWM:\t{highest} kB\nVmRSS:\t{present} kB\n")


def test_each_stage_has_its_own_peak(tmp_path: Path) -> None:
    path = tmp_path / "status"
    meter = Meter(path)
    status(path, 900, 800)
    meter.loaded()
    status(path, 900, 500)
    meter.warm()
    # The peak was the load's.
    assert meter.host == Peaks(900 * 1024, 500 * 1024)
    status(path, 1000, 500)
    meter.warm()
    assert meter.host == Peaks(900 * 1024, 1000 * 1024)


def test_where_the_kernel_does_not_tell_the_process_itself_does(tmp_path: Path) -> None:
    meter = Meter(tmp_path / "none")
    meter.loaded()
    meter.warm()
    assert meter.host.load is not None
    assert meter.host.load > 2**20


def test_of_gpus_what_torch_has_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    reserved = {0: 500, 1: 0, 2: 300}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(reserved))
    monkeypatch.setattr("torch.cuda.max_memory_reserved", reserved.get)
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda _: None)
    meter = Meter()
    meter.loaded()
    reserved[0] = 400
    meter.warm()
    assert meter.gpus == {"cuda:0": Peaks(500, 400), "cuda:2": Peaks(300, 300)}
