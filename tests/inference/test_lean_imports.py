from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tursi.inference.imports import hide
from tursi.model import LoadOrder


@pytest.fixture(autouse=True)
def torchao_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    sys.modules.pop("torchao", None)


def test_torchao_is_hidden_where_nothing_needs_it(tmp_path: Path) -> None:
    hide(LoadOrder("d", str(tmp_path), quantization="int4"))
    assert sys.modules["torchao"] is None


def test_torchao_is_there_for_int8_and_for_weights_that_it_has_made(tmp_path: Path) -> None:
    hide(LoadOrder("d", str(tmp_path), quantization="int8"))
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "torchao"}}')
    hide(LoadOrder("d", str(tmp_path)))
    assert "torchao" not in sys.modules
