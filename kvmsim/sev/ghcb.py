"""The GHCB MSR protocol: what an SEV-ES guest asks through one MSR (kvm.md D.11).

The low 12 bits of MSR 0xC0010130 are the request. An answer is the value the guest reads back;
where there is none, the guest leaves for user space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

MSR_AMD64_SEV_ES_GHCB = 0xC001_0130
VERSION_MIN = 1

SEV_INFO_RESPONSE = 0x001
SEV_INFO_REQUEST = 0x002
CPUID_REQUEST = 0x004
CPUID_RESPONSE = 0x005
AP_RESET_HOLD_REQUEST = 0x006
AP_RESET_HOLD_RESPONSE = 0x007
FEATURES_REQUEST = 0x080
FEATURES_RESPONSE = 0x081
TERMINATE_REQUEST = 0x100
#: Preferred GHCB, registration, page state: for SNP guests only.
SNP_REQUESTS = (0x010, 0x012, 0x014)

#: ``kvm_run.system_event.type`` of a guest that ends itself.
KVM_SYSTEM_EVENT_SEV_TERM = 6


@dataclass(frozen=True, slots=True)
class Answer:
    """The guest goes on and reads this.

    Attributes:
        value: of the MSR.
    """

    value: int


@dataclass(frozen=True, slots=True)
class Terminate:
    """KVM_EXIT_SYSTEM_EVENT of type KVM_SYSTEM_EVENT_SEV_TERM.

    Attributes:
        data: ``system_event.data[0]``: what the guest wrote.
    """

    data: int


@dataclass(frozen=True, slots=True)
class ResetHold:
    """The vCPU waits to be started, as after INIT."""


Reply = Answer | Terminate | ResetHold


def reset_value(c_bit: int, version: int) -> int:
    """What the MSR holds before the guest wrote it: the answer to SEV_INFO_REQUEST.

    Args:
        c_bit: position of the encryption bit in page tables.
        version: highest protocol version, as negotiated at init: 1 or 2.
    """
    return version << 48 | VERSION_MIN << 32 | c_bit << 24 | SEV_INFO_RESPONSE


def reply(
    value: int,
    *,
    c_bit: int,
    version: int,
    cpuid: Callable[[int], tuple[int, int, int, int]],
    snp: bool = False,
    features: int = 0,
) -> Reply:
    """Answer a VMGEXIT whose request is in the MSR.

    Args:
        value: what the guest wrote.
        c_bit: see :func:`reset_value`.
        version: see :func:`reset_value`.
        cpuid: leaf -> EAX, EBX, ECX, EDX of the guest.
        snp: the guest is an SNP guest, for which more requests exist; none of them is served here.
        features: of the hypervisor.
    """
    request = value & 0xFFF
    if request == SEV_INFO_REQUEST:
        return Answer(reset_value(c_bit, version))
    if request == CPUID_REQUEST:
        register = cpuid(value >> 32)[value >> 30 & 3]
        return Answer(register << 32 | (value & 0xC000_0000) | CPUID_RESPONSE)
    if request == AP_RESET_HOLD_REQUEST:
        return ResetHold()
    if request == FEATURES_REQUEST:
        return Answer(features << 12 | FEATURES_RESPONSE)
    if request == TERMINATE_REQUEST or (request in SNP_REQUESTS and not snp):
        return Terminate(value)
    return Answer(value)
