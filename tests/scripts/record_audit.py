"""Record that `sparc-kernels audit --quick` found no fault in the kernels and launch settings as they are now.

    python tests/scripts/record_audit.py

It compiles 863 kernels, twelve CPU minutes with an empty cache: too long for every run of the tests, which compile each
kernel once and compare `digest` with that of the record instead.
"""

import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import tokenize
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "tests" / "data" / "audit.json"
LAYOUT = {tokenize.INDENT: "⇥", tokenize.DEDENT: "⇤", tokenize.NEWLINE: "↵"}
LEFT_OUT = {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER}


def code_of(path: Path, everything: bool) -> str:
    """A file's tokens without comments and docstrings: all of them, or those of functions under @triton.jit."""
    words, depth, inside, level = [], 0, everything, 0
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type in LEFT_OUT:
            continue
        depth += (token.type == tokenize.INDENT) - (token.type == tokenize.DEDENT)
        if token.line.strip() == "@triton.jit" and not inside:
            inside, level = True, depth
        alone = not words or words[-1] in LAYOUT.values()
        if inside and not (token.type == tokenize.STRING and alone):
            words.append(LAYOUT.get(token.type) or "".join(token.string.split()))  # f-strings: tokens since Python 3.12
        if token.type == tokenize.DEDENT and depth == level:
            inside = everything
    return "".join(words)


def digest() -> str:
    """SHA-256 of every kernel and every launch setting, whatever is written about them."""
    parts = [code_of(path, False) for path in sorted((ROOT / "sparc_kernels" / "ops").glob("*.py"))]
    parts += [code_of(path, True) for path in sorted((ROOT / "sparc_kernels" / "launch").glob("*.py"))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def main() -> int:
    import triton

    before = digest()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "audit.json"
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "sparc_kernels", "audit", "--quick", "--json", str(file)]
        done = subprocess.run(command, env=env, check=False)
        if done.returncode:
            return done.returncode
        rows = json.loads(file.read_text())["rows"]
    versions = {"triton": triton.__version__, "date": str(date.today())}
    record = {"kernels": len(rows), "faults": 0, **versions, "digest": before}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {RECORD.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
