"""The tables against the C headers of this machine, through the C compiler."""

import shutil
import subprocess
from pathlib import Path

import pytest

from kvmsim.abi import caps, exits, ioctls, irq, memory, regs, run, sev, stats, structs
from kvmsim.abi.layout import Layout

HEADER = Path("/usr/include/linux/kvm.h")
COMPILER = shutil.which("cc")

NUMBERS = (
    {name: value for fd in (ioctls.SYSTEM, ioctls.VM, ioctls.VCPU) for name, value in fd.items()}
    | {name: value for name, value in vars(caps).items() if name.startswith("KVM_CAP_")}
    | {name: value for name, value in vars(caps).items() if name.startswith("KVM_MP_STATE_")}
    | {name: value for name, value in vars(caps).items() if name.startswith("KVM_BUS_LOCK_")}
    | {f"KVM_EXIT_{reason.name}": reason.value for reason in exits.Exit}
    | {name: value for name, value in vars(exits).items() if name.startswith("KVM_")}
    | {name: getattr(sev, name) for name in ("KVM_SEV_INIT", "KVM_SEV_ES_INIT", "KVM_SEV_INIT2")}
    | {
        name: value
        for module in (structs, regs, memory, irq, stats)
        for name, value in vars(module).items()
        if name.startswith("KVM_") and isinstance(value, int)
    }
    | {"KVMIO": ioctls.KVMIO, "KVM_API_VERSION": caps.KVM_API_VERSION}
)
#: Not constants of the header: our own shorthand, or internal to the kernel.
INTERNAL = {
    "KVM_BUS_LOCK_DETECTION_VALID_MODE",
    "KVM_COALESCED_MMIO_MAX",  # the header's needs PAGE_SIZE, which it does not define
    "KVM_IOEVENTFD_VALID_FLAG_MASK",  # the header counts a flag of another architecture in
    "KVM_MAX_CPUID_ENTRIES",
    "KVM_PMU_EVENT_FILTER_MAX_EVENTS",
}

MODULES = (structs, regs, memory, irq, stats, run, sev)
LAYOUTS = [value for module in MODULES for value in vars(module).values() if type(value) is Layout]
#: C member where it is not reached by the layout's own member name.
MEMBERS = {
    "kvm_run.debug.exception": "kvm_run.debug.arch.exception",
    "kvm_run.debug.pc": "kvm_run.debug.arch.pc",
    "kvm_run.debug.dr6": "kvm_run.debug.arch.dr6",
    "kvm_run.debug.dr7": "kvm_run.debug.arch.dr7",
}
#: Structures newer than the headers of a current distribution, and how to tell.
SINCE = {
    "kvm_sev_init": "#ifdef KVM_SEV_SNP_PAGE_TYPE_NORMAL",
    "kvm_tdx_cmd": "#ifdef NEVER",
    "kvm_userspace_memory_region2": "#ifdef KVM_SET_USER_MEMORY_REGION2",
    "kvm_create_guest_memfd": "#ifdef KVM_CREATE_GUEST_MEMFD",
    "kvm_run.memory_fault": "#ifdef KVM_EXIT_MEMORY_FAULT",
    "kvm_memory_attributes": "#ifdef KVM_SET_MEMORY_ATTRIBUTES",
}


def program():
    """C that prints every number and offset the header has."""
    lines = ["#include <stdio.h>", "#include <stddef.h>", "#include <linux/kvm.h>"]
    lines.append("int main(void) {")
    for name in NUMBERS.keys() - INTERNAL:
        lines += [
            f"#ifdef {name}",
            f'printf("{name} %llu\\n", (unsigned long long){name});',
            "#endif",
        ]
    for layout in LAYOUTS:
        snp = layout.name.startswith("kvm_sev_snp_")
        lines.append(SINCE["kvm_sev_init"] if snp else SINCE.get(layout.name, "#if 1"))
        struct, _, prefix = layout.name.partition(".")
        lines.append(f'printf("sizeof.{layout.name} %zu\\n", sizeof(struct {struct}));')
        for member in layout.fields:
            path = MEMBERS.get(f"{layout.name}.{member}", f"{layout.name}.{member}")
            path = path.removeprefix(f"{struct}.") if prefix else member
            lines.append(
                f'printf("{layout.name}.{member} %zu\\n", offsetof(struct {struct}, {path}));'
            )
        lines.append("#endif")
    return "\n".join([*lines, "return 0; }"])


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    if not HEADER.exists() or COMPILER is None:
        pytest.skip("no KVM header or no C compiler on this machine")
    directory = tmp_path_factory.mktemp("abi")
    (directory / "abi.c").write_text(program())
    subprocess.run([COMPILER, "abi.c", "-o", "abi"], cwd=directory, check=True, timeout=60)
    output = subprocess.run(["./abi"], cwd=directory, check=True, capture_output=True, text=True)
    return {key: int(value) for key, value in map(str.split, output.stdout.splitlines())}


def test_numbers_are_those_of_the_header(header):
    ours = {name: value for name, value in NUMBERS.items() if name in header}
    assert ours == {name: header[name] for name in ours}
    assert len(ours) > 250


def test_structures_have_the_sizes_of_the_header(header):
    ours = {f"sizeof.{layout.name}": layout.size_bytes for layout in LAYOUTS}
    assert {key: ours[key] for key in ours if key in header} == {
        key: value for key, value in header.items() if key.startswith("sizeof.")
    }


def test_members_have_the_offsets_of_the_header(header):
    ours = {
        f"{layout.name}.{name}": field.offset
        for layout in LAYOUTS
        for name, field in layout.fields.items()
    }
    assert {key: ours[key] for key in ours if key in header} == {
        key: value for key, value in header.items() if key in ours
    }
    assert len(ours.keys() & header.keys()) > 300
