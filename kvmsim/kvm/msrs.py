"""KVM_GET_MSRS and KVM_SET_MSRS: as many entries as go, up to the first that is refused.

The only register kept here is ``IA32_DEBUGCTL``; every other one is unknown to this machine.
"""

from __future__ import annotations

from errno import E2BIG
from typing import TYPE_CHECKING

from kvmsim.abi.ioctls import KVM_GET_MSRS, KVM_SET_MSRS
from kvmsim.abi.structs import KVM_MSR_ENTRY, KVM_MSRS, MAX_IO_MSRS, MSR_IA32_DEBUGCTL
from kvmsim.errors import KvmError
from kvmsim.kvm import debug
from kvmsim.kvm.dispatch import VcpuFile, handles

if TYPE_CHECKING:
    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.vcpu import Vcpu

_ENTRY_BYTES = KVM_MSR_ENTRY.size_bytes


def _entries(call: Call) -> list[bytearray]:
    """The entries of a table.

    Raises:
        KvmError: EFAULT; E2BIG, 256 entries or more.
    """
    count = KVM_MSRS.get(call.read(KVM_MSRS.size_bytes), "nmsrs")
    if count >= MAX_IO_MSRS:
        raise KvmError(E2BIG, f"{count} MSRs")
    data = bytearray(call.read(count * _ENTRY_BYTES, KVM_MSRS.size_bytes) if count else b"")
    return [data[at : at + _ENTRY_BYTES] for at in range(0, len(data), _ENTRY_BYTES)]


@handles(VcpuFile, KVM_GET_MSRS)
def get_msrs(vcpu: Vcpu, call: Call) -> int:
    """Read registers; how many were read."""
    entries = _entries(call)
    done = 0
    for entry in entries:
        if KVM_MSR_ENTRY.get(entry, "index") != MSR_IA32_DEBUGCTL:
            break
        KVM_MSR_ENTRY.put(entry, "data", debug.of(vcpu).debugctl)
        done += 1
    if entries:
        call.write(b"".join(entries), KVM_MSRS.size_bytes)
    return done


@handles(VcpuFile, KVM_SET_MSRS)
def set_msrs(vcpu: Vcpu, call: Call) -> int:
    """Write registers; how many were written."""
    done = 0
    for entry in _entries(call):
        value = KVM_MSR_ENTRY.get(entry, "data")
        known = KVM_MSR_ENTRY.get(entry, "index") == MSR_IA32_DEBUGCTL
        if not known or not debug.write_debugctl(vcpu, value, host_initiated=True):
            break
        done += 1
    return done
