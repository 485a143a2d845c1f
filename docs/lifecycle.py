"""Writes ``lifecycle.mmd``, the diagram of a worker's states, from the machine itself.

``python docs/lifecycle.py`` does; a test compares the file with ``render()``.
"""

from __future__ import annotations

from pathlib import Path

from tursi.lifecycle.machine import machine
from tursi.model import Phase

FILE = Path(__file__).with_suffix(".mmd")
LIVES = ("spawning", "loading", "warming", "ready", "suspect")
"""Drawn as one box: what can happen in all of them is drawn once."""


def transitions() -> dict[tuple[str, str], list[str]]:
    """The inputs that lead from one state to another; what changes no state is left out."""
    found: dict[tuple[str, str], list[str]] = {}
    # Automat's own drawing needs Graphviz, which isn't everywhere.
    for state, given, then, _ in machine.__automat_automaton__.allTransitions():
        if state is not then:
            found.setdefault((state.name, then.name), []).append(given)
    return found


def render() -> str:
    """The diagram, for Mermaid."""
    edges = transitions()
    targets = {then for _, then in edges}
    shared = {
        then: set.intersection(*(set(edges.get((state, then), ())) for state in LIVES))
        for then in targets - set(LIVES)
    }
    lines = ["stateDiagram-v2", "    [*] --> stopped", "    state lives {"]
    order = [phase.value for phase in Phase]

    def draw(state: str, then: str, inputs: set[str], indent: str = "    ") -> None:
        if inputs:
            lines.append(f"{indent}{state} --> {then}: {', '.join(sorted(inputs))}")

    def place(edge: tuple[str, str]) -> tuple[int, int]:
        return order.index(edge[0]), order.index(edge[1])

    inside = [edge for edge in sorted(edges, key=place) if set(edge) <= set(LIVES)]
    for edge in inside:
        draw(*edge, set(edges[edge]), "        ")
    lines.append("    }")
    for then in sorted(shared, key=order.index):
        draw("lives", then, shared[then])
    for edge in sorted(edges, key=place):
        if edge not in inside:
            common = shared[edge[1]] if edge[0] in LIVES else set()
            draw(*edge, set(edges[edge]) - common)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(render())
