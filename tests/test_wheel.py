"""The wheel, installed in a fresh environment: its files, and the quick demo that runs from it."""

import json
import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.subprocess, pytest.mark.slow]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The scripts of a fresh environment that has the wheel, and else what the tests have."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    source, env = folder / "source", folder / "env"
    shutil.copytree(ROOT / "sparc_kernels", source / "sparc_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    venv.create(env)
    scripts = env / ("Scripts" if os.name == "nt" else "bin")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ("--no-deps", "--no-index", "--quiet")
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # what lies there would count as installed
    wheel = [*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(wheel, check=True, capture_output=True, env=clean, cwd=folder)
    (made,) = folder.glob("sparc_kernels-*.whl")
    install = [*pip, "--python", str(scripts / "python"), "install", *offline, str(made)]
    subprocess.run(install, check=True, capture_output=True, env=clean, cwd=folder)
    (packages,) = env.rglob("site-packages")
    (packages / "torch_and_others.pth").write_text("\n".join(site.getsitepackages()))
    return scripts


@pytest.mark.parametrize(("pattern", "least"), [("*.py", 80), ("*.html", 4)])
def test_the_wheel_has_every_module_and_template(installed, pattern, least):
    (package,) = installed.parent.glob("**/site-packages/sparc_kernels")
    have = {path.relative_to(package) for path in package.rglob(pattern)}
    want = {path.relative_to(ROOT / "sparc_kernels") for path in (ROOT / "sparc_kernels").rglob(pattern)}
    assert have == want and len(want) >= least
    assert (package / "py.typed").exists()


@pytest.fixture(scope="module")
def quick(installed, tmp_path_factory):
    """The folder that `sparc-kernels demo --quick` wrote, its process, its record."""
    folder = tmp_path_factory.mktemp("demo")
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    env |= {"OMP_NUM_THREADS": "1"}  # two wait for each other beside another test

    def run(*command):
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)

    where = run(installed / "python", "-c", "import sparc_kernels; print(sparc_kernels.__file__)")
    assert Path(where.stdout.strip()).is_relative_to(installed.parent), where.stderr
    done = run(installed / "sparc-kernels", "demo", "--quick", "--device", "cpu", "--out", "not/there")
    assert done.returncode == 0, done.stderr
    out = folder / "not" / "there"
    return out, done, json.loads((out / "alignment.json").read_text())


def test_global_cross_comes_first(quick):
    _, done, record = quick
    scores = record["scores"]
    assert record["global_cross_first"] and record["quick"]
    assert "global+cross first in Jaccard and in latent R@1: yes" in done.stdout
    own = [scores[name]["own"]["jaccard"] for name in ("global+cross", "global", "local+cross", "local")]
    assert own == sorted(own, reverse=True) and own[0] > 0.7 and own[-1] < 0.15
    recall = {name: score["latent"]["R@1"] for name, score in scores.items()}
    assert recall["global+cross"] > 1.2 * max(recall["global"], recall["local+cross"])
    assert min(recall["global"], recall["local+cross"]) > 10 * record["chance"]["R@1"]
    assert recall["local"] < 5 * record["chance"]["R@1"]
    for score in scores.values():
        assert score["own"]["explained_variance_self"] > 0.7


def test_chance_and_local_selection_are_reported(quick):
    _, _, record = quick
    assert record["held_out"] == 300 and record["chance"]["R@10"] == pytest.approx(10 / 300)
    for name, score in record["scores"].items():
        if name.startswith("local"):  # trained locally: both selections are one
            assert score["own"] == pytest.approx(score["local"])
        else:
            assert score["own"]["jaccard"] > score["local"]["jaccard"] + 0.2
        assert score["local"]["jaccard_chance"] < 0.2


def test_files_and_text(quick):
    out, done, _ = quick
    assert {f.name for f in out.iterdir()} == {"alignment.json", "alignment.txt", "curves.png", "gallery.png"}
    for name in ("curves.png", "gallery.png"):
        picture = (out / name).read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
    table = (out / "alignment.txt").read_text()
    assert table in done.stdout
    for title in (
        "Jaccard, alive latents",
        "dead in some (mixed)",
        "latent R@10",
        "cross-reconstruction MRR",
        "chance",
    ):
        assert title in table
    assert "Quick run" in done.stdout
    assert done.stderr == ""  # no bar where there is no terminal, no warning
