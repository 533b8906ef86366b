"""The workflows of CI cannot be run here, so what a typing error in them would break is looked for in their text."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.y*ml"))
RUNNERS = {"ubuntu-24.04", "ubuntu-24.04-arm", "macos-15", "windows-2025"}  # never -latest: it moves
INPUTS = {"actions/checkout": {"fetch-depth"}, "actions/setup-python": {"python-version", "cache"}}
CONTEXTS = {"github.workflow", "github.ref", "runner.temp"}  # besides the matrix
MODULES = {"pip", "pytest", "benchmarks"}  # of `python -m`
SHELL = {"cd", "echo", "exit", "export", "set", "test"}
TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def commands(script: str) -> Iterator[list[str]]:
    """The words of each command of a shell script, without the variables that are set in front."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word and set(word) <= set(";&|"):
                if words:
                    yield words
                words = []
            elif words or not re.match(r"\w+=", word):
                words.append(word)


def command_problem(words: list[str]) -> str:
    """Why a command cannot run in a fresh checkout; empty where it can."""
    tool, *arguments = words
    if tool == "make":
        named = [
            word
            for word in arguments
            if "=" not in word and not word.startswith(("-", ".venv/")) and not word.isdigit()
        ]
        missing = [word for word in named if word not in TARGETS]
        return f"the Makefile has no target {missing[0]}" if missing else ""
    if tool == "bash":
        return "" if arguments and (ROOT / arguments[0]).is_file() else f"bash has no script {arguments[:1]}"
    if tool in ("python", ".venv/bin/python"):
        return python_problem(arguments)
    return "" if tool in SHELL else f"{tool} is no command of this repository"


def python_problem(arguments: list[str]) -> str:
    match arguments:
        case ["-m", module, *_]:
            return "" if module in MODULES else f"python -m {module} is not known"
        case ["-c", code, *_]:
            try:
                ast.parse(code)
            except SyntaxError as error:
                return f"python -c: {error}"
            return ""
        case [script, *_] if not (ROOT / script).is_file():
            return f"python: there is no {script}"
    return ""


def action_problem(uses: str, given: set[str]) -> str:
    """Why an action is not what was reviewed, or does not know what it is handed."""
    name, _, ref = uses.partition("@")
    hashed = re.fullmatch(r"[0-9a-f]{40}", ref)
    if not hashed and not (name.startswith("actions/") and re.fullmatch(r"v\d+(\.\d+){0,2}", ref)):
        return f"{uses} is not pinned: a version for those of GitHub, the 40 digits of a commit for others"
    if name not in INPUTS:
        return f"{name} is not one of {sorted(INPUTS)}"
    return f"{name} takes no {sorted(given - INPUTS[name])}" if given - INPUTS[name] else ""


def texts(node: Any) -> Iterator[str]:
    """All strings of a workflow, or of a part."""
    if isinstance(node, dict):
        for value in node.values():
            yield from texts(value)
    elif isinstance(node, list):
        for value in node:
            yield from texts(value)
    else:
        yield str(node)


def expressions(node: Any) -> list[str]:
    return [found.strip() for text in texts(node) for found in re.findall(r"\$\{\{(.*?)\}\}", text)]


def step_problems(step: dict[str, Any]) -> Iterator[str]:
    if len({"uses", "run"} & step.keys()) != 1:
        yield f"a step has `uses` or `run`: {step}"
    elif "uses" in step:
        yield action_problem(step["uses"], set(step.get("with", {})))
    else:
        yield from (command_problem(words) for words in commands(step["run"]))
    unknown = step.keys() - {"name", "uses", "with", "run", "env", "working-directory", "shell", "if"}
    yield f"a step knows no {sorted(unknown)}" if unknown else ""


def job_problems(job: dict[str, Any]) -> Iterator[str]:
    matrix = job.get("strategy", {}).get("matrix", {})
    used = expressions(job)
    for expression in used:
        context, _, key = expression.partition(".")
        if context == "matrix" and key not in matrix:
            yield f"the matrix has no {key}"
        elif context != "matrix" and expression not in CONTEXTS:
            yield f"the expression {expression} is not known"
    yield from (f"nothing uses the matrix's {key}" for key in matrix if f"matrix.{key}" not in used)
    for key, values in matrix.items():
        # YAML reads 3.10 as the number 3.1.
        yield from (f"{key}: {value!r} is no text; quote it" for value in values if not isinstance(value, str))
    runs_on = matrix.get("os", []) if job["runs-on"] == "${{ matrix.os }}" else [job["runs-on"]]
    yield from (f"{label} is not one of the runners {sorted(RUNNERS)}" for label in runs_on if label not in RUNNERS)
    if "timeout-minutes" not in job:
        yield "a job has no timeout-minutes"
    for step in job["steps"]:
        yield from step_problems(step)


def problems(text: str) -> list[str]:
    """What is wrong with a workflow."""
    workflow = yaml.safe_load(text)
    found = [] if workflow.get("permissions") == {"contents": "read"} else ["permissions are not contents: read"]
    found += [f"{text} is not known" for text in expressions(workflow.get("concurrency")) if text not in CONTEXTS]
    for name, job in workflow["jobs"].items():
        found += [f"{name}: {problem}" for problem in job_problems(job) if problem]
    return found


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_names_what_is_there(path: Path) -> None:
    assert problems(path.read_text(encoding="utf-8")) == []


def test_ci_calls_what_is_there() -> None:
    """The lines of .ci/run that name a target or a script, whichever of its helpers runs them."""
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8").replace("\\\n", " ")
    called = re.findall(r"^(?:step |start [\w-]+ )?((?:make|\.venv/bin/python) .*)$", text, re.MULTILINE)
    assert len(called) >= 6
    assert [problem for line in called for words in commands(line) if (problem := command_problem(words))] == []
    started, finished = (re.findall(rf"^(?:step )?{word} (\w+)", text, re.MULTILINE) for word in ("start", "finish"))
    assert sorted(started) == sorted(finished)


GOOD = """
permissions: {contents: read}
jobs:
  one:
    runs-on: ubuntu-24.04
    timeout-minutes: 5
    strategy: {matrix: {python: ["3.10"]}}
    steps:
      - uses: actions/checkout@v5
      - uses: actions/setup-python@v6
        with: {python-version: "${{ matrix.python }}"}
      - run: |
          A=1 make test JOBS=2 && make lint
          bash .ci/run; python -m pip install .
          python -c "import torch; print(torch.ones(1))"
"""
FAULTS = {
    "actions/checkout@v5": [
        ("actions/checkout", "not pinned"),
        ("actions/checkout@main", "not pinned"),
        ("somebody/checkout@v5", "not pinned"),
        (f"somebody/checkout@{'0' * 40}", "is not one of"),
    ],
    "make test": [("make tset", "no target tset"), ("tox", "tox is no command")],
    "make lint": [("make -j 2 lnt", "no target lnt")],
    ".ci/run": [(".ci/runs", "no script")],
    "-m pip": [("-m pipp", "pipp is not known"), ("tests/gone.py", "there is no tests/gone.py")],
    "(torch.ones(1))": [("(torch.ones(1)", "was never closed")],
    "matrix.python": [("matrix.pyhton", "the matrix has no pyhton"), ("secrets.KEY", "secrets.KEY is not known")],
    '"${{ matrix.python }}"': [('"3.10"', "nothing uses the matrix's python")],
    '["3.10"]': [("[3.10]", "3.1 is no text")],
    "ubuntu-24.04": [("ubuntu-latest", "ubuntu-latest is not one of")],
    "    timeout-minutes: 5\n": [("", "no timeout-minutes")],
    "contents: read": [("contents: write", "permissions")],
    "with:": [("wiht:", "knows no ['wiht']")],
    "python-version:": [("pyton-version:", "takes no ['pyton-version']")],
    "uses: actions/setup-python@v6\n": [("name: Python\n", "`uses` or `run`")],
}


def test_a_workflow_without_a_fault_has_none() -> None:
    assert problems(GOOD) == []


@pytest.mark.parametrize(
    ("right", "wrong", "words"), [(right, wrong, words) for right, pairs in FAULTS.items() for wrong, words in pairs]
)
def test_a_fault_is_found(right: str, wrong: str, words: str) -> None:
    assert right in GOOD
    assert words in "\n".join(problems(GOOD.replace(right, wrong)))
