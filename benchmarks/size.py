"""Resident memory and idle CPU of the daemon with three deployments of scripted workers."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import psutil

TESTS = Path(__file__).parent.parent / "tests"
sys.path += [str(TESTS), str(TESTS / "integration")]

from daemon import daemon  # noqa: E402 - found by the line above


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deployments", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    with daemon(scripted=True) as ours:
        script = ours.script(echo=True)
        for number in range(options.deployments):
            ours.deploy(f"echo-{number}", script)
        for number in range(options.deployments):
            ours.wait(f"echo-{number}", seconds=120)
        for number in range(options.deployments):
            body = {"model": f"echo-{number}", "input": "hello"}
            for _ in range(200):
                assert ours.client.post("/v1/embeddings", json=body).status_code == 200
        assert ours.process is not None
        server = psutil.Process(ours.process.pid)
        before = server.cpu_times()
        time.sleep(options.seconds)
        after = server.cpu_times()
        cpu = (after.user - before.user + after.system - before.system) / options.seconds
        keepers = [child for child in server.children() if "keeper.py" in " ".join(child.cmdline())]
        keeper_rss = sum(keeper.memory_info().rss for keeper in keepers) / max(len(keepers), 1)
        print(
            f"{options.deployments} deployments: daemon RSS "
            f"{server.memory_info().rss / 1e6:.1f} MB, {100 * cpu:.2f} % of a core at rest; "
            f"keepers {keeper_rss / 1e6:.1f} MB each"
        )


if __name__ == "__main__":
    main()
