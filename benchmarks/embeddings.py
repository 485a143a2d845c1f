"""Texts embedded per CPU-second, against LitServe with sentence-transformers.

Equal dtype (float32), equal threads (1), single texts, 64 connections unless
told otherwise. Run: ``python benchmarks/embeddings.py --model FOLDER
--peer-python PYTHON``. Every reply of ours is compared with the peer's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path += [str(HERE.parent / "tests"), str(HERE.parent / "tests" / "integration")]

from daemon import daemon, free_port  # noqa: E402 - found by the lines above
from measure import Round, alternate, load, request, wait_for  # noqa: E402 - the same


def corpus(count: int = 4096, seed: int = 7) -> list[str]:
    """Texts from Python's own documentation strings, of log-normal lengths around 26 words."""
    import argparse as options
    import decimal
    import logging
    import socket
    import tarfile

    words = " ".join(
        str(getattr(thing, "__doc__", "") or "")
        for module in (options, decimal, logging, socket, tarfile)
        for thing in (module, *vars(module).values())
    ).split()
    # Rules and signatures are single words of hundreds of tokens.
    words = [word for word in words if word.isalpha()]
    chance = random.Random(seed)
    texts = []
    for _ in range(count):
        length = max(4, min(96, round(chance.lognormvariate(math.log(20), 0.6))))
        start = chance.randrange(len(words) - length)
        texts.append(" ".join(words[start : start + length]))
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, type=lambda text: Path(text).absolute())
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    texts = corpus()
    port = free_port()
    peer = subprocess.Popen(
        [
            options.peer_python,
            str(HERE / "peers/embed_litserve.py"),
            str(options.model),
            str(port),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        start_new_session=True,
    )
    try:
        with daemon() as ours:
            ours.deploy("minilm", options.model, dtype="float32")
            ours.wait("minilm")
            peer_process = psutil.Process(peer.pid)
            wait_for(port, peer_process)
            assert ours.process is not None
            server = psutil.Process(ours.process.pid)

            def payloads(which: int, encoding: dict[str, str]) -> Iterator[bytes]:
                made = [
                    request("/v1/embeddings", {"model": "minilm", "input": text, **encoding}, which)
                    for text in texts
                ]
                while True:
                    yield from made

            # As the openai client asks by default.
            ours_payloads = payloads(ours.port, {"encoding_format": "base64"})
            peer_payloads = payloads(port, {})
            _check(ours.port, port, texts[:64], server, peer_process)

            def run_ours() -> Round:
                return load(ours.port, ours_payloads, options.connections, options.seconds, server)

            def run_peer() -> Round:
                return load(port, peer_payloads, options.connections, options.seconds, peer_process)

            rounds = alternate([("tursi", run_ours), ("litserve", run_peer)], options.rounds + 1)
            for name, found in rounds.items():
                for one in found[1:]:
                    print(
                        f"{name:10} {one.per_cpu_second:7.1f} texts/CPU-s "
                        f"{one.requests / one.seconds:7.1f} texts/s "
                        f"p50 {one.percentile(0.5):7.1f} ms p99 {one.percentile(0.99):7.1f} ms"
                    )
            ratios = sorted(
                our.per_cpu_second / their.per_cpu_second
                for our, their in zip(rounds["tursi"][1:], rounds["litserve"][1:], strict=True)
            )
            print(
                f"tursi / litserve, texts per CPU-second at c={options.connections}: "
                f"{ratios[len(ratios) // 2]:.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
            )
    finally:
        # With its workers, which would outlive a mere terminate().
        os.killpg(peer.pid, signal.SIGKILL)
        peer.wait(20)


def _check(
    port: int, peer_port: int, texts: list[str], server: psutil.Process, peer: psutil.Process
) -> None:
    """Our vectors are the peer's, text by text."""
    for text in texts[:16]:
        one = iter([request("/v1/embeddings", {"model": "minilm", "input": text}, port)] * 2)
        ours = json.loads(load(port, one, 1, 0, server).replies[0])["data"][0]["embedding"]
        two = iter([request("/v1/embeddings", {"model": "minilm", "input": text}, peer_port)] * 2)
        theirs = json.loads(load(peer_port, two, 1, 0, peer).replies[0])["embedding"]
        cosine = sum(a * b for a, b in zip(ours, theirs, strict=True)) / math.sqrt(
            sum(a * a for a in ours) * sum(b * b for b in theirs)
        )
        assert cosine > 0.999, (text, cosine)


if __name__ == "__main__":
    main()
