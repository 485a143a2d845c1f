"""One request inside the worker."""

from __future__ import annotations

import sys
import traceback
import uuid
from dataclasses import dataclass, field

from tursi.errors import DeadlineExceeded, InternalError, RequestCancelled, TursiError
from tursi.faces.route import Call, Route
from tursi.wire import Ask

NOT_FINITE = "The model computed numbers that aren't finite; a dtype of float32 may help."


@dataclass(eq=False, slots=True)
class Job:
    """A request from its arrival to the end of its answer.

    ``cancelled`` is set by the main thread and read by the compute thread;
    everything else belongs to one thread at a time.
    """

    id: int
    ask: Ask
    route: Route
    arrived: float
    """Monotonic seconds."""
    cancelled: bool = False
    opened: bool = False
    """Whether bytes of the answer have left."""
    _call: Call | None = field(default=None)

    @property
    def call(self) -> Call:
        """The decoded request."""
        assert self._call is not None  # noqa: S101 - set when the compute thread takes the job
        return self._call

    @call.setter
    def call(self, call: Call) -> None:
        self._call = call

    def over(self, now: float) -> TursiError | None:
        """Why nothing more should be computed for it, if so."""
        if self.cancelled:
            return RequestCancelled()
        if now >= self.arrived + self.ask.seconds:
            return DeadlineExceeded(
                f"The request took longer than its deadline of {self.ask.seconds:g} seconds."
            )
        return None


def incident(error: BaseException) -> InternalError:
    """The answer for a defect; the traceback goes to stderr under the same id."""
    id_ = uuid.uuid4().hex
    print(f"incident {id_}", file=sys.stderr)  # noqa: T201 - stderr is the worker's log
    traceback.print_exception(error, file=sys.stderr)
    sys.stderr.flush()
    return InternalError(
        f"Tursi failed on this request; the worker's log has the details under {id_}.",
        reference=id_,
    )
