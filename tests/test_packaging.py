"""What an index and a type checker are told: the description, the metadata, the files of an sdist, annotations."""

import ast
import inspect
import re
import runpy
import shutil
import subprocess
import sys
from email import message_from_bytes
from pathlib import Path

import numpy as np
import pytest
import warm_process

import sparc_kernels
from sparc_kernels.io import weights
from sparc_kernels.train import trainer

ROOT = Path(__file__).resolve().parents[1]
README = """# Title
See [the equations](docs/math.md#loss), [below](#below) and [the
paper](https://arxiv.org/abs/1).

![Picture, of two](docs/picture.png)

```python
f[0](docs/math.md)
```
"""


def describe(readme: str, source: str | None) -> str:
    pytest.importorskip("setuptools", minversion="77")
    return runpy.run_path(str(ROOT / "setup.py"))["describe"](readme, source)


def test_without_an_address_links_are_their_text():
    assert describe(README, None) == (
        "# Title\nSee the equations, below and [the\npaper](https://arxiv.org/abs/1).\n\n"
        "```python\nf[0](docs/math.md)\n```\n"
    )


@pytest.mark.parametrize("source", ["https://example.org/x/y", "https://example.org/x/y/"])
def test_with_an_address_links_are_absolute(source):
    at = "https://example.org/x/y"
    want = README.replace("(docs/math.md#", f"({at}/blob/HEAD/docs/math.md#").replace("(#below)", f"({at}#below)")
    assert describe(README, source) == want.replace("(docs/picture", f"({at}/raw/HEAD/docs/picture")


def egg_info(root: Path, out: Path) -> Path:
    pytest.importorskip("setuptools", minversion="77")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(out)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / "sparc_kernels.egg-info"


def targets(description: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", description)


def test_the_metadata_is_fit_for_an_index(tmp_path):
    made = egg_info(ROOT, tmp_path)
    metadata = message_from_bytes((made / "PKG-INFO").read_bytes())
    assert metadata["Description-Content-Type"] == "text/markdown" and metadata["License-Expression"] == "Apache-2.0"
    assert "Paper, https://arxiv.org/abs/2507.06265" in metadata.get_all("Project-URL")
    assert "sparse autoencoder" in metadata["Keywords"]
    assert {"Typing :: Typed", "Environment :: GPU :: NVIDIA CUDA"} <= set(metadata.get_all("Classifier"))
    description = metadata.get_payload()
    assert "# sparc_kernels" in description and len(description) > 10_000
    assert all(target.startswith("https://") for target in targets(description))

    sources = set((made / "SOURCES.txt").read_text().splitlines())
    tracked = [p for folder in ("benchmarks", "docs", "sparc_kernels", "tests") for p in (ROOT / folder).rglob("*")]
    kinds = {".py", ".npz", ".md", ".png", ".svg", ".typed", ".html"}
    needed = {p.relative_to(ROOT).as_posix() for p in tracked if p.suffix in kinds}
    needed |= {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "constraints.txt", "setup.py", ".ci/run"}
    needed |= {"mkdocs.yml", ".pre-commit-config.yaml"}
    assert "tests/conftest.py" in needed and needed <= sources, needed - sources
    assert not any("__pycache__" in path for path in sources)


def test_one_line_turns_the_links_on(tmp_path):
    for name in ("setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "sparc_kernels").mkdir()
    shutil.copy(ROOT / "sparc_kernels" / "__init__.py", tmp_path / "sparc_kernels")
    line = 'Source = "https://example.org/x/y"'
    project = (ROOT / "pyproject.toml").read_text().replace("[project.urls]\n", f"[project.urls]\n{line}\n")
    assert line in project
    (tmp_path / "pyproject.toml").write_text(project)
    links = targets((egg_info(tmp_path, tmp_path) / "PKG-INFO").read_text())
    relative = [t for t in targets((ROOT / "README.md").read_text()) if not t.startswith("https:")]
    below = [t for t in links if t.startswith("https://example.org/x/y/")]
    assert len(below) == len(relative) >= 5 and "https://example.org/x/y/raw/HEAD/docs/demo_gallery.png" in below


def test_hooks_lint_with_the_version_of_ci():
    pinned = [
        re.findall(r"ruff==([\d.]+)", (ROOT / name).read_text())
        for name in ("pyproject.toml", ".pre-commit-config.yaml")
    ]
    assert len(pinned[0]) == 1 and set(pinned[1]) == set(pinned[0])


def test_type_checkers_see_what_is_exported():
    tree = ast.parse(Path(sparc_kernels.__file__).read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If) and n.test.id == "TYPE_CHECKING")
    seen = {name.asname: node.module for node in block.body for name in node.names}
    assert seen == sparc_kernels._EXPORTS | dict.fromkeys(sparc_kernels._MODULES)
    assert (Path(sparc_kernels.__file__).with_name("py.typed")).exists()


def test_hints_hold_for_a_clone_and_for_an_index():
    """Extras do not: their spelling depends on where sparc_kernels came from."""
    for path in Path(sparc_kernels.__file__).parent.rglob("*.py"):
        assert not re.search(r"pip install\W*\S*\[", path.read_text()), path.name


def functions(thing):
    """The public functions of a module, class or function, a class's own constructor too."""
    if inspect.ismodule(thing):
        own = [v for n, v in vars(thing).items() if n[0] != "_" and getattr(v, "__module__", "") == thing.__name__]
        return [f for v in own for f in functions(v)]
    if inspect.isclass(thing):
        own = [getattr(v, "fget", v) for n, v in vars(thing).items() if n[0] != "_" or n == "__init__"]
        return [f for f in own if inspect.isfunction(f) and f.__module__ == thing.__module__]
    return [inspect.unwrap(thing)] if callable(thing) else []


def test_the_public_surface_is_annotated():
    exported = [getattr(sparc_kernels, name) for name in sparc_kernels.__all__]
    documented = [weights.load_model, weights.save_weights, weights.export_official]
    public = [f for v in [*exported, *documented, trainer.Trainer, trainer.TrainConfig] for f in functions(v)]
    assert len(public) > 60
    missing = []
    for f in public:
        signature = inspect.signature(f)
        names = [n for n, p in signature.parameters.items() if p.annotation is p.empty and n != "self"]
        names += ["return"] * (signature.return_annotation is signature.empty and f.__name__ != "__init__")
        missing += [f"{f.__module__}.{f.__qualname__}: {n}" for n in names]
    made = "sparc_kernels.nn.outputs.AlignedOutputs.__init__"  # by forward alone
    assert [text for text in missing if not text.startswith(made)] == []


BASE = """
import sys
for name in ("h5py", "matplotlib", "scipy", "sklearn", "tqdm", "tensorboard", "wandb"):
    sys.modules[name] = None
from sparc_kernels import cli
given = ["--stream=a=a.npy", "--stream=b=b.npy"]
few = ["--n-latents=16", "--k=3", "--auxk=0", "--epochs=1", "--device=cpu"]
codes = [cli.main(["train", *given, *few, "--out=run"]), cli.main(["encode", *given, "--model=run", "--out=codes"]),
         cli.main(["show", "1", *given, "--model=run"])]
sys.exit(max(codes))
"""


@pytest.mark.subprocess
def test_a_base_install_trains(tmp_path):
    """It needed safetensors of an extra, for the weights at its end."""
    text = (ROOT / "pyproject.toml").read_text()
    base = re.search(r"^dependencies = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)[1]
    assert re.findall(r'"([a-z]+)', base) == ["torch", "numpy", "safetensors", "filelock", "triton"]
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(0).standard_normal((40, 8), dtype=np.float32))
    done = warm_process.run("-c", BASE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model.safetensors").exists() and len(list((tmp_path / "codes").iterdir())) == 2
