"""Random numbers that depend on (seed, sequence, position) only, never on what else is in the batch.

A counter-based generator: the counters are absorbed one after another with the finaliser of SplitMix64 (Steele, Lea,
Flood 2014, "Fast splittable pseudorandom number generators"), so any number can be made again without its forerunners,
which is what recomputing a preempted sequence needs.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mix(value: int) -> int:
    """SplitMix64's step: adds the golden gamma, then its finaliser; 64 bits to 64 bits, one to one."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def derive_seed(*numbers: int) -> int:
    """One 64-bit seed from several integers; their order counts, negative ones are taken modulo 2**64."""
    state = 0
    for number in numbers:
        state = mix(state ^ (int(number) & _MASK))
    return state


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, for a seed of `derive_seed` and a token position."""
    return (mix(mix(seed) ^ position) >> 11) * 2.0**-53
