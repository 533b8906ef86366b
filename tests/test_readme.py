"""The README's blocks are all runnable: what CI's runner takes from a file, and what it makes of it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import readme_blocks
from readme_blocks import PYTHON, Block, parse, run

README = Path(__file__).resolve().parent.parent / "README.md"


def test_blocks_are_found_with_their_lines_and_languages() -> None:
    text = "# T\n```python\nx = 1\n```\ntext\n```bash\necho hi\n```\n```text\nno code\n```\n~~~sh\nls\n~~~\n"
    assert parse(text) == [
        Block(2, "python", "x = 1\n"),
        Block(6, "bash", "echo hi\n"),
        Block(12, "sh", "ls\n"),
    ]


def test_a_longer_fence_keeps_shorter_ones_inside() -> None:
    assert parse("````python\n'''\n```\n'''\n````\n") == [Block(1, "python", "'''\n```\n'''\n")]


def test_directives() -> None:
    text = (
        "<!-- setup:\nx = 2\ny = 3\n-->\n```python\nassert x + y == 5\n```\n\nwords\n\n"
        "<!-- continues -->\n\n```python\nassert y == 3\n```\n"
        "<!-- not run: needs a GPU -->\n```bash\nnvidia-smi\n```\n"
        "<!-- setup: mkdir a -->\n```bash\nls a\n```\n<!-- an ordinary comment -->\nwords\n"
    )
    first, second, third, fourth = parse(text)
    assert first.code == "x = 2\ny = 3\nassert x + y == 5\n"
    assert second.code == first.code + "assert y == 3\n"
    assert third.not_run == "needs a GPU"
    assert not first.not_run
    assert fourth.code == "mkdir a\nls a\n"


PROGRAM = (
    "# T\n<!-- one program -->\n```python\nx = 1\n```\n<!-- setup:\ny = 2\n-->\n```python\nassert x + y == 3\n```\n"
    "```sh\nls\n```\n<!-- not run: needs a GPU -->\n```python\n1 / 0\n```\n"
    "<!-- setup: z = 0 -->\n```python\nx / z\n```\n"
)


def test_a_page_may_be_one_program_with_the_lines_of_the_page(tmp_path: Path) -> None:
    program, shell, left_out = parse(PROGRAM)
    assert (program.line, shell, left_out.not_run) == (3, Block(12, "sh", "ls\n"), "needs a GPU")
    lines = {number: line for number, line in enumerate(program.code.splitlines(), start=1) if line}
    assert lines == {4: "x = 1", 7: "y = 2", 10: "assert x + y == 3", 19: "z = 0", 21: "x / z"}
    problem = run(program, tmp_path)
    assert "line 21" in problem
    assert "ZeroDivisionError" in problem
    with pytest.raises(ValueError, match="one program has 'setup' alone"):
        parse("<!-- one program -->\n```python\nx\n```\n<!-- continues -->\n```python\nx\n```\n")


def test_several_pages_are_counted_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in (("a.md", "touch here"), ("b.md", "test ! -e here")):  # each in a folder of its own
        (tmp_path / name).write_text(f"```sh\n{command}\n```\n")
    assert readme_blocks.main([str(tmp_path / "a.md"), str(tmp_path / "b.md")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 passed, 0 failed, 0 skipped"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```\nx\n```\n", "line 1: a code block without a language"),
        ("a\n```rust\nx\n```\n", "line 2: the language 'rust'"),
        ("```python\nx\n", "line 1: the code block has no end"),
        ("<!-- not run: GPU -->\nwords\n```sh\nls\n```\n", "line 2: .* above no code block"),
        ("```sh\nls\n```\n<!-- setup: cd -->\n", "above no code block"),
        ("<!-- not run: -->\n```sh\nls\n```\n", "line 2: .* needs a reason"),
        ("<!-- continues -->\n```python\nx\n```\n", "line 2: .* needs a Python block"),
        ("<!-- open\n```sh\nls\n```\n", "has no end '-->'"),
    ],
)
def test_what_would_go_unchecked_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_shell_blocks_stop_at_the_first_failure(tmp_path: Path) -> None:
    assert run(Block(1, "bash", "echo a > made.txt\n"), tmp_path) == ""
    assert (tmp_path / "made.txt").read_text() == "a\n"
    problem = run(Block(1, "bash", "echo before; false\necho after\n"), tmp_path)
    assert problem.startswith("exit code 1")
    assert "before" in problem
    assert "after" not in problem
    assert run(Block(1, "bash", "false | true\n"), tmp_path).startswith("exit code 1")


def test_console_blocks_run_their_prompts_only(tmp_path: Path) -> None:
    code = "$ echo one \\\n>   two > out.txt\nthis is output\n"
    assert run(Block(1, "console", code), tmp_path) == ""
    assert (tmp_path / "out.txt").read_text() == "one two\n"


def test_a_command_that_was_run_already_is_left_out_and_no_other(tmp_path: Path) -> None:
    block = Block(1, "bash", "exit 3  # said so\necho a > made.txt\n")
    assert run(block, tmp_path).startswith("exit code 3")
    assert run(block, tmp_path, done=["exit 3"]) == ""
    assert (tmp_path / "made.txt").exists()
    assert run(block, tmp_path, done=["exit"]).startswith("exit code 3")


def test_python_blocks_fail_with_their_traceback_and_in_time(tmp_path: Path) -> None:
    assert run(Block(1, "python", "import os; assert os.path.samefile('.', os.getcwd())\n"), tmp_path) == ""
    assert "ZeroDivisionError" in run(Block(1, "python", "1 / 0\n"), tmp_path)
    assert run(Block(1, "python", "while True: pass\n"), tmp_path, timeout=1) == "still running after 1 s"


def test_the_runner_counts_and_sets_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "page.md"
    file.write_text("```sh\ntrue\n```\n```sh\nfalse\n```\n<!-- not run: no GPU -->\n```sh\nfalse\n```\n")
    assert readme_blocks.main([str(file)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 passed, 1 failed, 1 skipped"
    file.write_text("```sh\nls Makefile examples > /dev/null\n```\n")
    assert readme_blocks.main([str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 passed, 0 failed, 0 skipped"
    file.write_text("no blocks\n")
    assert readme_blocks.main([str(file)]) == 1


def test_the_readme_has_blocks_and_its_python_parses() -> None:
    blocks = parse(README.read_text(encoding="utf-8"))
    assert any(not block.not_run for block in blocks)
    for block in blocks:
        if block.language in PYTHON:
            ast.parse(block.code, filename=f"README.md:{block.line}")
