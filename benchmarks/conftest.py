"""Machine info of pytest-benchmark's JSON: versions, commit, CPU, GPU."""

import pytest
import torch

from benchmarks import environment


def pytest_addoption(parser):
    parser.addoption("--official", default=None, help="a clone of the official repository")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config, machine_info):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = environment.environment(device, torch.get_num_threads())
    machine_info.pop("node", None)  # the machine's name says nothing of its speed
    machine_info["sparc_kernels"] = {name: about[name] for name in about if name not in ("command", "variables")}
