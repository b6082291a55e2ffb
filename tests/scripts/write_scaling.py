"""Write the tables of docs/scaling.md anew, each by the command that its marker names."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

from sparc_kernels.cli import main

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"
MARKED = re.compile(r"(<!-- sparc-kernels (cost [^\n]*): begin -->\n).*?(<!-- end -->)", re.DOTALL)


def written(text: str) -> str:
    """The document with every table as its command prints it now."""

    def table(match: re.Match) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert main(shlex.split(match[2])) == 0
        return f"{match[1]}\n{printed.getvalue()}\n{match[3]}"

    return MARKED.sub(table, text)


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text("utf-8")))
