"""The documentation is run: every Python block of README.md and docs/ executes, every command of a shell block exists.

Blocks of one file form one script, as a reader would paste them, and run in an empty folder. A block is left out only by
``<!-- not run: reason -->`` on the line before it.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [path for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if path.exists()]
SHELLS = {"sh", "bash", "shell", "console"}
_EXCLUDED = re.compile(r"<!--\s*not run:\s*\S.*-->")


class Block(NamedTuple):
    language: str
    line: int  # of its first line of code, from 1
    code: str
    excluded: bool


def blocks(text):
    """The fenced blocks of a page. Raises ValueError for a fence that is never closed."""
    lines, before, i = text.splitlines(), "", 0
    while i < len(lines):
        fence = re.match(r"(\s*)(`{3,}|~{3,})\s*(\w*)", lines[i])
        if not fence:
            before, i = lines[i].strip() or before, i + 1
            continue
        indent, mark, language = fence.groups()
        end = next((j for j in range(i + 1, len(lines)) if re.fullmatch(rf"\s*{mark[0]}{{{len(mark)},}}\s*", lines[j])), None)
        if end is None:
            raise ValueError(f"the block that begins on line {i + 1} is not closed")
        yield Block(language, i + 2, "\n".join(line.removeprefix(indent) for line in lines[i + 1 : end]), bool(_EXCLUDED.fullmatch(before)))
        before, i = "", end + 1


def script(text):
    """All Python blocks that run as one script, each on the lines it has in the page, so that a traceback names the page's line."""
    lines = []
    for block in blocks(text):
        if block.language == "python" and not block.excluded:
            lines += [""] * (block.line - 1 - len(lines)) + block.code.splitlines()
    return "\n".join(lines)


def commands(text):
    """The arguments of every ``headwater ...`` of the shell blocks, with the line it stands on."""
    for block in blocks(text):
        if block.language in SHELLS and not block.excluded:
            joined = re.sub(r"\\\n", lambda _: "  ", block.code)
            for offset, line in enumerate(joined.splitlines()):
                for part in re.split(r"&&|\|\||[;|]", line):
                    words = shlex.split(part.strip().removeprefix("$ "), comments=True)
                    while words and re.fullmatch(r"\w+=.*", words[0]):
                        words = words[1:]
                    if words[:1] == ["headwater"] or words[:3] in (["python", "-m", "headwater"], ["python3", "-m", "headwater"]):
                        yield block.line + offset, words[1 if words[0] == "headwater" else 3 :]


def check(command, words):
    """Walk ``words`` down to a command and parse them as its ``--help`` describes them. Nothing is run and no file is looked for."""
    words = [word for word in words if not word.startswith((">", "2>"))]
    while hasattr(command, "commands"):
        flags = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
        if not words or words[0] in flags:
            return
        assert words[0] in command.commands, f"headwater has no command {words[0]!r}, only {sorted(command.commands)}"
        command, words = command.commands[words[0]], words[1:]
    if "--help" in words:
        return
    context = command.context_class(command, info_name=command.name)
    given, left, _ = command.make_parser(context).parse_args(list(words))
    missing = [p.name for p in command.params if p.required and given.get(p.name) in (None, ()) and p.default is None]
    assert not left, f"headwater {command.name} takes no {left}"
    assert not missing, f"headwater {command.name} needs {missing}"


pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pages
def test_the_python_of_a_page_runs(page, tmp_path):
    code = script(page.read_text())
    if not code:
        return
    file = tmp_path / page.with_suffix(".py").name
    file.write_text(code + "\n")
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run([sys.executable, str(file)], cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, f"{page.relative_to(ROOT)} (lines are those of the page)\n{done.stderr[-4000:]}"


@pages
def test_the_commands_of_a_page_exist(page):
    found = list(commands(page.read_text()))
    if not found:
        return
    import typer

    from headwater import cli

    root = typer.main.get_command(cli.app)
    for line, words in found:
        try:
            check(root, words)
        except (AssertionError, typer.TyperException) as error:
            pytest.fail(f"{page.relative_to(ROOT)}:{line}: headwater {' '.join(words)}\n{getattr(error, 'message', error)}")


# ---- the checks themselves, watched failing

PAGE = """
```python
x = 1
```
Words.
<!-- not run: needs a network -->
```python
raise SystemExit(1)
```
```python
assert x == 1
x = undefined
```
```sh
$ FAST=1 headwater demo --out here \\
    --seed 3
pip install headwater && headwater doctor  # a comment
make test
```
"""


def test_blocks_share_a_script_on_the_lines_of_the_page():
    code = script(PAGE)
    assert "SystemExit" not in code
    assert code.splitlines()[2] == "x = 1"
    with pytest.raises(NameError) as caught:
        exec(compile(code, "page", "exec"), {})
    assert caught.traceback[-1].lineno + 1 == PAGE.splitlines().index("x = undefined") + 1


def test_a_reason_is_needed_to_leave_a_block_out():
    assert [b.excluded for b in blocks("<!-- not run: slow -->\n```python\n```\n<!-- not run: -->\n```python\n```\n```python\n```")] == [True, False, False]
    with pytest.raises(ValueError, match="line 2"):
        list(blocks("\n```python\nx = 1\n"))


def test_commands_are_found_among_other_words():
    assert [words for _, words in commands(PAGE)] == [["demo", "--out", "here", "--seed", "3"], ["doctor"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trace run --queries 3", None),
        ("trace run --queries 3 > scores.txt", None),
        ("trace --help", None),
        ("--help", None),
        ("", None),
        ("tracce run", "no command 'tracce'"),
        ("trace run --querys 3", "No such option"),
        ("trace run other", "takes no"),
        ("trace --queries 3", "needs"),
        ("trace run --queries", "requires an argument"),
    ],
)
def test_a_command_is_held_against_its_help(words, message):
    import typer

    app = typer.Typer()

    @app.command()
    def trace(run: str, queries: int = 1) -> None: ...

    @app.command()
    def demo() -> None: ...

    root = typer.main.get_command(app)
    words = shlex.split(words.split(" > ")[0])
    if message is None:
        check(root, words)
    else:
        with pytest.raises((AssertionError, typer.TyperException)) as caught:
            check(root, words)
        assert message in str(getattr(caught.value, "message", caught.value))
