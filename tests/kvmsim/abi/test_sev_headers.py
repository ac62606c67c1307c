"""The SEV tables against the C headers of this machine, through the C compiler."""

import shutil
import subprocess
from pathlib import Path

import pytest

from kvmsim.abi import psp
from kvmsim.abi import sev as abi
from kvmsim.abi.layout import Layout

KVM, PSP = Path("/usr/include/linux/kvm.h"), Path("/usr/include/linux/psp-sev.h")
ASM = Path("/usr/include/x86_64-linux-gnu/asm/kvm.h")
COMPILER = shutil.which("cc")

LAYOUTS = [
    value for module in (abi, psp) for value in vars(module).values() if isinstance(value, Layout)
]
NUMBERS = {
    name: value
    for module in (abi, psp)
    for name, value in vars(module).items()
    if name.startswith(("KVM_SEV_", "SEV_", "SNP_", "KVM_GHCB")) and isinstance(value, int)
}
#: Ours alone: shorthand, or names the kernel has in headers of its own only.
INTERNAL = {
    "KVM_SEV_SNP_FIRST",
    "SEV_FW_BLOB_MAX_SIZE",
    "SEV_STATUS_FLAGS_OWNED",
    "SEV_USER_DATA_SNP_WRAPPED_VLEK_HASHSTICK_BYTES",
    *(name for name in NUMBERS if "POLICY" in name),
}
#: C spells these ones otherwise.
STATUS_NAMES = {
    "INVALID_CONFIG": "SEV_RET_INAVLID_CONFIG",
    "INVALID_LENGTH": "SEV_RET_INVALID_LEN",
    "HWERROR_PLATFORM": "SEV_RET_HWSEV_RET_PLATFORM",
    "HWERROR_UNSAFE": "SEV_RET_HWSEV_RET_UNSAFE",
}


def known(text, name):
    return name in text.replace("(", " ").replace(",", " ").replace(";", " ").split()


def program(text):
    """C that prints every number and offset the headers have."""
    lines = ["#include <stdio.h>", "#include <stddef.h>"]
    lines += ["#include <linux/kvm.h>", "#include <linux/psp-sev.h>", "int main(void) {"]
    names = {name: name for name in NUMBERS.keys() - INTERNAL}
    names |= {
        f"Status.{row.name}": STATUS_NAMES.get(row.name, f"SEV_RET_{row.name}")
        for row in psp.Status
    }
    for ours, theirs in names.items():
        if known(text, theirs):
            lines.append(f'printf("{ours} %llu\\n", (unsigned long long){theirs});')
    for layout in LAYOUTS:
        if f"struct {layout.name} {{" not in text:
            continue
        lines.append(f'printf("sizeof.{layout.name} %zu\\n", sizeof(struct {layout.name}));')
        lines += [
            f'printf("{layout.name}.{name} %zu\\n", offsetof(struct {layout.name}, {name}));'
            for name in layout.fields
            if name not in {"pad1", "pad2"}
        ]
    return "\n".join([*lines, "return 0; }"])


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    if not (KVM.exists() and PSP.exists() and ASM.exists() and COMPILER):
        pytest.skip("no KVM or PSP header or no C compiler on this machine")
    text = KVM.read_text() + ASM.read_text() + PSP.read_text()
    directory = tmp_path_factory.mktemp("sev")
    (directory / "sev.c").write_text(program(text))
    subprocess.run([COMPILER, "sev.c", "-o", "sev"], cwd=directory, check=True, timeout=60)
    output = subprocess.run(["./sev"], cwd=directory, check=True, capture_output=True, text=True)
    return {key: int(value) for key, value in map(str.split, output.stdout.splitlines())}


def test_numbers_are_those_of_the_headers(header):
    ours = NUMBERS | {f"Status.{row.name}": row.value for row in psp.Status}
    shared = ours.keys() & header.keys()
    # SEV_MAX is one past the last command, which the newest header alone knows.
    shared.discard("SEV_MAX")
    assert {name: ours[name] for name in shared} == {name: header[name] for name in shared}
    assert len(shared) > 50


def test_structures_are_those_of_the_headers(header):
    ours = {f"sizeof.{layout.name}": layout.size_bytes for layout in LAYOUTS}
    ours |= {
        f"{layout.name}.{name}": field.offset
        for layout in LAYOUTS
        for name, field in layout.fields.items()
    }
    shared = ours.keys() & header.keys()
    assert {name: ours[name] for name in shared} == {name: header[name] for name in shared}
    assert len(shared) > 60
