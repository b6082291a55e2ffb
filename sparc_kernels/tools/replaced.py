"""Attributes replaced for a while: how checks force a route, and see which one was taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(holder: Any, **attributes: Any) -> Iterator[None]:
    """Context in which attributes of a module or class have other values.

    Args:
        holder: the module or class; it has these attributes of its own.
        **attributes: values by name.
    """
    before = {name: vars(holder)[name] for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(holder, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(holder, name, value)
