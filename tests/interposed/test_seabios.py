"""QEMU's BIOS starts a boot sector: all interrupt controllers and timers in the kernel."""

import shutil
from dataclasses import replace

import pytest

pytest.importorskip("unicorn")

QEMU = "qemu-system-x86_64"
OPTIONS = "-accel kvm -nodefaults -no-user-config -display none -m 32"
#: mov al, 0x10; out 0xf4, al; hlt
BOOTED = "b0 10 e6 f4 f4"
EXITED = 0x10 << 1 | 1


@pytest.fixture
def disk(tmp_path):
    """A disk whose boot sector ends QEMU."""
    sector = bytes.fromhex(BOOTED).ljust(510, b"\0") + b"\x55\xaa"
    path = tmp_path / "disk"
    path.write_bytes(sector + bytes(63 * 16 * 512))
    return path


@pytest.mark.parametrize("machine", ["pc", "q35"])
@pytest.mark.skipif(shutil.which(QEMU) is None, reason="no QEMU for x86")
def test_bios_starts_processors_and_reads_a_disk_by_interrupts(make_host, disk, tmp_path, machine):
    host = make_host()
    host.emulated = replace(host.emulated, executes=True)
    log = tmp_path / "log"
    devices = f"-chardev file,id=log,path={log} -device isa-debugcon,iobase=0x402,chardev=log"
    devices += f" -device isa-debug-exit,iobase=0xf4,iosize=1 -drive format=raw,file={disk}"
    command = f"{QEMU} {OPTIONS} -M {machine} -smp 2 {devices}"
    assert host.run("timeout", "100", *command.split()) == EXITED
    text = log.read_text()
    assert "Found 2 cpu(s) max supported 2 cpu(s)" in text
    assert "Booting from 0000:7c00" in text
    host.assert_nothing_left()
