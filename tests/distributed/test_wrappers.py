"""docs/scaling.md on several processes: DistributedDataParallel and FSDP2 give what one process gives."""

import inspect
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import start

from sparc_kernels import AlignedSAE, SparcAdam

DOCUMENT = Path(__file__).parents[2] / "docs" / "scaling.md"
WIDTHS, STEPS, ROWS = {"a": 10, "b": 6}, 5, 16


class Loss(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.compute_loss(self.model(x), x)


def batch(step: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    return {s: torch.randn(ROWS, d, generator=g, dtype=torch.float64) for s, d in WIDTHS.items()}


def build() -> AlignedSAE:
    torch.manual_seed(0)
    return AlignedSAE(WIDTHS, 24, 3, dtype=torch.float64)


def alone() -> dict[str, torch.Tensor]:
    model = build()
    optimizer = SparcAdam(model, lr=1e-2)
    for step in range(STEPS):
        x = batch(step)
        optimizer.zero_grad()
        model.compute_loss(model(x), x)[0].backward()
        optimizer.step()
    return model.state_dict()


def share_counters(model: AlignedSAE) -> None:
    for s in model.streams:
        dist.all_reduce(getattr(model, f"stats_last_nonzero_{s}"), op=dist.ReduceOp.MIN)


def ddp(model):
    wrap = torch.nn.parallel.DistributedDataParallel
    names = re.findall(r"(\w+_buffers)=False", DOCUMENT.read_text())  # as documented, the newest torch first
    name = next(name for name in names if name in inspect.signature(wrap).parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        loss_of = wrap(Loss(model), **{name: False})
    optimizer = SparcAdam(model, lr=1e-2)
    return loss_of, optimizer, optimizer.step


def fsdp(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model.decoder_layout_("contiguous")
    loss_of = fully_shard(Loss(model), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.Adam(loss_of.parameters(), lr=1e-2)

    def step():
        model.unit_norm_decoder_().project_decoder_grad_()
        optimizer.step()

    return loss_of, optimizer, step


def work(rank: int, address: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    for kind in ("ddp", "fsdp"):
        compare(kind, rank)
    dist.destroy_process_group()


def compare(kind: str, rank: int) -> None:
    model = build()
    loss_of, optimizer, step_of = {"ddp": ddp, "fsdp": fsdp}[kind](model)
    for step in range(STEPS):
        x = {s: v.chunk(2)[rank] for s, v in batch(step).items()}
        optimizer.zero_grad()
        loss, _ = loss_of(x)
        loss.backward()
        step_of()
        share_counters(model)
    state = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in model.state_dict().items()}
    for name, want in alone().items():
        torch.testing.assert_close(state[name], want, rtol=1e-9, atol=1e-12, msg=f"{kind}: {name}")


@pytest.mark.skipif(not dist.is_available() or os.name != "posix", reason="torch without gloo")
@pytest.mark.subprocess
@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    start(work, (f"file://{tmp_path / 'meeting'}",), 2)
