"""Even parts of a range."""

from __future__ import annotations

import torch

from sparc_kernels.core.numerics import even_parts


def test_even_parts_are_those_of_tensor_split():
    for n in range(12):
        for parts in range(1, 6):
            wanted = [part.tolist() for part in torch.arange(n).tensor_split(parts)]
            assert [[*range(start, stop)] for start, stop in even_parts(n, parts)] == wanted
