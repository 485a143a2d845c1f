"""Who uses the daemon during a chaos run: clients that ask, and somebody who changes things."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import httpx
from checker import Ask, Change, Outcome, Turn, Wanted

ASK_SECONDS = 50.0
"""After which a client gives up; no answer takes as long."""
PAUSE_SECONDS = 0.02
PIECES = 20
"""Of an answer that comes in pieces."""


class Client(threading.Thread):
    """Asks one deployment, one request after the other, each with a body of its own."""

    route = "/v1/embeddings"
    stream = False

    def __init__(
        self, port: int, deployment: str, number: int, tell: Callable[[Ask], None]
    ) -> None:
        super().__init__(name=f"client {number} of {deployment}", daemon=True)
        self._port = port
        self._deployment = deployment
        self._number = number
        self._tell = tell
        self._ending = threading.Event()
        self._connection: http.client.HTTPConnection | None = None
        self._again = False

    def end(self) -> None:
        """Ask no more after the present request."""
        self._ending.set()

    def run(self) -> None:
        serial = 0
        while not self._ending.wait(PAUSE_SECONDS):
            serial += 1
            began = time.monotonic()
            self._again = False
            status, note, right = self._ask(f"{self._deployment} {self._number} {serial}")
            self._tell(
                Ask(
                    self._deployment, began, time.monotonic(), status, note, right,
                    stream=self.stream, again=self._again,
                )
            )  # fmt: skip
            if self._again:
                self._ending.wait(0.5)
        self._close()

    def _ask(self, text: str) -> tuple[int, str, bool]:
        body = json.dumps(self._body(text))
        try:
            if self._connection is None:
                self._connection = http.client.HTTPConnection(
                    "127.0.0.1", self._port, timeout=ASK_SECONDS
                )
            self._connection.request(
                "POST",
                self.route,
                body,
                {"content-type": "application/json", "x-request-id": text.replace(" ", "-")},
            )
            answer = self._connection.getresponse()
            data = answer.read()
        except http.client.IncompleteRead:
            self._close()
            return 200, "incomplete", False
        except (OSError, http.client.HTTPException) as error:
            self._close()
            return 0, type(error).__name__, True
        if answer.status == 200:
            return self._judge(body, data)
        self._again = answer.getheader("retry-after") is not None
        with suppress(ValueError, KeyError, TypeError):
            return answer.status, str(json.loads(data)["error"]["code"]), True
        return answer.status, repr(data[:100]), True

    def _body(self, text: str) -> dict[str, object]:
        return {"model": self._deployment, "input": text}

    def _judge(self, body: str, data: bytes) -> tuple[int, str, bool]:
        return 200, "", data == body.encode()

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None


class StreamClient(Client):
    """Asks for answers in pieces."""

    route = "/v1/completions"
    stream = True

    def _body(self, text: str) -> dict[str, object]:
        return {"model": self._deployment, "prompt": text, "stream": True}

    def _judge(self, body: str, data: bytes) -> tuple[int, str, bool]:
        if b'"code":"worker_lost"' in data:
            return 502, "worker_lost", True
        whole = b"".join(b"data: %d\n\n" % number for number in range(PIECES))
        right = data.startswith(whole)
        return 200, "" if right else f"cut: {data[-60:]!r}", right


@dataclass(frozen=True, slots=True)
class Choice:
    """What may be changed to what."""

    deployments: tuple[str, ...]
    models: tuple[str, ...]
    replicas: tuple[int, ...] = (1, 2)


class Changer(threading.Thread):
    """Changes deployments at random, and reads what has become of them."""

    def __init__(
        self,
        control: httpx.Client,
        choice: Choice,
        chance: random.Random,
        tell: Callable[[Change], None],
        pause: float,
    ) -> None:
        super().__init__(name="changer", daemon=True)
        self._control = control
        self._choice = choice
        self._chance = chance
        self._tell = tell
        self._pause = pause
        self._ending = threading.Event()
        self._doubtful: set[str] = set()
        """What has to be read before it is changed again."""

    def end(self) -> None:
        """Change nothing any more."""
        self._ending.set()

    def run(self) -> None:
        while not self._ending.wait(self._pause * (0.5 + self._chance.random())):
            if self._doubtful:
                name = min(self._doubtful)
                seen = self.read(name)
                if seen is not None:
                    self._doubtful.discard(name)
                    self._tell(seen)
                continue
            self._change(self._chance.choice(self._choice.deployments))

    def read(self, name: str) -> Change | None:
        """What is wanted of it; ``None`` while nobody can tell."""
        try:
            answer = self._control.get(f"/deployments/{name}")
        except httpx.HTTPError:
            return None
        if answer.status_code == 404:
            return Change(name, "read", Outcome.ACKNOWLEDGED)
        if answer.status_code != 200:
            return None
        found = answer.json()
        wanted = Wanted(found["model"], found["replicas"], found["desired"] == "running")
        return Change(name, "read", Outcome.ACKNOWLEDGED, seen=wanted)

    def _generations(self, name: str) -> list[tuple[int, str]]:
        """Those there are, with what they serve."""
        try:
            answer = self._control.get(f"/deployments/{name}/generations")
        except httpx.HTTPError:
            return []
        found = answer.json()["generations"] if answer.status_code == 200 else []
        return [(each["number"], each["request"]["model"]) for each in found]

    def _change(self, name: str) -> None:
        (action,) = self._chance.choices(
            ("put", "scale", "stop", "start", "delete", "rollback"), (6, 3, 2, 3, 1, 3)
        )
        model = self._chance.choice(self._choice.models) if action == "put" else ""
        number = 0
        if action == "rollback":
            earlier = self._generations(name)
            if not earlier:
                return
            number, model = self._chance.choice(earlier)
        replicas = self._chance.choice(self._choice.replicas) if action in {"put", "scale"} else 0
        path = f"/deployments/{name}"
        try:
            if action == "put":
                answer = self._control.put(path, json={"model": model, "replicas": replicas})
            elif action == "delete":
                answer = self._control.delete(path)
            elif action == "rollback":
                answer = self._control.post(f"{path}/rollback", json={"generation": number})
            elif action == "scale":
                answer = self._control.post(f"{path}/scale", json={"replicas": replicas})
            else:
                answer = self._control.post(f"{path}/{action}")
            status = answer.status_code
        except httpx.HTTPError:
            status = 0
        known = {404: Outcome.NOT_FOUND} | dict.fromkeys((200, 201, 202), Outcome.ACKNOWLEDGED)
        outcome = known.get(status, Outcome.UNKNOWN)
        self._tell(Change(name, action, outcome, model, replicas))
        # One that has been deleted is still seen while it drains.
        if outcome is Outcome.UNKNOWN or (
            outcome is Outcome.ACKNOWLEDGED and action != "delete" and self._chance.random() < 0.5
        ):
            self._doubtful.add(name)


class Loader(threading.Thread):
    """Loads and unloads what is loaded on demand, as if nobody used it."""

    def __init__(
        self,
        control: httpx.Client,
        deployments: tuple[str, ...],
        chance: random.Random,
        pause: float,
    ) -> None:
        super().__init__(name="loader", daemon=True)
        self._control = control
        self._deployments = deployments
        self._chance = chance
        self._pause = pause
        self._ending = threading.Event()

    def end(self) -> None:
        """Leave them alone."""
        self._ending.set()

    def run(self) -> None:
        while not self._ending.wait(self._pause * (0.5 + self._chance.random())):
            name = self._chance.choice(self._deployments)
            action = self._chance.choice(("load", "unload", "unload"))
            with suppress(httpx.HTTPError):
                self._control.post(f"/deployments/{name}/{action}")


class Puller(threading.Thread):
    """Downloads models and thinks better of it; ``look`` is called now and then."""

    def __init__(
        self,
        control: httpx.Client,
        models: tuple[str, ...],
        chance: random.Random,
        tell: Callable[[Turn], None],
        look: Callable[[], None],
        pause: float,
    ) -> None:
        super().__init__(name="puller", daemon=True)
        self._control = control
        self._models = models
        self._chance = chance
        self._tell = tell
        self._look = look
        self._pause = pause
        self._ending = threading.Event()
        self.pulls: list[int] = []

    def end(self) -> None:
        """Pull nothing any more."""
        self._ending.set()

    def run(self) -> None:
        while not self._ending.wait(self._pause * (0.5 + self._chance.random())):
            with suppress(httpx.HTTPError):
                (action,) = self._chance.choices(
                    ("start", "pause", "resume", "cancel", "read", "remove"), (5, 3, 3, 1, 3, 2)
                )
                if action == "remove":
                    model = self._chance.choice(self._models)
                    self._control.delete(f"/catalogue/{model}")
                elif action == "start" or not self.pulls:
                    self._start()
                else:
                    self.turn(self._chance.choice(self.pulls[-6:]), action)
            self._look()

    def _start(self) -> None:
        # One that isn't acknowledged may be there, and nobody knows its number.
        body = {"model": self._chance.choice(self._models)}
        answer = self._control.post("/pulls", json=body)
        if answer.status_code == 202:
            found = answer.json()
            self._tell(Turn(found["id"], "start", Outcome.ACKNOWLEDGED, found["state"]))
            self.pulls.append(found["id"])

    def turn(self, number: int, action: str) -> str:
        """Do that to a pull; what it is then."""
        path = f"/pulls/{number}"
        try:
            if action == "read":
                answer = self._control.get(path)
            elif action == "cancel":
                answer = self._control.delete(path)
            else:
                answer = self._control.post(f"{path}/{action}")
        except httpx.HTTPError:
            self._tell(Turn(number, action, Outcome.UNKNOWN))
            return ""
        if answer.status_code not in {200, 202}:
            self._tell(Turn(number, action, Outcome.UNKNOWN))
            return ""
        state = str(answer.json()["state"])
        self._tell(Turn(number, action, Outcome.ACKNOWLEDGED, state))
        return state


class Roller(threading.Thread):
    """Rolls one deployment out and back, with canaries and by ranges of replicas."""

    def __init__(
        self,
        control: httpx.Client,
        deployment: str,
        models: tuple[str, ...],
        chance: random.Random,
        pause: float,
    ) -> None:
        super().__init__(name="roller", daemon=True)
        self._control = control
        self._path = f"/deployments/{deployment}"
        self._models = models
        self._chance = chance
        self._pause = pause
        self._ending = threading.Event()
        self.done: Counter[str] = Counter()
        """How often what was acknowledged."""

    def end(self) -> None:
        """Leave it as it is."""
        self._ending.set()

    def run(self) -> None:
        while not self._ending.wait(self._pause * (0.5 + self._chance.random())):
            (action,) = self._chance.choices(
                ("put", "canary", "weigh", "promote", "rollback", "scale", "range"),
                (4, 4, 2, 2, 3, 2, 1),
            )
            with suppress(httpx.HTTPError):
                answer = self._turn(action)
                if answer.status_code in {200, 201, 202}:
                    self.done[action] += 1

    def _turn(self, action: str) -> httpx.Response:
        model = self._chance.choice(self._models)
        match action:
            case "put":
                return self._control.put(self._path, json={"model": model})
            case "canary":
                body = {"model": model, "canary": self._chance.choice((0, 20, 100))}
                return self._control.put(self._path, json=body)
            case "weigh":
                weight = self._chance.choice((0, 50, 100))
                return self._control.post(f"{self._path}/canary", json={"weight": weight})
            case "scale":
                replicas = self._chance.choice((1, 2))
                return self._control.post(f"{self._path}/scale", json={"replicas": replicas})
            case "range":
                body = {"replicas": 1, "max_replicas": 3}
                return self._control.post(f"{self._path}/scale", json=body)
        return self._control.post(f"{self._path}/{action}", json={})


class Archivist(threading.Thread):
    """Exports one deployment, imports it under another name, and removes that one."""

    def __init__(
        self, control: httpx.Client, source: str, name: str, chance: random.Random, pause: float
    ) -> None:
        super().__init__(name="archivist", daemon=True)
        self._control = control
        self._source = source
        self.copy = name
        self._chance = chance
        self._pause = pause
        self._ending = threading.Event()
        self.there: bool | None = False
        """Whether the copy must be there; ``None`` where nobody can tell."""
        self.imports = 0

    def end(self) -> None:
        """Leave it as it is."""
        self._ending.set()

    def run(self) -> None:
        while not self._ending.wait(self._pause * (0.5 + self._chance.random())):
            try:
                if self.there and self._chance.random() < 0.5:
                    self._remove()
                else:
                    self._bring()
            except httpx.HTTPError:
                self.there = None

    def _bring(self) -> None:
        try:
            archive = self._control.post(f"/deployments/{self._source}/export")
        except httpx.HTTPError:
            return  # nothing has changed
        if archive.status_code != 200:
            return
        answer = self._control.post(
            "/imports",
            content=archive.content,
            params={"name": self.copy},
            headers={"Content-Type": "application/x-tar"},
        )
        if answer.status_code in {200, 201}:
            self.there = True
            self.imports += 1

    def _remove(self) -> None:
        answer = self._control.delete(f"/deployments/{self.copy}")
        if answer.status_code in {202, 404}:
            self.there = False
