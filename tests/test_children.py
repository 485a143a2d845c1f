"""What a fetcher is started with."""

from __future__ import annotations

from pathlib import Path

from twisted.internet.task import Clock

from tursi.children import Children
from tursi.config import Configuration
from tursi.model.paths import folders


def test_a_token_among_the_credentials_of_systemd_is_told_by_its_place(tmp_path: Path) -> None:
    environment = {"HOME": "/home/me", "CREDENTIALS_DIRECTORY": str(tmp_path), "SECRET": "x"}
    children = Children(
        Configuration(), folders(environment, 1000), Clock(), environment=environment
    )
    assert children.fetcher_environment == {"HOME": "/home/me"}
    (tmp_path / "hub_token").write_text("hf_secret")
    assert children.fetcher_environment == {
        "HOME": "/home/me",
        "HF_TOKEN_PATH": str(tmp_path / "hub_token"),
    }
