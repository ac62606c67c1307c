"""Last-branch hardware of the machine, and who of the host has it (kvm.md E.1, E.4).

Which processor has what follows from its model number, as in Linux 6.12
``arch/x86/events/intel/core.c`` and ``lbr.c``.

The facility belongs to one user per CPU. A guest gets it through a host perf event bound to the
vCPU's thread; a user bound to the CPU (``perf record -b -a``) goes before and takes it away from
all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmsim.host.kernel_log import KernelLog
    from kvmsim.host.presets import Preset

INTEL_FAMILY = 6
#: ``IA32_PERF_CAPABILITIES[5:0]`` of processors with architectural records.


@dataclass(frozen=True, slots=True)
class LbrHardware:
    """The records of one processor.

    Attributes:
        depth: how many.
        from_base: number of the first FROM register.
        to_base: number of the first TO register.
        info_base: number of the first INFO register; 0: there are none.
        call_stack: LBR_SELECT has call-stack mode.
        format: ``IA32_PERF_CAPABILITIES[5:0]``.
    """

    depth: int
    from_base: int = 0x680
    to_base: int = 0x6C0
    info_base: int = 0
    call_stack: bool = False
    format: int = 3


_CORE = LbrHardware(4, 0x40, 0x60, format=1)
_ATOM = LbrHardware(8, 0x40, 0x60, format=2)
_NEHALEM = LbrHardware(16, format=3)
_HASWELL = LbrHardware(16, call_stack=True, format=4)
_KNIGHTS = LbrHardware(8, format=3)
_SKYLAKE = LbrHardware(32, info_base=0xDC0, call_stack=True, format=5)

#: Family 6: model -> records. Alder Lake, Sapphire Rapids and later have architectural ones.
_MODELS: dict[int, LbrHardware] = {
    **dict.fromkeys((15, 22, 23, 29), _CORE),
    **dict.fromkeys((28, 38, 39, 53, 54), _ATOM),  # Bonnell, Saltwell
    **dict.fromkeys((55, 74, 76, 77, 90), _ATOM),  # Silvermont, Airmont
    **dict.fromkeys((26, 30, 31, 46, 37, 44, 47), _NEHALEM),  # Nehalem, Westmere
    **dict.fromkeys((42, 45, 58, 62), _NEHALEM),  # Sandy and Ivy Bridge
    **dict.fromkeys((60, 63, 69, 70, 61, 71, 79, 86), _HASWELL),  # Haswell, Broadwell
    **dict.fromkeys((87, 133), _KNIGHTS),
    **dict.fromkeys((92, 95, 122, 134, 150, 156), _SKYLAKE),  # Goldmont to Tremont
    **dict.fromkeys((78, 94, 85, 142, 158, 165, 166), _SKYLAKE),  # Skylake, Kaby and Comet Lake
    **dict.fromkeys((106, 108, 125, 126, 140, 141, 167), _SKYLAKE),  # Ice, Tiger, Rocket Lake
}


def hardware_of(preset: Preset) -> LbrHardware | None:
    """The legacy records of a machine; None: it has none, or architectural ones."""
    if preset.vendor != "intel" or preset.family != INTEL_FAMILY:
        return None
    found = _MODELS.get(preset.model)
    pmu = preset.pmu
    if found is not None and pmu is not None and pmu.lbr_format is not None:
        return replace(found, format=pmu.lbr_format)
    return found


class LbrFacility:
    """Whether a user bound to the CPUs has the last-branch facility of the host.

    Args:
        log: where the kernel prints of guests that lost it.

    Attributes:
        taken: such a user is there.
        takeovers: how often one has come; an event made before has lost the facility for good.
        log: as given.
    """

    __slots__ = ("log", "taken", "takeovers")

    def __init__(self, log: KernelLog) -> None:
        self.taken = False
        self.takeovers = 0
        self.log = log

    def take(self) -> None:
        """Such a user comes; nothing, if it is there already."""
        if not self.taken:
            self.taken = True
            self.takeovers += 1

    def release(self) -> None:
        """It goes."""
        self.taken = False
