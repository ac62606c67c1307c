"""The pages of docs/howto: every transcript comes out as it is written."""

import re
import shutil
from pathlib import Path

import pytest
from sessions.session import fuse, shell

__all__ = ["fuse", "shell"]

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [page for page in sorted((DOCS / "howto").glob("*.md")) if BLOCK.search(page.read_text())]
NEEDED = {name: ["qemu-system-x86_64"] for name in ("qemu.md", "x86-guests.md")}
# Between what one command printed and the next; no control file or program here prints it.
MARK = "\036"


def steps(page):
    """The commands of a page, and what each prints; `> ` goes on with a command."""
    found = []
    for line in "".join(BLOCK.findall(page.read_text())).splitlines():
        if line.startswith("$ "):
            found.append((line.removeprefix("$ "), []))
        elif line.startswith("> "):
            found[-1] = (f"{found[-1][0]}\n{line.removeprefix('> ')}", [])
        else:
            found[-1][1].append(line)
    return found


def pattern(lines):
    """`...` stands for whatever is left of a line, or of a part of it."""
    return "".join(re.escape(line).replace(r"\.\.\.", ".*") + "\n" for line in lines)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_transcripts_of_a_page_come_out_as_written(shell, fuse, page):
    missing = [name for name in ("gcc", *NEEDED.get(page.name, [])) if not shutil.which(name)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    shutil.copytree(DOCS / "examples", shell.home, dirs_exist_ok=True)
    commands, expected = zip(*steps(page), strict=True)
    script = f"\nprintf '{MARK}'\n".join(commands)
    done = shell.run("bash", "-c", f"exec 2>&1\n{script}\n")
    if "kvmsim run" in script and "\nkvmsim: " in f"\n{done.stdout}" and unavailable(shell):
        pytest.skip("no client can be run here")
    printed = done.stdout.split(MARK)
    assert len(printed) == len(commands), done.stdout
    assert [
        (command, text)
        for command, text, lines in zip(commands, printed, expected, strict=True)
        if not re.fullmatch(pattern(lines), text)
    ] == []


def unavailable(shell):
    """Whether calls cannot be trapped on this machine at all."""
    return shell.kvmsim("run", "--passthrough", "true").returncode == 69
