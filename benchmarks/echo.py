"""Daemon CPU for a small request through a worker that echoes, against uvicorn+starlette.

Run: ``python benchmarks/echo.py --peer-python PYTHON`` where PYTHON has the
packages of ``benchmarks/peers/requirements.txt``. Prints the CPU of the daemon
alone and of the daemon with its worker, and their ratios to the peer's, which
does the same work in one process.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path += [str(HERE.parent / "tests"), str(HERE.parent / "tests" / "integration")]

from daemon import daemon, free_port  # noqa: E402 - found by the lines above
from measure import Round, alternate, load, ratio, request, wait_for  # noqa: E402 - the same

BODY = {"model": "echo", "input": "The quick brown fox jumps over the lazy dog. " * 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    port = free_port()
    peer = subprocess.Popen(
        [options.peer_python, str(HERE / "peers/echo_starlette.py"), str(port)],
        start_new_session=True,
    )
    try:
        with daemon(scripted=True) as ours:
            wait_for(port, psutil.Process(peer.pid))
            ours.deploy("echo", ours.script(echo=True))
            ours.wait("echo")
            assert ours.process is not None
            server = psutil.Process(ours.process.pid)
            worker_cpu: list[float] = []

            def run(which: int, process: psutil.Process) -> Round:
                payload = request("/v1/embeddings", BODY, which)
                return load(
                    which,
                    itertools.repeat(payload),
                    options.connections,
                    options.seconds,
                    process,
                )

            def run_ours() -> Round:
                before = _cpu(server)
                done = run(ours.port, server)
                worker_cpu.append(_cpu(server) - before)
                return done

            rounds = alternate(
                [
                    ("tursi", run_ours),
                    ("uvicorn+starlette", lambda: run(port, psutil.Process(peer.pid))),
                ],
                options.rounds + 1,
            )
            # The first round of each warms up.
            for name, found in rounds.items():
                for one in found[1:]:
                    print(
                        f"{name:18} {one.requests / one.seconds:8.0f} req/s "
                        f"{one.cpu_per_request:7.1f} us CPU/request "
                        f"p50 {one.percentile(0.5):6.2f} ms p99 {one.percentile(0.99):6.2f} ms"
                    )
            alone = [
                1e6 * cpu / one.requests
                for cpu, one in zip(worker_cpu[1:], rounds["tursi"][1:], strict=True)
            ]
            peers = [one.cpu_per_request for one in rounds["uvicorn+starlette"][1:]]
            median, least, most = ratio(rounds["tursi"][1:], rounds["uvicorn+starlette"][1:])
            shares = sorted(a / b for a, b in zip(alone, peers, strict=True))
            print(
                f"daemon alone / peer: {shares[len(shares) // 2]:.2f} "
                f"({shares[0]:.2f}-{shares[-1]:.2f}); "
                f"daemon and worker / peer: {median:.2f} ({least:.2f}-{most:.2f})"
            )
    finally:
        os.killpg(peer.pid, signal.SIGKILL)
        peer.wait(10)


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    main()
