"""Presets: which machine to emulate, as a TOML file.

A preset in the package and a file of one's own are read alike: :func:`load` takes a name or a path.
:func:`parse` is the part that reads no file. Every mistake is one :class:`ConfigError` line that
names the file and the key.

    >>> parse('vendor = "intel"', "mine.toml").vendor
    'intel'
"""

from __future__ import annotations

import re
import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from kvmsim.errors import ConfigError
from kvmsim.host.quirks import Quirks

Count = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]

RESOURCE_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
UNKNOWN_KEY = re.compile(r"object contains unknown field `(.*)`", re.DOTALL)
MISSING_KEY = re.compile(r"object missing required field `(.*)`", re.DOTALL)


class BusLockTable(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, rename="kebab"
):
    """``[bus-lock]``: what the processor does about bus locks.

    Attributes:
        exit: how KVM can have a bus lock reported: not at all, after it (Intel's bus lock VM exit)
            or before it (AMD's bus lock threshold).
        detect: bus lock #DB, CPUID.(7,0):ECX[24].
        split_lock_detect: split lock #AC.
        stall_cycles: for how many cycles one bus lock stalls every other CPU; some 7000 by Linux
            Documentation/arch/x86/buslock.rst.
    """

    exit: Literal["none", "trap", "fault"] = "none"
    detect: bool = False
    split_lock_detect: bool = False
    stall_cycles: Annotated[int, msgspec.Meta(ge=0, le=10**9)] = 7000


class PmuTable(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, rename="kebab"
):
    """``[pmu]``: performance monitoring KVM can give to guests (Intel).

    Attributes:
        version: CPUID.0AH:EAX[7:0] of the processor; KVM shows no more than 2.
        counters: general-purpose counters.
        fixed_counters: fixed-function counters.
        lbr_format: ``IA32_PERF_CAPABILITIES[5:0]``; without it, what the model has.
    """

    version: Annotated[int, msgspec.Meta(ge=1, le=5)] = 5
    counters: Annotated[int, msgspec.Meta(ge=1, le=8)] = 8
    fixed_counters: Annotated[int, msgspec.Meta(ge=0, le=3)] = 3
    lbr_format: Annotated[int, msgspec.Meta(ge=0, le=62)] | None = None


class KernelTable(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, rename="kebab"
):
    """``[kernel]``: how the machine's kernel was started.

    Attributes:
        split_lock_detect: the option of that name as written; ``None``: not given.
        split_lock_mitigate: sysctl ``kernel.split_lock_mitigate``.
        hz: ticks per second.
    """

    split_lock_detect: str | None = None
    split_lock_mitigate: bool = True
    hz: Literal[100, 250, 300, 1000] = 250


class SevTable(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, rename="kebab"
):
    """``[sev]``: AMD memory encryption, CPUID Fn8000_001F.

    Attributes:
        max_asid: ECX, number of encrypted guests.
        min_sev_asid: EDX, lowest ASID of a guest without SEV-ES (a BIOS choice).
        es: EAX[3].
        snp: EAX[4], and the platform set up for it.
        debug_swap: EAX[14].
        c_bit: EBX[5:0], the page-table bit that encrypts.
        reduced_phys_bits: EBX[11:6].
        decode_assists: Fn8000_000A EDX[7]; SEV needs it.
        flush_by_asid: Fn8000_000A EDX[6]; SEV needs it.
        nested_paging: Fn8000_000A EDX[0]; SEV needs it.
        next_rip: Fn8000_000A EDX[3]; SEV needs it.
        lbr_virtualization: Fn8000_000A EDX[1]; SEV-ES needs it.
    """

    max_asid: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    min_sev_asid: Annotated[int, msgspec.Meta(ge=0, le=65536)]
    es: bool = True
    snp: bool = False
    debug_swap: bool = False
    c_bit: Annotated[int, msgspec.Meta(ge=32, le=63)] = 51
    reduced_phys_bits: Annotated[int, msgspec.Meta(ge=0, le=63)] = 5
    decode_assists: bool = True
    flush_by_asid: bool = True
    nested_paging: bool = True
    next_rip: bool = True
    lbr_virtualization: bool = True


class TdxTable(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, rename="kebab"
):
    """``[tdx]``: Intel trust domains.

    Attributes:
        keys: private key ids left for guests.
    """

    keys: Annotated[int, msgspec.Meta(ge=1, le=65535)]


class KvmAmdTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[kvm-amd]``: module parameters as given when the module is loaded.

    Attributes:
        sev: allow SEV.
        sev_es: allow SEV-ES.
        sev_snp: allow SEV-SNP.
    """

    sev: bool = True
    sev_es: bool = True
    sev_snp: bool = True


class FaultsTable(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, rename="kebab"
):
    """``[faults]``: things that go wrong on this machine.

    Attributes:
        psp_init: the secure processor does not initialise.
        df_flush: flushing the data fabric fails, so no ASID is ever recycled.
    """

    psp_init: bool = False
    df_flush: bool = False


class Preset(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, rename="kebab"):
    """One machine.

    Attributes:
        vendor: whose processor.
        description: one line for people.
        model_name: as in ``/proc/cpuinfo``.
        family: CPU family, as ``/proc/cpuinfo`` prints it.
        model: CPU model.
        stepping: CPU stepping.
        cpus: logical CPUs online.
        tsc_khz: frequency of the time-stamp counter.
        bus_lock: bus lock hardware.
        rtm: restricted transactional memory, CPUID.(7,0):EBX[11].
        pmu: performance monitoring; ``None``: KVM has it off (``enable_pmu=N``).
        sev: memory encryption; ``None``: the processor has none.
        tdx: trust domains; ``None``: none.
        kernel: options of its kernel.
        kvm_amd: module parameters.
        misc: further resources of the misc controller, name = capacity.
        faults: what is broken.
        quirks: kernel oddities.
    """

    vendor: Literal["amd", "intel"]
    description: str = ""
    model_name: str = "emulated processor"
    family: Count = 6
    model: Count = 0
    stepping: Count = 0
    cpus: Annotated[int, msgspec.Meta(ge=1, le=8192)] = 8
    tsc_khz: Annotated[int, msgspec.Meta(ge=1, le=2**32 - 1)] = 2_000_000
    bus_lock: BusLockTable = msgspec.field(default_factory=BusLockTable)
    rtm: bool = False
    pmu: PmuTable | None = None
    sev: SevTable | None = None
    tdx: TdxTable | None = None
    kernel: KernelTable = msgspec.field(default_factory=KernelTable)
    kvm_amd: KvmAmdTable = msgspec.field(default_factory=KvmAmdTable)
    misc: dict[str, int] = msgspec.field(default_factory=dict)
    faults: FaultsTable = msgspec.field(default_factory=FaultsTable)
    quirks: Quirks = msgspec.field(default_factory=Quirks)


def parse(text: str, name: str) -> Preset:
    """Read a preset from the text of its file.

    Args:
        text: TOML.
        name: the file, for messages.

    Raises:
        ConfigError: broken TOML, an unknown key, a value of the wrong type or out of range, or
            parts that do not go together.
    """
    try:
        preset = msgspec.convert(tomllib.loads(text), Preset)
    except tomllib.TOMLDecodeError as error:
        msg = f"{name}: {_one_line(error)}"
        raise ConfigError(msg) from None
    except msgspec.ValidationError as error:
        msg = f"{name}: {_name_key(str(error))}"
        raise ConfigError(msg) from None
    if problem := _conflict(preset):
        msg = f"{name}: {problem}"
        raise ConfigError(msg)
    return preset


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _name_key(message: str) -> str:
    """Turn msgspec's "Expected ... - at `$.sev.max-asid`" into "sev.max-asid: expected ..."."""
    what, _, where = message.partition(" - at ")
    what = what[:1].lower() + what[1:]
    key = where.strip("`").removeprefix("$").removeprefix(".").removesuffix("[...]")
    for pattern, verdict in ((UNKNOWN_KEY, "unknown key"), (MISSING_KEY, "missing")):
        if found := pattern.fullmatch(what):
            what = verdict
            key = ".".join(filter(None, (key, found[1])))
    return f"{key}: {what}" if key else what


def _conflict(preset: Preset) -> str | None:
    """Say why a preset whose values are fine one by one cannot be a machine."""
    if preset.vendor == "intel" and preset.sev is not None:
        return "sev: an Intel machine has no SEV"
    if preset.vendor == "amd" and preset.tdx is not None:
        return "tdx: an AMD machine has no TDX"
    if preset.vendor == "amd" and (preset.pmu is not None or preset.rtm):
        return "pmu, rtm: only of Intel machines here"
    exits = {"none", "trap" if preset.vendor == "intel" else "fault"}
    if preset.bus_lock.exit not in exits:
        return f'bus-lock.exit: "{preset.bus_lock.exit}" is not how {preset.vendor} reports one'
    problem = _sev_conflict(preset.sev) if preset.sev is not None else None
    return problem or _misc_conflict(preset.misc)


def _misc_conflict(misc: dict[str, int]) -> str | None:
    for name, capacity in misc.items():
        if name in {"sev", "sev_es", "tdx"}:
            return f"misc.{name}: comes from the hardware, not from this table"
        if not RESOURCE_NAME.fullmatch(name):
            return f"misc.{name!r}: not a resource name (a-z, 0-9 and _)"
        if not 1 <= capacity < 2**63:
            return f"misc.{name}: {capacity} is not a capacity (1 or more)"
    return None


def _sev_conflict(sev: SevTable) -> str | None:
    if sev.min_sev_asid == 0 and sev.max_asid > 0:
        # A real kernel computes a capacity of 2**32 - 1 from this and hands out ASID 0.
        return "sev.min-sev-asid: 0 is broken firmware: ASID 0 belongs to the host"
    if sev.min_sev_asid > sev.max_asid + 1:
        return f"sev.min-sev-asid: {sev.min_sev_asid} is above max-asid + 1 = {sev.max_asid + 1}"
    if sev.snp and not sev.es:
        return "sev.snp: needs es"
    return None


# A device such as /dev/zero has no end.
_LARGEST_FILE = 1 << 20


def _package_files() -> dict[str, str]:
    directory = resources.files("kvmsim").joinpath("presets")
    return {
        entry.name.removesuffix(".toml"): entry.read_text("utf-8")
        for entry in directory.iterdir()
        if entry.name.endswith(".toml")
    }


def names() -> list[str]:
    """List the presets that come with the package, in alphabetical order."""
    return sorted(_package_files())


def load(name_or_path: str) -> Preset:
    """Read a preset by its name, or any TOML file by its path.

    What contains a slash or ends in ``.toml`` is a path.

    Raises:
        ConfigError: no such preset or file, or what :func:`parse` says.
    """
    if "/" not in name_or_path and not name_or_path.endswith(".toml"):
        packaged = _package_files()
        if name_or_path not in packaged:
            known = ", ".join(sorted(packaged))
            msg = f"{name_or_path}: no such preset (there are: {known})"
            raise ConfigError(msg)
        return parse(packaged[name_or_path], f"{name_or_path}.toml")
    try:
        with Path(name_or_path).open(encoding="utf-8") as file:
            text = file.read(_LARGEST_FILE + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        msg = f"{name_or_path}: {reason}"
        raise ConfigError(msg) from None
    if len(text) > _LARGEST_FILE:
        msg = f"{name_or_path}: longer than a preset can be"
        raise ConfigError(msg)
    return parse(text, name_or_path)
