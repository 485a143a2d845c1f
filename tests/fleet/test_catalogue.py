"""What is removed from the disk, and what never is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tursi.fleet.catalogue import excess
from tursi.model import CatalogueEntry

ENTRIES = st.lists(
    st.builds(
        CatalogueEntry,
        name=st.just("org/name"),
        folder=st.text(max_size=3),
        size=st.integers(0, 1000),
        commit=st.one_of(st.none(), st.just("a" * 40)),
        used_by=st.sampled_from(((), (), ("small",))),
        used_at=st.one_of(st.none(), st.floats(0, 1e9)),
    ),
    max_size=12,
)


@given(ENTRIES, st.integers(0, 5000))
def test_only_what_has_to_go_goes_and_nothing_that_is_used(
    entries: list[CatalogueEntry], limit: int
) -> None:
    going = excess(entries, limit)
    assert not any(entry.used_by or entry.commit is None for entry in going)
    total = sum(entry.size for entry in entries)
    left = total - sum(entry.size for entry in going)
    if going:
        # Without the last one it would still be too much.
        assert left + going[-1].size > limit
    free = [entry for entry in entries if not entry.used_by and entry.commit is not None]
    if left > limit:
        assert len(going) == len(free)
    # Whatever was used before one that goes has gone too.
    newest = max((entry.used_at or 0.0 for entry in going), default=-1.0)
    assert all(entry in going for entry in free if (entry.used_at or 0.0) < newest)
