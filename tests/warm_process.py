"""A process that has imported torch and forks for each command: the import costs three CPU seconds a time.

`run` is `subprocess.run([sys.executable, *words], capture_output=True, text=True)` for words that begin with -m or -c.
Not for what must be set before torch is loaded, nor for signals.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CLOSED = "closed"  # a pipe whose reader has left
_parent: list[subprocess.Popen] = []


def run(*words, env=None, cwd=None, stdout=None, stderr=None) -> subprocess.CompletedProcess:
    """Run a Python command in a fork of a process that has imported torch.

    Args:
        words: "-m", a module's name and its arguments, or "-c", code and its arguments.
        env: Variables to set besides those of this process; TRITON_INTERPRET is unset unless it is among them.
        cwd: Folder to run in, the repository's root by default.
        stdout: CLOSED for a pipe whose reader has left; captured by default.
        stderr: CLOSED for the same pipe; captured by default.
    """
    if not _parent:
        start = os.environ | {"OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        _parent.append(subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, text=True, env=start))
        atexit.register(_parent[0].communicate)
    variables = (
        {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)} | (env or {})
    )
    with tempfile.TemporaryDirectory() as folder:
        files = [stdout or os.path.join(folder, "out"), stderr or os.path.join(folder, "err")]
        order = {"words": list(map(str, words)), "env": variables, "cwd": str(cwd or ROOT), "files": files}
        print(json.dumps(order), file=_parent[0].stdin, flush=True)
        code = int(_parent[0].stdout.readline())
        texts = ["" if file == CLOSED else Path(file).read_text() for file in files]
    return subprocess.CompletedProcess(words, code, *texts)


def _become(order):
    """Run the command of an order in this process, which has just been forked."""
    import runpy

    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    closed = None
    for target, file in zip((1, 2), order["files"], strict=True):
        if file == CLOSED and closed is None:
            reader, closed = os.pipe()
            os.close(reader)
        os.dup2(closed if file == CLOSED else os.open(file, os.O_WRONLY | os.O_CREAT), target)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    kind, name, *arguments = order["words"]
    sys.path[:1] = ["", *order["env"]["PYTHONPATH"].split(os.pathsep)]
    sys.argv = [kind, *arguments]
    if kind == "-m":
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        exec(compile(name, "<string>", "exec"), {"__name__": "__main__"})


def _serve():
    import torch._dynamo  # noqa: F401  which the first optimizer would import

    for line in sys.stdin:
        sys.stdout.flush()
        child = os.fork()
        if not child:
            return _become(json.loads(line))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(code, flush=True)
    return None


if __name__ == "__main__":
    _serve()
