from __future__ import annotations

import pytest

from tursi import errors
from tursi.errors import LoadError, QueueFull, TursiError, by_code
from tursi.faces.route import STATUS, status_of

ALL = sorted(
    (each for each in vars(errors).values() if isinstance(each, type)),
    key=lambda each: each.__name__,
)

# Reported within a deployment's status and events, or before anything listens;
# as the answer to a request they would be our own failure.
NEVER_AN_ANSWER = (errors.LoadError, errors.FetchError)
BEFORE_LISTENING = {errors.AlreadyRunning}
OUR_FAILURE = {errors.TursiError, errors.InternalError, errors.DatabaseError}


@pytest.mark.parametrize("cls", ALL)
def test_a_class_has_a_code_of_its_own(cls: type[TursiError]) -> None:
    assert issubclass(cls, TursiError)
    if cls is not TursiError:
        assert "code" in vars(cls)
        assert by_code()[cls.code] is cls
    assert cls.code.replace("_", "").isalpha()
    assert cls.code == cls.code.lower()


@pytest.mark.parametrize("cls", ALL)
def test_a_docstring_is_one_sentence_for_the_user(cls: type[TursiError]) -> None:
    sentence = (cls.__doc__ or "").strip().splitlines()[0]
    assert sentence[0].isupper()
    assert sentence.endswith(".")
    assert cls().message == sentence
    assert str(cls()) == sentence


@pytest.mark.parametrize("cls", ALL)
def test_a_code_has_its_status_or_is_deliberately_without(cls: type[TursiError]) -> None:
    # An import is told of a full disk.
    never = issubclass(cls, NEVER_AN_ANSWER) and cls is not errors.DiskFull
    without = never or cls in BEFORE_LISTENING or cls in OUR_FAILURE
    assert (cls.code in STATUS) is not without
    assert status_of(cls()) == STATUS.get(cls.code, 500)
    assert 400 <= status_of(cls()) < 600


def test_the_table_knows_no_other_codes() -> None:
    assert STATUS.keys() <= by_code().keys()


@pytest.mark.parametrize("cls", [each for each in ALL if issubclass(each, LoadError)])
def test_a_load_error_ends_the_worker_with_a_reserved_status(cls: type[LoadError]) -> None:
    # sysexits.h, one of our own, and nothing that Python or a signal would give.
    assert 64 <= cls.exit_status <= 78 or cls.exit_status == 86


def test_an_error_carries_what_it_was_given() -> None:
    error = QueueFull("Full.", param="model", retry_after=3, reference="a1")
    assert (error.message, error.param, error.retry_after, error.reference) == (
        "Full.",
        "model",
        3,
        "a1",
    )
    assert QueueFull().retry_after is None
