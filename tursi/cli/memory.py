"""What is known of a model's memory, as lines."""

from __future__ import annotations

from typing import Any

from tursi.cli.terminal import line, size

_STAGES = (("load", "while loading"), ("warm", "when ready"), ("busy", "in service"))


def show(fit: dict[str, Any]) -> None:
    """Print the figures behind an answer of ``POST /deployments?dry_run=1``."""
    rows = [*_needs(fit.get("footprint") or {}, fit), *_rooms(fit)]
    width = max((len(name) for name, _ in rows), default=0)
    for name, text in rows:
        line(f"  {name:{width}}  {text}")


def _needs(footprint: dict[str, Any], fit: dict[str, Any]) -> list[tuple[str, str]]:
    if not footprint:
        return []
    rows = []
    estimate = footprint.get("estimate") or {}
    if estimate.get("parameters"):
        rows.append(("parameters", f"{estimate['parameters']:,} in {estimate['dtype']}"))
    if estimate:
        told = "" if estimate["from_headers"] else ", by the files' size alone"
        rows.append(("weights", f"{size(estimate['weights'])}{told}"))
        rows.append(("activations", f"{size(estimate['activations'])} at most"))
        if estimate["cache"]:
            rows.append(("cache", f"{size(estimate['cache'])} for texts that are generated"))
    settled = f", {size(footprint['host_settled'])} once it is loaded"
    rows.append(("each worker", f"{size(footprint['host'])} of host memory{settled}"))
    if footprint["gpu"]:
        rows.append(("", f"{size(footprint['gpu'])} of GPU memory ({footprint['device']})"))
    for name, key in (("measured", "host_peaks"), ("of the GPU", "gpu_peaks")):
        peaks = [
            f"{size(footprint[key][stage])} {when}"
            for stage, when in _STAGES
            if footprint[key].get(stage) is not None
        ]
        if peaks:
            rows.append((name, ", ".join(peaks)))
    if not fit.get("measured"):
        rows.append(("measured", "never yet, so that this is an estimate"))
    if fit.get("gives_back"):
        rows.append(("gives back", f"{size(fit['gives_back'])} when the old workers have gone"))
    return rows


def _rooms(fit: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for room in fit.get("rooms", ()):
        if room["free"] is None:
            continue
        of = f" of {size(room['total'])}" if room["total"] else ""
        named = f" ({room['name']})" if room["name"] else ""
        rows.append((f"free on {room['device']}", f"{size(room['free'])}{of}{named}"))
    if fit.get("limit"):
        text = f"{size(fit['limit'])} for all models together"
        free = [room["free"] for room in fit["rooms"] if room["device"] == "host"]
        if fit["free"] not in {None, *free}:
            text += f", {size(fit['free'])} left"
        rows.append(("limit", text))
    return rows
