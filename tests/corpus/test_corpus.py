"""Bad inputs of every command and of the Python API: one clear line each, and nothing is lost."""

from collections.abc import Callable

import pytest

from tests.corpus import (
    configurations,
    dashboard,
    gguf_files,
    models,
    options,
    packed,
    python_api,
    searches,
    spec_files,
    texts,
)
from tests.corpus.engine import Call, Case, Place, check_done, check_line, contents, prepare

SUBJECTS = (
    *(options, spec_files, configurations, models, gguf_files, texts),
    *(packed, searches, dashboard),
)
CASES = [case for subject in SUBJECTS for case in subject.CASES]
CALLS = python_api.CALLS
SECONDS = 60
"""What takes longer hangs; most take a tenth of a second."""


@pytest.mark.timeout(SECONDS, func_only=True)  # inputs are made once, and may be compiled first
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_command_ends_in_one_line_or_in_the_right_result(
    case: Case,
    place: Place,
    run: Callable[[list[str]], tuple[int, str, str]],
    start: Callable[[list[str]], tuple[int, str, str]],
) -> None:
    prepare(case, place)
    before = contents(place.here)
    check_done(case, *(start if case.own_process else run)(case.words(place)))
    after = contents(place.here)
    if case.code == 0 and not case.resumes:
        assert before.items() <= after.items(), "an input was changed"
    elif not case.resumes:
        assert after == before, "an input was changed, or something was left behind"


@pytest.mark.timeout(SECONDS, func_only=True)  # inputs are made once, and may be compiled first
@pytest.mark.parametrize("case", CALLS, ids=lambda case: case.name)
def test_call_raises_one_sentence_or_returns_what_is_right(case: Call, place: Place) -> None:
    prepare(case, place)
    before = contents(place.here)
    if case.says is None:
        assert case.call(place) == case.gives
        assert before.items() <= contents(place.here).items()
        return
    with pytest.raises(case.error) as caught:
        case.call(place)
    check_line(str(caught.value), case.says)
    assert contents(place.here) == before


def test_corpus_is_large_and_holds_every_input_once() -> None:
    names = [case.name for case in (*CASES, *CALLS)]
    assert len(set(names)) == len(names) >= 150
    assert len(CALLS) >= 30
    commands = {case.command.split()[0] for case in CASES}
    assert len(commands) == 7
    typed = [(case.command, repr(case.files), case.make) for case in CASES]
    assert len({(c, f, id(m)) for c, f, m in typed}) == len(CASES)
