from __future__ import annotations

import numpy as np

from ep_serve.engine.input.selection_report import PoolShape, describe
from ep_serve.evaluation.evidence import Placement, count_placement
from ep_serve.evaluation.questions import Evidence
from ep_serve.layout import Image, Kind, MediumShape, Video
from tests.evaluation.mock_server import usage


def pool_of(medium: MediumShape, kinds: list[Kind]) -> PoolShape:
    """The pool of one medium whose tokens are of these kinds."""
    media = np.zeros(len(kinds), dtype=np.int32)
    return PoolShape([medium], np.array(kinds, dtype=np.int8), media)


def test_the_selection_of_an_engine_can_be_counted() -> None:
    """Two steps of two tokens, interleaved with three tokens of sound each."""
    kinds = [Kind.VIDEO] * 2 + [Kind.AUDIO] * 3 + [Kind.VIDEO] * 2 + [Kind.AUDIO] * 3
    pool = pool_of(Video((2, 2, 4), second_per_grid=1.0, audio_tokens=6), kinds)
    kept = np.array([0, 4, 5, 6, 7], dtype=np.int32)
    evidence = Evidence(video=[(1.0, 2.0)], audio=[(0.08, 0.16)])
    # Kept: a token of the first second, both of the next one, and sounds 2 and 3 (0.08 to 0.16 s).
    assert count_placement(describe(pool, kept, None), evidence) == Placement(
        kept=5, kept_then=4, kept_evidence=4, full=10, full_then=4, full_evidence=4
    )


def test_evidence_spans_count_for_both_modalities() -> None:
    selection = usage(0.2)["selection"]
    found = count_placement(selection, Evidence(audio=[(0.0, 1.0)]))
    assert (found.full, found.full_then, found.full_evidence) == (164, 16 + 25, 25)
    assert (found.kept, found.kept_then, found.kept_evidence) == (32, 32, 20)


def test_spans_that_overlap_count_once() -> None:
    found = count_placement(usage(1.0)["selection"], Evidence(video=[(0.0, 2.0), (1.0, 2.0)]))
    assert found.full_evidence == 32


def test_a_picture_has_no_time() -> None:
    pool = pool_of(Image((1, 2, 2)), [Kind.IMAGE])
    selection = describe(pool, np.zeros(1, dtype=np.int32), None)
    found = count_placement(selection, Evidence(video=[(0.0, 9.0)]))
    assert found.full == found.kept == 0
