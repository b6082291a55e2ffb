"""What README.md and docs/ print is so: every snippet and command runs or is run by a named test, every link leads
somewhere. CUDA's graphs have a stand-in where there is no GPU."""

import inspect
import math
import re
import shlex
from pathlib import Path
from typing import NamedTuple
from unittest.mock import MagicMock

import pytest
import torch
from names import Sources, prose, spans
from torch.distributed import run as torchrun
from torch.nn.parallel import DistributedDataParallel

import sparc_kernels
from benchmarks import __main__ as benchmark
from benchmarks import gpu_report, host, plot, ranks, report
from sparc_kernels import cli
from sparc_kernels.cli import demo

ROOT = Path(__file__).resolve().parents[1]
TOP = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
DOCUMENTS = [*TOP, *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
NOT_RUN = {"math": "equations", "text": "what a command printed, with machine and date before it"}
JOBS = ("bash", "yaml")  # for GPUs or a cluster: the lines of torchrun in them are read
SETUP = (
    "python3 -m venv ",
    "pip install ",
    "pre-commit install ",
    ". .venv/bin/activate",
)  # the environment is this one
PARSERS = {
    "sparc-kernels": cli.parse,
    "python -m benchmarks host": host.parse,
    "python -m benchmarks ranks": ranks.parse,
    "python -m benchmarks": benchmark.parse,
    "python -m benchmarks.report": report.parse,
    "python -m benchmarks.plot": plot.parse,
    "python benchmarks/gpu_report.py": gpu_report.parse,
    "pytest": list,
    "python -m pytest": list,
}
RECORDED = "docs/results.md"  # its commands made the records
ELSEWHERE = {  # command -> what runs it, or a smaller one; here its arguments are read
    "sparc-kernels demo --out demo": "tests/test_wheel.py::quick",
    "python -m pytest -q -n 2": ".ci/run",
    "python -m pytest -q tests/ops/test_latent_reduce.py": ".ci/run",
    "sparc-kernels verify": "tests/tools/test_verify.py::test_command_passes_and_writes_json",
    "sparc-kernels verify --interpret": "tests/tools/test_verify.py::test_interpreted_kernels",
    "sparc-kernels verify --adversarial": "tests/tools/test_adversarial.py::test_the_command_passes_and_writes_json",
    "sparc-kernels verify --compile": "tests/tools/test_compiler.py::test_interpreted_process_compiles_too",
    "sparc-kernels audit --quick": "tests/tools/test_audit.py::test_nothing_spills_and_everything_fits",
    "sparc-kernels cost": "tests/tools/test_cost.py::test_without_triton",
    "sparc-kernels tune --shape 256,8192,64,1024,3": "tests/tools/test_tune.py::test_limit_is_told",
    "python benchmarks/gpu_report.py --call correctness":
        "tests/benchmarks/test_gpu_report.py::test_the_correctness_call",
    "python benchmarks/gpu_report.py --call timing": "tests/benchmarks/test_gpu_report.py::test_the_timing_call",
    "python -m benchmarks host": "tests/benchmarks/test_host.py::test_every_row_is_printed_and_recorded",
    "python -m benchmarks": "tests/benchmarks/test_benchmarks.py::made",
    "python -m benchmarks --device cpu --quick --out run.json": "tests/benchmarks/test_benchmarks.py::made",
    "python -m benchmarks --official CLONE --filter 'open-images.*full' --minutes 5":
        "tests/benchmarks/test_benchmarks.py::test_the_official_class_is_run_from_its_folder",
    "python -m benchmarks --quick --compare old.json --fail-on-regression 10":
        "tests/benchmarks/test_benchmarks.py::test_a_planted_twofold_slowdown_is_caught",
    "python -m benchmarks --compare old.json --with new.json":
        "tests/benchmarks/test_benchmarks.py::test_a_planted_twofold_slowdown_is_caught",
    "python -m benchmarks.report":
        "tests/benchmarks/test_benchmarks.py::test_readme_and_results_are_what_the_records_say",
    "python -m benchmarks.plot run.json --out plots":
        "tests/benchmarks/test_benchmarks.py::test_plots_are_drawn_from_the_record_alone",
    "pytest benchmarks": "tests/benchmarks/test_benchmarks.py::test_pytest_benchmark_runs_the_same_cases",
}  # fmt: skip


class Block(NamedTuple):
    language: str
    text: str
    line: int  # of its first line in the document, from 1


def split(document: str) -> tuple[list[Block], str]:
    """The fenced blocks of a document, and what is outside of them, line by line."""
    blocks, prose, inside = [], [], None
    for number, line in enumerate((ROOT / document).read_text("utf-8").splitlines(), 1):
        if line.startswith("```"):
            if inside is None:
                inside = Block(line[3:].strip(), "", number + 1)
            else:
                blocks.append(inside)
                inside = None
        elif inside is None:
            prose.append(line)
        else:
            inside = inside._replace(text=f"{inside.text}{line}\n")
    assert inside is None, f"{document}: the block of line {inside.line} has no end"
    return blocks, "\n".join(prose)


def commands(block: Block) -> list[list[str]]:
    """The words of every command, programs without their environment's folder; those that make it left out."""
    lines = block.text.replace("\\\n", " ").splitlines()
    parts = [part for line in lines if line.strip() for part in re.split(r"\s&&\s", line)]
    commands = [shlex.split(re.sub(r"^\.venv/bin/", "", part.strip()), comments=True) for part in parts]
    return [words for words in commands if words and not f"{' '.join(words)} ".startswith(SETUP)]


def read(words: list[str]):
    """What the command's own parser makes of it."""
    program = max((p for p in PARSERS if words[: len(p.split())] == p.split()), key=len, default=None)
    assert program, f"{shlex.join(words)}: nobody reads it; name its parser in PARSERS"
    return PARSERS[program](words[len(program.split()) :])


def launches(block: Block) -> list[list[str]]:
    """The words of every command of torchrun in a job's script or manifest."""
    if block.language == "yaml":
        lists = re.findall(r"command: \[(torchrun.*?)\]", block.text, re.DOTALL)
        return [[word.strip().strip('"') for word in text.split(",")] for text in lists]
    lines = block.text.replace("\\\n", " ").splitlines()
    return [shlex.split(line[line.index("torchrun") :]) for line in lines if re.search(r"^(srun )?torchrun ", line)]


def read_launch(words: list[str]) -> None:
    """What torchrun's own parser makes of it, and the program's of the rest."""
    launch = torchrun.parse_args(words[1:])
    assert launch.module, "python -m"
    programs = {"sparc_kernels": ["sparc-kernels"], "benchmarks": ["python", "-m", "benchmarks"]}
    read([*programs[launch.training_script], *launch.training_script_args])


def run_command(words: list[str]) -> None:
    if words[0] == "torchrun":  # tests/distributed and tests/train start processes
        read_launch(words)
        return
    read(words)
    if shlex.join(words) not in ELSEWHERE:
        assert words[0] == "sparc-kernels", f"{shlex.join(words)}: run it here, or name in ELSEWHERE what does"
        assert cli.main(words[1:]) == 0, shlex.join(words)


def run_python(document: str, block: Block, text: str, names: dict) -> None:
    if "forward_sync_buffers" not in inspect.signature(DistributedDataParallel).parameters:
        text = text.replace("forward_sync_buffers", "broadcast_buffers")  # as the document says of torch before 2.13
    code = compile("\n" * (block.line - 1) + text, str(ROOT / document), "exec", dont_inherit=True)
    exec(code, names)


def as_on_a_gpu(monkeypatch) -> None:
    """Where there is none: captures run what is captured, replays do nothing, a graphed module is itself."""
    for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())

    def graphed(module, args):
        module(*args)
        return module

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphed)


@pytest.mark.parametrize("document", DOCUMENTS)
@pytest.mark.slow
def test_every_block_runs(document, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    if document == "README.md":  # its demo --only-data --quick
        streams = request.getfixturevalue("quick_streams")
        monkeypatch.setattr(demo, "unicode_streams", lambda seed, quick: {(0, True): streams}[seed, quick])
    if not torch.cuda.is_available():
        as_on_a_gpu(monkeypatch)
    for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, str(value))  # as torchrun does
    monkeypatch.setenv("MASTER_PORT", "0")
    names = {"__name__": "__main__"}
    try:
        for block in split(document)[0]:
            if block.language == "python":
                run_python(document, block, block.text, names)
            elif block.language == "diff":
                lines = block.text.splitlines()
                assert all(line[:1] in "+- " for line in lines)
                kept = "\n".join("" if line.startswith("-") else line[1:] for line in lines)
                run_python(document, block, kept, names)
            elif block.language == "sh":
                for words in commands(block):
                    read(words) if document == RECORDED else run_command(words)
            elif block.language in JOBS:
                assert launches(block), f"{document}:{block.line}: nothing to read"
                for words in launches(block):
                    read_launch(words)
            else:
                assert block.language in NOT_RUN, f"{document}:{block.line}: {block.language!r}: run it, or say why not"
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if document == "README.md":  # what it says of the results
        S, B, k = len(names["widths"]), names["B"], 64
        assert names["indices"].shape == (B, k) and names["indices"].dtype == torch.int64
        assert names["values"].shape == (S, B, k) and names["errors"].shape == (S, S)
        assert {pair: tuple(v.shape) for pair, v in names["recons"].items()} == {(0, 1): (B, names["widths"][0])}
        assert math.isfinite(names["loss"].item())


def test_what_is_not_run_here_is_run_elsewhere():
    blocks = [block for document in DOCUMENTS for block in split(document)[0] if block.language == "sh"]
    printed = {shlex.join(words) for block in blocks for words in commands(block)}
    assert set(ELSEWHERE) <= printed, "ELSEWHERE names what no document has"
    scripts = [word for command in printed for word in shlex.split(command) if word.endswith(".py")]
    assert scripts and [script for script in scripts if not (ROOT / script).exists()] == []
    for where in ELSEWHERE.values():
        file, _, name = where.partition("::")
        text = (ROOT / file).read_text()
        assert f"def {name}(" in text if name else file == ".ci/run", where


def test_no_block_escapes():
    """Indented code would: only what is fenced is run."""
    for document in DOCUMENTS:
        _, prose = split(document)
        assert not re.search(r"^\n {4,}(?![-*|])\S", prose, re.MULTILINE), f"{document}: fence the indented block"


def test_outputs_say_where_and_when():
    for document in DOCUMENTS:
        lines = (ROOT / document).read_text("utf-8").splitlines()
        for block in split(document)[0]:
            if block.language == "text":
                before = " ".join(lines[max(0, block.line - 6) : block.line - 1])
                assert re.search(r"\d{4}-\d\d-\d\d", before) and "torch" in before, f"{document}:{block.line}"
    paragraphs = split("README.md")[1].split("\n\n")
    claims = [text for text in paragraphs if "demo" in text and re.search(r"\d s\b|minute", text)]
    assert len(claims) == 1 and re.search(r"\d{4}-\d\d-\d\d", claims[0]), "one claim on the demo's time, with machine"


def anchors(path: Path) -> set[str]:
    """Of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", split(path.relative_to(ROOT).as_posix())[1], re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_link_leads_somewhere():
    seen = 0
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)\s]+)\)", split(document)[1]):
            if re.match("[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            file = (ROOT / document).parent / path if path else ROOT / document
            assert file.exists(), f"{document}: {target}"
            assert not anchor or anchor in anchors(file.resolve()), f"{document}: {target}"
            seen += 1
    assert seen > 10


def test_commands_and_options_in_the_prose_exist(capsys):
    prose = "\n".join(split(document)[1] for document in DOCUMENTS)
    spans = re.findall(r"`([^`]+)`", prose)
    for parse in (benchmark.parse, host.parse, ranks.parse, report.parse, plot.parse, gpu_report.parse):
        with pytest.raises(SystemExit):
            parse(["--help"])
    for name in cli.SUBCOMMANDS:
        with pytest.raises(SystemExit):
            cli.parse([name, "--help"])
    options = set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
    options |= {"--all", "--strict"}  # of tests/scripts/launch_everything.py and twine
    options |= {"--moments"}  # of tests/scripts/kill_ranks.py
    options |= {"--" + name.replace("_", "-") for name in vars(torchrun.parse_args(["script"]))}
    asked = {option for span in spans for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
    assert len(asked) > 20 and asked <= options, asked - options
    named = {span.split()[1] for span in spans if re.match(r"sparc-kernels [a-z]", span)}
    assert len(named) > 5 and named <= set(cli.SUBCOMMANDS), named


@pytest.fixture(scope="module")
def sources() -> Sources:
    return Sources(ROOT)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_name_in_a_document_exists(document, sources):
    text = (ROOT / document).read_text("utf-8")
    assert [(span, gone) for span in spans(text) if (gone := sources.unresolved(span))] == []


def test_every_name_in_a_docstring_or_comment_exists(sources):
    seen, gone = 0, []
    for file in sorted(sources.files):
        if not file.endswith(".py"):
            continue
        for line, text in prose((ROOT / file).read_text("utf-8")):
            for span in spans(text):
                seen += 1
                gone += [f"{file}:{line}: {name}" for name in sources.unresolved(span, file)]
            named = re.findall(r"(?<![\w./-])(?!sparc/)[\w./-]*[\w-]\.(?:md|py)\b", text)  # sparc/: the official ones
            gone += [f"{file}:{line}: {name}" for name in named if sources.unresolved(name, file)]
    assert seen > 400 and gone == []


@pytest.mark.parametrize(
    ("span", "gone"),
    [
        ("py", ["py"]),
        ("AlignedSAE._aux_loss", ["AlignedSAE._aux_loss"]),
        ("module.py: AlignedSAE._aux_loss", ["AlignedSAE._aux_loss"]),
        ("module.py: forward", ["forward"]),
        ("selections.py", ["selections.py"]),
        ("ops/no_such.py: select", ["select"]),
        ("tuned/*.json", ["tuned/*.json"]),
        ("no_such_folder/", ["no_such_folder/"]),
        ("no_such_record.json", ["no_such_record.json"]),
        ("metrics.Row", ["metrics.Row"]),
        ("sparc_kernels.decode_mse", ["sparc_kernels.decode_mse"]),
        ("benchmarks.record.loads", ["benchmarks.record.loads"]),
        ("torch.sparse.sampled_mm", ["torch.sparse.sampled_mm"]),
        ("mse_los_{s}", ["mse_los_"]),
        ("SparcAdam(model, shadows=torch.bfloat16)", []),
        ("_select_kernels", ["_select_kernels"]),
        ("*_no_such", ["*_no_such"]),
        ("ops.aligned_loss.NoSuchLoss", ["ops.aligned_loss.NoSuchLoss"]),
        ("model.training_steps(x, optimizer)", ["model.training_steps"]),
        ("python tests/launch_something.py --all", ["tests/launch_something.py"]),
    ],
)
def test_a_planted_name_is_found(span, gone, sources):
    assert sources.unresolved(span) == gone


def test_the_architecture_page_has_every_module(sources):
    page = (ROOT / "docs" / "architecture.md").read_text()
    modules = [file for file in sources.files if re.fullmatch(r"sparc_kernels/.*/(?!__)\w+\.py", file)]
    assert len(modules) > 60 and [file for file in modules if f"`{Path(file).name}`" not in page] == []


def test_the_site_has_every_public_name(sources):
    listed = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    public = {f"sparc_kernels.{name}" for name in sparc_kernels.__all__ if name != "__version__"}
    assert public <= set(listed) and len(listed) == len(set(listed))
    assert [name for name in listed if sources.unresolved(name)] == []


def test_extras_that_are_named_exist():
    for document in DOCUMENTS:
        text = (ROOT / document).read_text("utf-8")
        extras = re.search(r"optional-dependencies\]\n(.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.DOTALL)[1]
        for wanted in re.findall(r'"?\.\[([\w,]+)\]"', text):
            assert all(re.search(rf"^{extra} = ", extras, re.MULTILINE) for extra in wanted.split(",")), wanted
        assert "-c constraints.txt" not in text or (ROOT / "constraints.txt").exists()
