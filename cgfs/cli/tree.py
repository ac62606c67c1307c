"""``cgfs tree DIR``: a cgroup tree at a glance.

It reads the mounted files, so it shows a kernel's own tree just as well.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from cgfs.cli.frame import print_json
from cgfs.cli.groups import tree_root
from cgfs.control.errors import from_oserror

if TYPE_CHECKING:
    from rich.tree import Tree

# Files whose values are worth a look: what is used and what may be used.
SHOWN = re.compile(r"(?!cgroup\.)[^.]+(\..+)?\.(max|current|capacity|stat)")
LEFT_OUT = re.compile(r"(cpu|io|memory)\.stat(\.local)?|.*\.numa_stat")


class Group(msgspec.Struct, frozen=True):
    """One cgroup: its members and the values of its controllers' files.

    A value is a string, or one string per key for a file of several lines.
    """

    path: str
    procs: list[int]
    type: str
    frozen: bool
    files: dict[str, str | dict[str, str]]
    children: list["Group"]


@click.command("tree")
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def tree_command(directory: Path, as_json: bool) -> None:
    """Show the cgroups below DIR with their members, limits and use."""
    root = tree_root(directory)
    try:
        group = read_group(root, "/")
    except OSError as error:
        raise from_oserror(error, str(error.filename)) from error
    if as_json:
        print_json(group)
        return
    from rich.console import Console  # noqa: PLC0415 - --json does without

    Console(highlight=False, soft_wrap=True).print(drawn(group))


def read_group(directory: Path, path: str) -> Group:
    """Reads a cgroup and everything below it.

    Args:
        directory: where it is mounted.
        path: its path from the root of the tree.
    """
    names = sorted(entry.name for entry in directory.iterdir())
    files = {
        name: parse_value((directory / name).read_text())
        for name in names
        if SHOWN.fullmatch(name) and not LEFT_OUT.fullmatch(name)
    }
    children = [name for name in names if (directory / name).is_dir()]
    return Group(
        path=path,
        procs=[int(pid) for pid in _text(directory / "cgroup.procs").split()],
        type=_text(directory / "cgroup.type").strip() or "domain",
        frozen="frozen 1" in _text(directory / "cgroup.events").splitlines(),
        files=files,
        children=[read_group(directory / c, f"{path.rstrip('/')}/{c}") for c in children],
    )


def parse_value(text: str) -> str | dict[str, str]:
    """A control file's text: ``key value`` lines as a mapping, anything else as it is."""
    pairs = [line.split(" ", 1) for line in text.splitlines()]
    if pairs and all(len(pair) == 2 and pair[0][:1].isalpha() for pair in pairs) and _keyed(pairs):
        return {key: value for key, value in pairs}  # noqa: C416 - dict() does not type a list of lists
    return text.strip()


def _keyed(pairs: list[list[str]]) -> bool:
    # "max 1000000" is a rate without a limit, not a key.
    return pairs[0][0] != "max"


def _text(file: Path) -> str:
    """A file's text; empty where this kind of tree or cgroup has no such file, or may not tell."""
    try:
        return file.read_text()
    except OSError:
        return ""


def drawn(group: Group, name: str = "/") -> "Tree":
    """The cgroup and its children as a tree to print."""
    from rich.markup import escape  # noqa: PLC0415 - --json does without
    from rich.tree import Tree  # noqa: PLC0415 - --json does without

    label = f"[bold]{escape(name)}[/bold]{escape(summary(group))}"
    tree = Tree(label, guide_style="dim")
    for child in group.children:
        tree.children.append(drawn(child, child.path.rpartition("/")[2]))
    return tree


def summary(group: Group) -> str:
    """Members, state and use of one cgroup in one line."""
    count = len(group.procs)
    parts = [f"{count} process{'' if count == 1 else 'es'}"] if count else []
    parts += ["frozen"] if group.frozen else []
    parts += [group.type] if group.type != "domain" else []
    for file, value in group.files.items():
        if file.endswith(".current"):
            parts += _uses(file.removesuffix(".current"), value, group)
    rate = group.files.get("bus_lock.max")
    if isinstance(rate, str) and not rate.startswith("max"):
        quota, _, period_usec = rate.partition(" ")
        parts.append(f"bus_lock at most {quota} per {int(period_usec) / 1e6:g} s")
    return "".join(f"  {part}" for part in parts)


def _uses(name: str, value: str | dict[str, str], group: Group) -> list[str]:
    """``misc.sev 1/2``: what is used of which limit, unused and unlimited ones left out."""
    limits = group.files.get(f"{name}.max") or group.files.get(f"{name}.capacity") or {}
    if isinstance(value, str):
        limit = limits if isinstance(limits, str) else ""
        return _use(name, value, limit)
    known = limits if isinstance(limits, dict) else {}
    return [
        part
        for key, used in value.items()
        for part in _use(f"{name}.{key}", used, known.get(key, ""))
    ]


def _use(name: str, used: str, limit: str) -> list[str]:
    limit = "" if limit == "max" else limit
    if used == "0" and not limit:
        return []
    return [f"{name} {used}/{limit}" if limit else f"{name} {used}"]
