"""A worker of `verify` with faults planted in it, which its process imports."""

import os
import signal

from sparc_kernels.tools.verify import pool as verify_pool

work = verify_pool.work


def planted(plant, pipe, *settings):
    """plant: what happens at which "op dtype case", for example "lost decode local fp32 tiny;kill ..."; or "start"."""
    wanted = dict(part.split(" ", 1)[::-1] for part in plant.split(";"))
    lost = "it does not answer" if "start" in wanted else ""

    def surrounded(name, sound):
        def check_fn(check):
            nonlocal lost
            how = wanted.get(f"{name} {verify_pool.SHORT[check.dtype]} {check.case.name}")
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "lost":
                lost = "it does not answer"
                raise RuntimeError("an illegal memory access was encountered")
            sound(check)

        return check_fn

    verify_pool.CHECKS[:] = [(op, word, surrounded(op, fn)) for op, word, fn in verify_pool.CHECKS]
    verify_pool.device_lost = lambda device: lost
    if "start" in wanted and wanted["start"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    work(pipe, *settings)
