"""The tables against the C headers of this machine, through the C compiler."""

import shutil
import subprocess
from pathlib import Path

import pytest

from kvmsim.abi import caps, exits, ioctls, run, sev, structs

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
    | {name: value for name, value in vars(structs).items() if name.startswith("KVM_GUESTDBG_")}
    | {"KVMIO": ioctls.KVMIO, "KVM_API_VERSION": caps.KVM_API_VERSION}
)
#: Not constants of the header: our own shorthand, or internal to the kernel.
INTERNAL = {"KVM_BUS_LOCK_DETECTION_VALID_MODE"}

LAYOUTS = [
    structs.KVM_ENABLE_CAP,
    structs.KVM_MP_STATE,
    structs.KVM_REGS,
    structs.KVM_CPUID2,
    structs.KVM_CPUID_ENTRY2,
    structs.KVM_DEVICE_ATTR,
    structs.KVM_MSRS,
    structs.KVM_MSR_ENTRY,
    structs.KVM_DEBUGREGS,
    structs.KVM_GUEST_DEBUG,
    run.KVM_RUN_PAGE,
    run.EXIT_IO,
    run.EXIT_MMIO,
    run.EXIT_DEBUG,
    run.EXIT_INTERNAL,
    run.EXIT_FAIL_ENTRY,
    sev.KVM_SEV_CMD,
    sev.KVM_SEV_INIT_STRUCT,
    sev.KVM_TDX_CMD,
]
#: C member where it is not reached by the layout's own member name.
MEMBERS = {
    "kvm_run.debug.exception": "kvm_run.debug.arch.exception",
    "kvm_run.debug.pc": "kvm_run.debug.arch.pc",
    "kvm_run.debug.dr6": "kvm_run.debug.arch.dr6",
    "kvm_run.debug.dr7": "kvm_run.debug.arch.dr7",
}
SINCE = {"kvm_sev_init": "#ifdef KVM_SEV_SNP_PAGE_TYPE_NORMAL", "kvm_tdx_cmd": "#ifdef NEVER"}


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
        lines.append(SINCE.get(layout.name, "#if 1"))
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
    assert len(ours) > 60


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
    assert len(ours.keys() & header.keys()) > 50
