"""Which samples run together."""

from hypothesis import given
from hypothesis import strategies as st

from squeeze.runs.batching import batches


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 8))
def test_batches_hold_every_sample_once_and_the_longest_first(lengths, batch_size):
    made = batches(lengths, batch_size)
    assert sorted(index for batch in made for index in batch) == list(range(len(lengths)))
    assert all(len(batch) == batch_size for batch in made[:-1])
    ordered = [lengths[index] for batch in made for index in batch]
    assert ordered == sorted(lengths, reverse=True)
