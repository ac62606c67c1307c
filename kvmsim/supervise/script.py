"""Script files: what the guests of a client do, and which of its calls fail.

Example::

    # every vCPU without a section of its own
    bus-lock after=100us
    io       port=0x3f8 data=68690a
    loop     3

    [vcpu 0]                         only this one
    mmio     gpa=0xfebc0000 bus-lock
    shutdown

    [vcpu 2-5]                       each of these plays it by itself
    eintr    after=1ms

    fail KVM_CREATE_VM 3 ENOMEM      anywhere in the file
    no-asids 2+

The lines of a guest are those of :mod:`kvmsim.engine.scripted`, those that begin with ``fail`` or
``no-asids`` belong to :mod:`kvmsim.supervise.faults`. The same script runs for every VM.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmsim.engine import scripted
from kvmsim.errors import ConfigError
from kvmsim.supervise import faults

if TYPE_CHECKING:
    from kvmsim.engine.scripted import Scripted
    from kvmsim.kvm.vcpu import Vcpu
    from kvmsim.supervise.faults import Fault

_SECTION = re.compile(r"\[vcpu ([0-9]{1,4})(?:-([0-9]{1,4}))?\]")


@dataclass(frozen=True, slots=True)
class Section:
    """What some vCPUs do.

    Attributes:
        ids: of the vCPUs; None for all that no other section names.
        text: the whole file with all other lines empty, so that numbers of lines stay right.
        name: of the file.
    """

    ids: range | None
    text: str
    name: str

    def engine(self) -> Scripted:
        """A guest that is at the beginning."""
        return scripted.parse(self.text, self.name)


@dataclass(frozen=True, slots=True)
class Script:
    """A script file.

    Attributes:
        sections: what guests do.
        faults: calls that fail.
    """

    sections: tuple[Section, ...]
    faults: tuple[Fault, ...]

    def engine(self, vcpu: Vcpu) -> Scripted:
        """The guest of a new vCPU."""
        for section in self.sections:
            if section.ids is not None and vcpu.id in section.ids:
                return section.engine()
        return self.sections[0].engine()


def parse(text: str, name: str) -> Script:
    """Read a script file.

    Args:
        text: of the file.
        name: of the file, for messages.

    Raises:
        ConfigError: a line that means nothing; one line, with file and line number.
    """
    lines = text.splitlines()
    heads: list[tuple[int, range | None]] = [(0, None)]
    found: list[Fault] = []
    guests = [""] * len(lines)
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        try:
            if not words:
                continue
            if words[0].startswith("["):
                heads.append((number, _section(" ".join(words), [ids for _, ids in heads])))
            elif words[0] in faults.WORDS:
                found.append(faults.parse(words))
            else:
                guests[number - 1] = line
        except ConfigError as mistake:
            msg = f"{name}:{number}: {mistake}"
            raise ConfigError(msg) from None
    ends = [start - 1 for start, _ in heads[1:]] + [len(lines)]
    sections = tuple(
        Section(ids, "\n".join([""] * start + guests[start:end]), name)
        for (start, ids), end in zip(heads, ends, strict=True)
    )
    for section in sections:
        section.engine()  # mistakes are told now, not when a vCPU is made
    return Script(sections, tuple(found))


def _section(text: str, taken: list[range | None]) -> range:
    """The vCPUs a section is for."""
    found = _SECTION.fullmatch(text)
    if found is None:
        raise ConfigError(f'"{text}" is not a section (such as [vcpu 0] or [vcpu 1-3])')
    first, last = int(found[1]), int(found[2] or found[1])
    if last < first:
        raise ConfigError(f'"{text}" names no vCPU')
    ids = range(first, last + 1)
    for other in taken:
        if other is not None and set(ids) & set(other):
            raise ConfigError(f"vCPU {max(ids[0], other[0])} has a section already")
    return ids
