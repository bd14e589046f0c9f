"""The bytes that are sent: pseudo-random, known to both ends from a seed.

Every answer is compared with what was sent, byte by byte, which says at least as much as
equal hashes and costs a memcmp. Two connections never have the same bytes under way, so an
answer that reached the wrong session is seen.
"""

import random

# the largest prime below 256 KiB: a proxy that loses, repeats or swaps a whole buffer of any
# round size shifts the pattern, which a period of a power of two would hide
PERIOD = 262_139


def pattern(seed: int) -> bytes:
    return random.Random(seed).randbytes(PERIOD)  # noqa: S311  a reproducible pattern is the aim


def messages(seed: int, size: int) -> list[bytes]:
    """Different messages of `size` bytes: 1,024 short ones, fewer long ones (at most 8 MiB in all)."""
    source = random.Random(seed)  # noqa: S311  as above
    return [source.randbytes(size) for _ in range(max(128, min(1024, 8 * 2**20 // size)))]
