"""Resolve the code spans of documents, docstrings and comments against the sources: none may name what is gone."""

from __future__ import annotations

import ast
import builtins
import fnmatch
import importlib
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import torch as safetensors
from torch.distributed import fsdp

FOLDERS = ("sparc_kernels", "benchmarks", "tests", "docs")
SUFFIXES = "py md json txt toml yml csv html npz npy pt pth safetensors png svg"
PROGRAMS = ("sparc-kernels", "python", "python3", "pip", "pytest", "mkdocs", "twine", "torchrun", "pre-commit", ".")
LIBRARIES = {"torch": torch, "F": torch.nn.functional, "np": np, "tl": "triton.language"}
NAMESPACES = (  # whose members documents name without their module
    builtins, torch, torch.Tensor, torch.nn.functional, torch.nn.utils, torch.library, torch.optim.Optimizer,
    torch.amp, torch.backends.cuda.matmul, torch.testing, fsdp, safetensors, Path,
)  # fmt: skip
ELSEWHERE = {  # names of other programs and formats
    "CUBLAS_WORKSPACE_CONFIG", "FILE", "FLOPs", "GOMP_SPINCOUNT", "Source", "debug", "eai", "main", "null", "opcheck",
    "project.urls", "sparsify", "torchrun", "train_loop", "triton_op", "use_reentrant", "wgmma",
}  # fmt: skip
NAME = r"[A-Za-z_]\w*"


def spans(text: str) -> Iterator[str]:
    """The code spans of Markdown or of a docstring, without those of fenced blocks."""
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text):
        yield re.sub(r"\s+", " ", span)


def prose(source: str) -> Iterator[tuple[int, str]]:
    """Lines and texts of a module's docstrings and comments."""
    first = True  # of a statement
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and first):
            yield token.start[0], token.string
        elif token.type not in (tokenize.NL, tokenize.COMMENT):
            first = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)


class Sources:
    """Files of the repository, what each module defines, and every name or text in the code of all but the tests."""

    def __init__(self, root: Path):
        tops = [path for path in root.iterdir() if path.is_file()]
        deeper = [path for folder in (*FOLDERS, ".ci") for path in (root / folder).rglob("*") if path.is_file()]
        self.files = {path.relative_to(root).as_posix() for path in (*tops, *deeper) if "__pycache__" not in path.parts}
        self.folders = {parent.as_posix() for file in self.files for parent in Path(file).parents}
        self.defined: dict[str, set[str]] = {}
        self.members: set[str] = set()  # of classes and their instances
        self.names: set[str] = set()
        self.texts: set[str] = set()
        self.used: dict[str, tuple[set[str], set[str]]] = {}  # names and texts of each file
        self.own: tuple[set[str], set[str]] = set(), set()  # of the module whose docstring is read
        for file in self.files:
            text = (root / file).read_text("utf-8") if file.endswith((".py", ".toml", ".yml")) else ""
            self.used[file] = set(), set()
            if file.endswith(".py"):
                self.defined[file] = set()
                self._read(ast.parse(text), file, "")
            else:
                self.used[file][0].update(re.findall(rf"^\s*-?\s*({NAME})\s*[=:]", text, re.MULTILINE))
            if not file.startswith("tests/"):
                self.names |= self.used[file][0]
                self.texts |= self.used[file][1]

    def _read(self, node: ast.AST, file: str, within: str) -> None:
        names, texts = self.used[file]
        for child in ast.iter_child_nodes(node):
            inner = within
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                inner = f"{within}{child.name}."
                names.add(child.name)
                self.defined[file].add(f"{within}{child.name}")
                self.members |= {child.name} if within else set()
            elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                names.add(child.id)
                self.defined[file].add(f"{within}{child.id}")
                self.members |= {child.id} if within else set()
            elif isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
                names.add(child.attr)
                self.members.add(child.attr)
            elif isinstance(child, (ast.arg, ast.keyword)):
                names.add(child.arg or "")
            elif isinstance(child, ast.alias):
                names |= set((child.asname or child.name).split("."))
            elif isinstance(child, ast.JoinedStr):
                parts = [str(v.value) if isinstance(v, ast.Constant) else "{}" for v in child.values]
                texts.add("".join(parts))
            elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue  # a docstring is no evidence
            elif isinstance(child, ast.Constant) and isinstance(child.value, str):
                texts.add(child.value)
                names |= set(re.findall(rf"(?<![\w.-]){NAME}(?![\w.-])", child.value))
            self._read(child, file, inner)

    def _ending(self, path: str) -> list[str]:
        return [file for file in self.files if f"/{file}".endswith(f"/{path}")]

    def _is_path(self, path: str) -> bool:
        if "*" in path:
            return any(fnmatch.fnmatch(f"/{file}", f"*/{path}") for file in self.files)
        if path.endswith("/"):
            return any(f"/{folder}/".endswith(f"/{path}") for folder in self.folders) or path[:-1] in self.texts
        stem, dot, suffix = path.rpartition(".")
        made = stem in self.names and f"{{}}{dot}{suffix}" in self.texts  # f"{name}.json"
        return made or bool(self._ending(path)) or any(text.endswith(path) for text in self.texts)

    def _is_text(self, text: str) -> bool:
        return text in self.texts or text in self.own[1]

    def _is_member(self, file: str, name: str) -> bool:
        return any(name in self.defined[module] for module in self._ending(file))

    def _is_name(self, name: str) -> bool:
        head, _, rest = name.partition(".")
        if name in ELSEWHERE or head in ELSEWHERE:
            return True
        if not rest:
            if any(Path(folder).name == name for folder in self.folders):
                return True
            known = name in self.names or name in self.own[0] or self._is_text(name)
            known = known or any(hasattr(space, name) for space in NAMESPACES)
            return known or any(name in members for members in self.defined.values())
        if head in LIBRARIES:
            library = LIBRARIES[head]
            return _reach(importlib.import_module(library) if isinstance(library, str) else library, rest)
        if head in ("metrics", "reference", "checkpoint"):
            head, rest = "sparc_kernels", name
        if head in ("sparc_kernels", "benchmarks", "safetensors", "sklearn"):
            return _reach(importlib.import_module(head), rest)
        if "." in rest and any(Path(folder).name == head for folder in self.folders):  # a module by its room
            return self._is_name(rest)
        if any(name in members for members in self.defined.values()):
            return True
        if head in sys.stdlib_module_names and not self._ending(f"{head}.py"):
            return _reach(importlib.import_module(head), rest)
        owners = [Path(file) for file, members in self.defined.items() if rest in members]
        if owners:  # functions and constants of modules
            return any(head in (file.stem, *file.parts) for file in owners) or rest in self.members
        if any(head in members for members in self.defined.values()) and head[:1].isupper():
            return any(part == f"{head}.{rest}" for members in self.defined.values() for part in members) or any(
                hasattr(space, rest) for space in (torch.nn.Module, torch.optim.Optimizer)
            )
        return all(self._is_name(part) for part in name.split("."))

    def unresolved(self, span: str, file: str | None = None) -> list[str]:
        """Return those parts of a code span that name nothing. file: the module that has it."""
        self.own = self.used.get(file or "", (set(), set()))
        text = re.sub(r"\{\w*\}", "{}", span)
        if self._is_text(text) or span.startswith("-") or span.split()[0] in PROGRAMS:
            return [path for path in re.findall(r"[\w./-]+\.py\b", span) if not self._is_path(path)]
        if re.fullmatch(r"\*_\w+", span):
            return [] if any(name.endswith(span[1:]) for name in self.names | self.own[0]) else [span]
        member = re.fullmatch(r"([\w./-]+\.py): (.+)", span)
        if member:
            return [name for name in member[2].split(", ") if not self._is_member(member[1], name)]
        if re.fullmatch(rf"[\w./*-]*\.({SUFFIXES.replace(' ', '|')})|[\w.-][\w./-]*/", span):
            return [] if self._is_path(span) else [span]
        if not re.search(r"[A-Za-z_]{2}", span) or "://" in span or ";" in span or self._ending(span):
            return []
        bare = re.sub(r"\"[^\"]*\"|'[^']*'|\$?\b0x\w+|\([^()]*=\d[^()]*\)", " ", text)
        names = re.findall(rf"(?<![\w./-]){NAME}(?:\.{NAME})*", bare)
        if names != [bare]:  # an expression: its names, not its words
            names = [name for name in names if re.search(r"[._]|[a-z][A-Z]", name)]
        return [name for name in names if not self._is_name(name)]


def _reach(thing, path: str) -> bool:
    """Whether attributes, or submodules, lead along a dotted path."""
    for part in path.split("."):
        if not hasattr(thing, part):
            try:
                importlib.import_module(f"{thing.__name__}.{part}")
            except (ImportError, AttributeError):
                return False
        thing = getattr(thing, part)
    return True
