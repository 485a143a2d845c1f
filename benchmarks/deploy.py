"""From a deployment's PUT until it is ready, against a script that does the same with transformers.

The script is a fresh process: it imports, calls ``from_pretrained`` for the tokenizer
and the model, and computes one forward. Both alternate, in the same run. Then a
restart with the weights in the page cache, and without them; and what loads cost the
requests of a model that serves. Run: ``python benchmarks/deploy.py --model FOLDER``, which
is all-MiniLM-L6-v2; the others are built from their configurations.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path += [str(HERE.parent / "tests"), str(HERE.parent / "tests" / "integration")]

from daemon import Daemon, daemon  # noqa: E402 - found by the lines above
from measure import Round, load, request  # noqa: E402 - the same
from patience import until  # noqa: E402 - the same

SCRIPT = """
import sys
sys.modules["torchao"] = None  # As where it isn't installed; transformers would import it.
import torch
torch.set_num_threads(1)
import transformers
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[2])
model = getattr(transformers, sys.argv[1]).from_pretrained(sys.argv[2]).eval()
with torch.inference_mode():
    model(**tokenizer("hello world", return_tensors="pt"))
print("ready", flush=True)
"""


@dataclass(frozen=True, slots=True)
class Start:
    """One way to a model that answers."""

    seconds: float
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Model:
    """What is deployed."""

    name: str
    folder: Path
    auto_class: str

    @property
    def weights(self) -> list[Path]:
        return [path.resolve() for path in self.folder.glob("*.safetensors")]

    @property
    def mebibytes(self) -> float:
        return sum(path.stat().st_size for path in self.weights) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, type=lambda text: Path(text).absolute())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=20.0, help="of load, for the last part")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as built, daemon() as ours:
        models = [
            Model("minilm", options.model, "AutoModel"),
            encoder(Path(built) / "encoder"),
            decoder(Path(built) / "decoder"),
        ]
        for model in models:
            compare(ours, model, options.rounds)
        for model in models[1:]:
            restart(ours, model, options.rounds)
        serve_meanwhile(ours, models[0], models[1], options.seconds)


def encoder(folder: Path) -> Model:
    """BERT of the base size (110 million parameters)."""
    from models import word_piece_tokenizer
    from transformers import BertConfig, BertModel

    tokenizer = word_piece_tokenizer()
    BertModel(BertConfig()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Model("encoder", folder, "AutoModel")


def decoder(folder: Path) -> Model:
    """A Llama of 124 million parameters in bfloat16."""
    import torch
    from models import byte_level_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=12, num_key_value_heads=4, max_position_embeddings=2048,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return Model("decoder", folder, "AutoModelForCausalLM")


def compare(ours: Daemon, model: Model, rounds: int) -> None:
    """Deploy and run the script, A B A B ..."""
    deployed, bare = [], []
    for number in range(rounds + 1):
        # The first round warms the page cache.
        pair = (deploy(ours, model), script(model))
        if number:
            deployed.append(pair[0])
            bare.append(pair[1])
    print(f"{model.name}, {model.mebibytes:.0f} MiB")
    tell("  deploy to ready", deployed)
    tell("  bare script", bare)
    above = [one.seconds - two.seconds for one, two in zip(deployed, bare, strict=True)]
    print(f"  above it: {spread(above)} s", flush=True)


def deploy(ours: Daemon, model: Model) -> Start:
    """From the PUT to READY; then it is removed again."""
    began = time.perf_counter()
    put = ours.control.put(f"/deployments/{model.name}", json={"model": str(model.folder)})
    assert put.status_code == 201, put.text
    seconds = ready(ours, model.name) - began
    [worker] = ours.control.get(f"/deployments/{model.name}").json()["workers"]
    ours.control.delete(f"/deployments/{model.name}")
    until(lambda: gone(ours, model.name), "it is gone", 60)
    return Start(seconds, worker["cpu_seconds"])


def ready(ours: Daemon, name: str, before: int | None = None) -> float:
    """When it is ready, with another process than ``before``."""

    def arrived() -> bool:
        status = ours.control.get(f"/deployments/{name}").json()
        assert status["phase"] != "failed", status["reason"]
        return bool(status["phase"] == "ready" and status["workers"][0]["pid"] != before)

    until(arrived, "it is ready", 300)
    return time.perf_counter()


def gone(ours: Daemon, name: str) -> bool:
    return ours.control.get(f"/deployments/{name}").status_code == 404


def script(model: Model) -> Start:
    """From the start of the process to its word that it is ready."""
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-I", "-c", SCRIPT, model.auto_class, str(model.folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        seconds = time.perf_counter() - began
        times = psutil.Process(process.pid).cpu_times()
    return Start(seconds, times.user + times.system)


def restart(ours: Daemon, model: Model, rounds: int) -> None:
    """Restart its worker with its weights in the page cache, and without them."""
    body = {"model": str(model.folder), "load": "manual"}
    ours.control.put(f"/deployments/{model.name}", json=body)
    ours.control.post(f"/deployments/{model.name}/load")
    ready(ours, model.name)
    found: dict[str, list[Start]] = {"  warm": [], "  cold": []}
    resident: dict[str, list[float]] = {"  warm": [], "  cold": []}
    for _ in range(rounds):
        for how, starts in found.items():
            [worker] = ours.control.get(f"/deployments/{model.name}").json()["workers"]
            ours.control.post(f"/deployments/{model.name}/unload")
            until(lambda: phase(ours, model.name) == "stopped", "it is unloaded", 60)
            if "cold" in how:
                for path in model.weights:
                    forget(path)
            resident[how].append(statistics.mean(map(residency, model.weights)))
            began = time.perf_counter()
            ours.control.post(f"/deployments/{model.name}/load")
            seconds = ready(ours, model.name, worker["pid"]) - began
            [worker] = ours.control.get(f"/deployments/{model.name}").json()["workers"]
            starts.append(Start(seconds, worker["cpu_seconds"]))
    print(f"{model.name}, loaded again")
    for how, starts in found.items():
        tell(f"{how}, {100 * statistics.mean(resident[how]):.0f} % of it in the page cache", starts)
    ours.control.delete(f"/deployments/{model.name}")
    until(lambda: gone(ours, model.name), "it is gone", 60)


def phase(ours: Daemon, name: str) -> str:
    return str(ours.control.get(f"/deployments/{name}").json()["phase"])


def forget(path: Path) -> None:
    """Have the kernel drop the file's pages."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def residency(path: Path) -> float:
    """The share of the file's pages that are in the page cache."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE,
                                            flags=mmap.MAP_PRIVATE) as mapped:  # fmt: skip
        pages = -(-len(mapped) // mmap.PAGESIZE)
        vector = (ctypes.c_ubyte * pages)()
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        if ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(start), ctypes.c_size_t(len(mapped)), vector
        ):
            raise OSError(ctypes.get_errno(), "mincore")
        return sum(byte & 1 for byte in vector) / pages


def serve_meanwhile(ours: Daemon, served: Model, other: Model, seconds: float) -> None:
    """Latency of a model that serves, alone and while another loads again and again."""
    ours.control.put(f"/deployments/{served.name}", json={"model": str(served.folder)})
    ready(ours, served.name)
    assert ours.process is not None
    server = psutil.Process(ours.process.pid)
    body = {"model": served.name, "input": "How do I reset my password?"}
    payloads = itertools.repeat(request("/v1/embeddings", body, ours.port))

    def run() -> Round:
        return load(ours.port, payloads, 1, seconds / 2, server)

    run()
    alone, meanwhile = [], []
    loads = 0
    for _ in range(2):
        alone.append(run())
        ending = threading.Event()

        def again_and_again(ending: threading.Event = ending) -> None:
            nonlocal loads
            while not ending.is_set():
                deploy(ours, other)
                loads += 1

        loading = threading.Thread(target=again_and_again)
        loading.start()
        meanwhile.append(run())
        ending.set()
        loading.join()
    print(f"{served.name} serves one request after the other")
    for name, found in (("alone", alone), (f"while {loads} models load", meanwhile)):
        for one in found:
            print(
                f"  {name}: {one.requests / one.seconds:.0f} requests/s, "
                f"p50 {one.percentile(0.5):.1f} ms, p99 {one.percentile(0.99):.1f} ms, "
                f"most {one.percentile(1):.1f} ms",
                flush=True,
            )


def tell(what: str, starts: Sequence[Start]) -> None:
    print(
        f"{what}: {spread([one.seconds for one in starts])} s, of which on a processor "
        f"{spread([one.cpu_seconds for one in starts])} s",
        flush=True,
    )


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
