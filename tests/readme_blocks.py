"""Run the code blocks of README.md or other pages as a reader would: `python tests/readme_blocks.py [README.md ...]`.

Python and shell blocks of a page run in order in one temporary folder that holds links to examples/, docs/, the
Makefile and the environment (.venv); each block is a process of its own. Blocks of other languages
(text, toml, bibtex) are not run, and a fence without a language is an error. An HTML comment directly
above a fence directs it:

    <!-- not run: reason -->   counted as skipped; only for what cannot run in CI, such as a GPU
    <!-- setup: code -->       run before the block, in its language; may span lines; hidden from readers
    <!-- continues -->         a Python block that goes on where the previous Python block ended

A page that says `<!-- one program -->` is one program: its Python blocks run in one process, one after the other, so
each goes on where the one before ended. Line numbers of its tracebacks are those of the page.

`--done "make test"` names a command line that the caller has run already. The closing line is
'N passed, N failed, N skipped'; the exit code is 1 when a block failed or when none ran.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("examples", "docs", "Makefile")
SHELL = frozenset({"bash", "sh", "shell", "console"})
PYTHON = frozenset({"python", "py"})
NOT_CODE = frozenset({"text", "toml", "yaml", "json", "csv", "bibtex", "diff", "mermaid"})

_FENCE = re.compile(r"^(?P<indent> {0,3})(?P<marks>`{3,}|~{3,})\s*(?P<language>[\w+-]*)")
_DIRECTIVE = re.compile(r"^(not run:|setup:|continues$)", re.IGNORECASE)
ONE_PROGRAM = "<!-- one program -->"


@dataclass(frozen=True)
class Block:
    """One code block; `line` is the 1-based line of its fence."""

    line: int
    language: str
    code: str
    not_run: str = ""


def parse(text: str) -> list[Block]:
    """The Python and shell blocks of a Markdown text.

    Raises:
        ValueError: a fence without a language or without an end, a directive that is unknown, applies
            to nothing, or gives no reason.
    """
    lines = text.splitlines()
    blocks: list[Block] = []
    directives: list[str] = []
    previous_python: str | None = None
    program = _Program(len(lines)) if ONE_PROGRAM in lines else None
    at = setup_line = 0
    while at < len(lines):
        start = at + 1
        if lines[at].startswith("<!--"):
            comment, at = _until(lines, at, "-->")
            directive = comment.removeprefix("<!--").strip()
            if _DIRECTIVE.match(directive):
                directives.append(directive)
                setup_line = start
            continue
        fence = _FENCE.match(lines[at])
        if fence is None:
            if directives and lines[at].strip():
                raise ValueError(f"line {start}: the comment {directives[-1]!r} stands above no code block")
            at += 1
            continue
        body, at = _body(lines, at, fence)
        language = fence["language"].lower()
        if not language:
            raise ValueError(f"line {start}: a code block without a language; write ```text if it is no code")
        if language not in SHELL | PYTHON | NOT_CODE:
            raise ValueError(f"line {start}: the language {language!r} is not known to tests/readme_blocks.py")
        if language in PYTHON and program is not None and not any(d.lower().startswith("not run") for d in directives):
            if program.add(start, body, directives, setup_line):
                blocks.append(Block(start, language, ""))  # its code is known at the end of the page
        elif language not in NOT_CODE:
            block = _directed(start, language, body, directives, previous_python)
            blocks.append(block)
            if language in PYTHON:
                previous_python = block.code
        directives = []
    if directives:
        raise ValueError(f"the comment {directives[-1]!r} stands above no code block")
    if program is None:
        return blocks
    return [Block(b.line, b.language, program.code()) if b.line == program.first else b for b in blocks]


class _Program:
    """The Python of a page at its own lines, with nothing between."""

    def __init__(self, size: int) -> None:
        self._lines = [""] * size
        self.first = 0  # the line of the first fence

    def add(self, line: int, body: str, directives: list[str], setup_line: int) -> bool:
        """Put a block in its place; returns whether it is the first."""
        for directive in directives:
            kind, _, rest = directive.partition(":")
            if kind.lower() != "setup" or len(directives) > 1:
                raise ValueError(f"line {line}: {directives!r}: a page that is one program has 'setup' alone")
            code = textwrap.dedent(rest.lstrip(" ")).splitlines()
            self._lines[setup_line - 1 : setup_line - 1 + len(code)] = code
        code = body.splitlines()
        self._lines[line : line + len(code)] = code
        self.first = self.first or line
        return self.first == line

    def code(self) -> str:
        return "\n".join(self._lines).rstrip() + "\n"


def run(block: Block, folder: Path, *, done: Collection[str] = (), timeout: float = 600) -> str:
    """Run a block in `folder`; the empty string, or what went wrong with the end of the output."""
    if block.language in PYTHON:
        command = [sys.executable, "-c", block.code]
    else:
        command = ["bash", "-euo", "pipefail", "-c", _shell(block, done)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # Not resolve(): the python of a virtual environment is a link, and its tools lie beside the link.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    environment["MPLBACKEND"] = "Agg"
    try:
        result = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return f"still running after {timeout:.0f} s"
    return "" if result.returncode == 0 else f"exit code {result.returncode}\n{result.stdout[-4000:]}"


def main(arguments: list[str] | None = None) -> int:
    """Run all blocks of the files and print the closing line."""
    parser = argparse.ArgumentParser(description="Run the code blocks of Markdown files.")
    parser.add_argument("files", nargs="*", type=Path, default=[ROOT / "README.md"])
    parser.add_argument("--done", action="append", default=[], help="a command line that was run already")
    options = parser.parse_args(arguments)
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for file in options.files:
        run_page(file, counts, options.done)
    print(", ".join(f"{count} {name}" for name, count in counts.items()))
    return 1 if counts["failed"] or not counts["passed"] else 0


def run_page(file: Path, counts: dict[str, int], done: Collection[str]) -> None:
    """Run the blocks of one file in a folder of their own, say how each went, and count."""
    blocks = parse(file.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for entry in LINKED:
            if (ROOT / entry).exists():
                (folder / entry).symlink_to(ROOT / entry)
        (folder / ".venv").symlink_to(sys.prefix)
        for block in blocks:
            title = f"{file.name}:{block.line} ({block.language})"
            if block.not_run:
                print(f"skipped  {title}: {block.not_run}", flush=True)
                counts["skipped"] += 1
                continue
            start = time.monotonic()
            problem = run(block, folder, done=done)
            print(f"{'FAILED' if problem else 'passed'}   {title} {time.monotonic() - start:.1f} s", flush=True)
            if problem:
                print(textwrap.indent(problem, "    "), flush=True)
            counts["failed" if problem else "passed"] += 1


def _until(lines: list[str], at: int, mark: str) -> tuple[str, int]:
    """The text from line `at` up to `mark`, and the index of the line after it."""
    text = lines[at]
    while mark not in text:
        at += 1
        if at == len(lines):
            raise ValueError(f"a comment has no end {mark!r}")
        text += "\n" + lines[at]
    return text[: text.index(mark)], at + 1


def _body(lines: list[str], at: int, fence: re.Match[str]) -> tuple[str, int]:
    """The text inside the fence that opens at index `at`, and the index of the line after it."""
    for end in range(at + 1, len(lines)):
        closing = lines[end].strip()
        if closing.startswith(fence["marks"]) and not closing.strip(fence["marks"][0]):
            indent = len(fence["indent"])
            inside = [line[indent:] if line[:indent].isspace() else line for line in lines[at + 1 : end]]
            return "\n".join(inside) + "\n", end + 1
    raise ValueError(f"line {at + 1}: the code block has no end")


def _directed(line: int, language: str, body: str, directives: list[str], previous: str | None) -> Block:
    """The block with its directives applied."""
    not_run = ""
    for directive in directives:
        kind, _, rest = directive.partition(":")
        if kind.lower() == "not run":
            not_run = rest.strip()
            if not not_run:
                raise ValueError(f"line {line}: '<!-- not run: ... -->' needs a reason")
        elif kind.lower() == "setup":
            body = textwrap.dedent(rest.strip("\n")).lstrip(" ") + "\n" + body
        elif language not in PYTHON or previous is None:
            raise ValueError(f"line {line}: '<!-- continues -->' needs a Python block before a Python block")
        else:
            body = previous + body
    return Block(line, language, body, not_run)


def _shell(block: Block, done: Collection[str]) -> str:
    """The commands of a shell block: `$ ` prompts removed, output dropped, done commands left out."""
    lines = block.code.splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith(("$ ", "> "))]
    return "\n".join(":" if line.split("#")[0].strip() in done else line for line in lines)


if __name__ == "__main__":
    sys.exit(main())
