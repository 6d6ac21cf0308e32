"""Random numbers that follow from what they are for, not from what was drawn before."""

import numpy as np


def derived_seed(*key: int) -> int:
    """A 64-bit seed from non-negative integers: the same on every machine and in every version of Python."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
