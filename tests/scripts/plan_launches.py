"""Compare the launches of replayed steps with those of ordinary ones, by Triton's own JIT and launcher.

Run by test_plan.py in a process of its own, over a driver that does nothing. Prints the number of launches compared.
"""

import sys

import torch

from sparc_kernels import AlignedSAE, SparcAdam
from sparc_kernels.core import plan
from sparc_kernels.tools.stub_driver import stub_driver


def flat(arg):
    """Numbers and dtypes as they are; pointers by their alignment to 16 bytes, which decides the kernel."""
    if isinstance(arg, torch.Tensor):
        return "pointer", arg.data_ptr() % 16
    return tuple(map(flat, arg)) if isinstance(arg, tuple) else arg


def with_pointers(args, like):
    """Integers where an ordinary launch had pointers."""
    if isinstance(like, tuple) and like[:1] == ("pointer",):
        return "pointer", args % 16
    if isinstance(like, tuple):
        return tuple(with_pointers(*pair) for pair in zip(args, like, strict=True))
    return args


def main() -> None:
    from triton.backends.nvidia.driver import CudaLauncher

    launched, launch = [], CudaLauncher.__call__

    def logged(self, x, y, z, stream, function, *rest):
        launched.append((id(self), (x, y, z), stream, tuple(map(flat, rest[4:]))))
        return launch(self, x, y, z, stream, function, *rest)

    CudaLauncher.__call__ = logged
    compared = 0
    with stub_driver():
        # rows, of which 1 is a constant of the kernels; inputs that begin at 16 bytes or not
        for rows, topk_type, skip in ((16, "global", 0), (1, "local", 1)):
            model = AlignedSAE({"a": 16, "b": 24}, 128, 8, 8, topk_type=topk_type, impl="triton")
            adam = SparcAdam(model, 1e-3, impl="triton")
            x = {s: torch.randn(rows, d + skip)[:, skip:] for s, d in model.d_streams.items()}

            def two_calls(model=model, adam=adam, x=x):
                adam.zero_grad()
                model.compute_loss(model(x), x)[0].backward()
                adam.step()

            def fused(model=model, adam=adam, x=x):
                adam.zero_grad()
                model.training_step(x, adam)

            for step in (two_calls, fused):
                for _ in range(3):
                    step()
                launched.clear()
                step()
                replayed = list(launched)
                launched.clear()
                with plan.without_plans():
                    step()
                assert len(replayed) == len(launched) > 10
                for ours, theirs in zip(replayed, launched, strict=True):
                    ours = (*ours[:3], with_pointers(ours[3], theirs[3]))
                    assert ours == theirs, (ours, theirs)
                    compared += 1
    refused = [p for f in plan._functions for p in f.plans.values() if p is plan._REFUSED]
    assert not refused
    print(compared)


if __name__ == "__main__":
    sys.exit(main())
