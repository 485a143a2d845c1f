from __future__ import annotations

import pytest

from tursi.fetcher.destinations import is_allowed


@pytest.mark.parametrize(
    ("address", "public", "inside"),
    [
        ("18.244.1.1", True, True),
        ("2600:9000::1", True, True),
        ("10.0.0.1", False, True),
        ("127.0.0.1", False, True),
        ("::1", False, True),
        ("fd00:ec2::254", False, True),
        ("::ffff:192.168.0.1", False, True),
        ("::ffff:18.244.1.1", True, True),
        ("169.254.169.254", False, False),
        ("::ffff:169.254.169.254", False, False),
        ("fe80::1%eth0", False, False),
        ("0.0.0.0", False, False),
        ("::", False, False),
        ("224.0.0.1", False, False),
    ],
)
def test_content_comes_from_public_addresses_unless_the_hub_is_private(
    address: str, *, public: bool, inside: bool
) -> None:
    assert is_allowed(address, inside=False) is public
    assert is_allowed(address, inside=True) is inside
