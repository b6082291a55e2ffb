"""What disks, transfers and editors do to a file."""

import numpy as np


def damaged(content: bytes, generator: np.random.Generator) -> bytes:
    """Bytes cut off, flipped, overwritten, zeroed, removed, inserted or repeated, half of the time in the first 200."""
    start = int(generator.integers(_end(content, generator)))
    stop = min(len(content), start + int(generator.choice([1, 4, 64, 512])))
    part = content[start:stop]
    bit = flipped(part[:1], generator) + part[1:]
    others = (bit, generator.bytes(len(part)), bytes(len(part)), b"", generator.bytes(8) + part, 2 * part)
    kind = int(generator.integers(1 + len(others)))
    return content[:start] if kind == 0 else content[:start] + others[kind - 1] + content[stop:]


def flipped(content: bytes, generator: np.random.Generator) -> bytes:
    """One bit of it flipped."""
    changed = bytearray(content)
    changed[generator.integers(len(content))] ^= 1 << int(generator.integers(8))
    return bytes(changed)


def scratched(content: bytes, generator: np.random.Generator) -> bytes:
    """Cut off, or up to 8 bytes overwritten: more of it and HDF5 itself crashes, which nothing above it can catch."""
    if generator.random() < 0.3:
        return content[: int(generator.integers(len(content)))]
    changed = bytearray(content)
    for place in generator.integers(_end(content, generator), size=generator.integers(1, 9)):
        changed[place] = generator.integers(256)
    return bytes(changed)


def _end(content: bytes, generator: np.random.Generator) -> int:
    return len(content) if generator.random() < 0.5 else min(200, len(content))
