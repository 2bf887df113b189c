"""Step times are measured once, kept, and measured anew when what is kept is of no use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hashing import HashDecoder

from outpace.engine import measure
from outpace.engine.measure import step_costs


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path))
    monkeypatch.setattr(measure, "ROWS", (1, 2, 3))
    monkeypatch.setattr(measure, "CONTEXTS", (4, 20))
    decode = HashDecoder.logits
    # Places that were never written are fine here: nothing is read from them.
    monkeypatch.setattr(HashDecoder, "logits", lambda self, seen: decode(self, np.array([[1, 0]])))
    return tmp_path


def test_a_table_is_measured_once(cache: Path) -> None:
    decoder, told = HashDecoder(), []
    costs = step_costs(decoder, "toy", lambda done, total: told.append((done, total)))
    assert (costs.rows, costs.contexts) == ((1, 2, 3), (4, 20)) and np.isfinite(costs.seconds).all()
    assert told and told[0][0] == 1
    forwards = len(decoder.forwards)
    again = step_costs(decoder, "toy")
    assert len(decoder.forwards) == forwards
    assert np.allclose(again.seconds, costs.seconds)


DAMAGED = ["", "{", "[]", '{"rows": [1]}', '{"rows": [1, 2], "contexts": [4], "seconds": [[1], [-1]]}']


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_table_is_measured_anew(cache: Path, text: str) -> None:
    decoder = HashDecoder()
    step_costs(decoder, "toy")
    (path,) = cache.glob("step-times/*.json")
    path.write_text(text)
    assert (step_costs(decoder, "toy").seconds > 0).all()
    assert path.read_text() != text


def test_models_and_precisions_have_tables_of_their_own(cache: Path) -> None:
    step_costs(HashDecoder(), "toy")
    step_costs(HashDecoder(), "other")
    assert len(list(cache.glob("step-times/*.json"))) == 2


def test_a_cache_that_cannot_be_written_is_no_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "step-times").write_text("a file where a folder should be")
    assert (step_costs(HashDecoder(), "toy").seconds > 0).all()


def test_a_short_context_is_measured_as_far_as_it_goes(cache: Path) -> None:
    assert step_costs(HashDecoder(max_position=10), "toy").contexts == (4,)
