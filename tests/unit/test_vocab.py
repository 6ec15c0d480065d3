"""The draft vocabulary holds what recent rollouts use."""

from __future__ import annotations

import numpy as np

from atlas_rl.drafters.vocab import COVERAGE, HALF_LIFE_TOKENS, MIN_TOKENS, MULTIPLE, DraftVocabulary


def test_every_id_until_enough_is_known():
    vocabulary = DraftVocabulary(100)
    vocabulary.count([[1, 2, 3]])
    vocabulary.choose()
    assert vocabulary.ids.tolist() == list(range(100)) and vocabulary.coverage == 1.0
    assert DraftVocabulary(5).coverage == 1.0


def test_what_is_used_is_in_it():
    vocabulary = DraftVocabulary(1000)
    used = np.arange(7, 1000, 17)
    vocabulary.count([np.repeat(used, 500).tolist(), [3] * 5])
    assert len(vocabulary.counts_V) == 1000
    vocabulary.choose()
    assert np.isin(used, vocabulary.ids).all() and len(vocabulary.ids) == -(-len(used) // MULTIPLE) * MULTIPLE
    assert (np.diff(vocabulary.ids) > 0).all() and vocabulary.ids.dtype == np.int64
    assert COVERAGE <= vocabulary.coverage <= 1


def test_it_follows_what_is_used_and_is_never_larger_than_the_policys():
    vocabulary = DraftVocabulary(90)
    vocabulary.count([[5] * MIN_TOKENS])
    vocabulary.choose()
    assert len(vocabulary.ids) == 32
    for _ in range(12):
        vocabulary.count([np.tile(np.arange(60, 90), int(HALF_LIFE_TOKENS / 60)).tolist()])
        vocabulary.choose()
    assert np.isin(np.arange(60, 90), vocabulary.ids).all()
    assert vocabulary.counts_V.sum() < 4 * HALF_LIFE_TOKENS, "counts are bounded"
    vocabulary.count([list(range(90)) * 1000])
    vocabulary.choose()
    assert len(vocabulary.ids) == 90
