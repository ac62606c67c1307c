"""Machine checks: banks of a vCPU, set up and filled by the VMM.

Linux 6.12 x86.c ``kvm_vcpu_ioctl_x86_setup_mce``, ``set_msr_mce``, ``get_msr_mce``.
"""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING

from kvmsim.abi import msrs as abi
from kvmsim.abi.caps import KVM_MAX_MCE_BANKS
from kvmsim.abi.ioctls import (
    KVM_X86_GET_MCE_CAP_SUPPORTED,
    KVM_X86_SET_MCE,
    KVM_X86_SETUP_MCE,
)
from kvmsim.abi.regs import KVM_X86_MCE
from kvmsim.errors import KvmError
from kvmsim.kvm import msr_rules
from kvmsim.kvm.dispatch import SystemFile, VcpuFile, handles, state_of

if TYPE_CHECKING:
    from kvmsim.host.machine import Machine
    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.system import System
    from kvmsim.kvm.vcpu import Vcpu

U64_MAX = (1 << 64) - 1
CTL, STATUS, ADDR, MISC = range(4)
BANKS_MASK = 0xFF
EXTENDED_MASK = 0xFF0000
#: Threshold and interrupt enable of corrected errors.
CTL2_MASK = 0x40007FFF
#: The bit AMD's Linux leaves clear in bank 4, and one Windows clears in bank 0.
CTL_TOLERATED = 1 << 10 | 1


class MachineCheck:
    """The machine check registers of one vCPU.

    Attributes:
        capabilities: ``IA32_MCG_CAP``.
        status: ``IA32_MCG_STATUS``.
        control: ``IA32_MCG_CTL``.
        banks: CTL, STATUS, ADDR and MISC of each bank.
        ctl2: ``IA32_MCi_CTL2`` of each bank.
    """

    __slots__ = ("banks", "capabilities", "control", "ctl2", "status")

    def __init__(self, vcpu: Vcpu | None = None) -> None:
        del vcpu
        self.capabilities = KVM_MAX_MCE_BANKS
        self.status = 0
        self.control = 0
        self.banks = [[0, 0, 0, 0] for _ in range(KVM_MAX_MCE_BANKS)]
        self.ctl2 = [0] * KVM_MAX_MCE_BANKS

    @property
    def nr_banks(self) -> int:
        """Banks the guest has."""
        return self.capabilities & BANKS_MASK

    def has(self, capability: int) -> bool:
        """Whether the guest has one of ``MCG_*_P``."""
        return bool(self.capabilities & capability)


def of(vcpu: Vcpu) -> MachineCheck:
    """The machine check registers of a vCPU."""
    return state_of(vcpu, MachineCheck)


def supported(machine: Machine) -> int:
    """``IA32_MCG_CAP`` bits a guest can have; corrected errors and LMCE on Intel only."""
    intel = abi.MCG_CMCI_P | abi.MCG_LMCE_P if machine.preset.vendor == "intel" else 0
    return abi.MCG_CTL_P | abi.MCG_SER_P | intel


def owns(vcpu: Vcpu, index: int) -> bool:
    """Whether a register is one of these; banks the guest does not have are nobody's."""
    if abi.IA32_MCG_CAP <= index <= abi.IA32_MCG_CTL:
        return True
    nr_banks = of(vcpu).nr_banks
    return 0 <= index - abi.IA32_MC0_CTL < 4 * nr_banks or 0 <= index - abi.IA32_MC0_CTL2 < nr_banks


def read(vcpu: Vcpu, index: int) -> int:
    """One register."""
    check = of(vcpu)
    if index >= abi.IA32_MC0_CTL:
        bank, register = divmod(index - abi.IA32_MC0_CTL, 4)
        return check.banks[bank][register]
    if index >= abi.IA32_MC0_CTL2:
        return check.ctl2[index - abi.IA32_MC0_CTL2]
    machine_wide = {
        abi.IA32_MCG_CAP: check.capabilities,
        abi.IA32_MCG_STATUS: check.status,
        abi.IA32_MCG_CTL: check.control,
    }
    return machine_wide[index]


def write(vcpu: Vcpu, index: int, value: int) -> bool:
    """Set one register from user space; False: refused."""
    check = of(vcpu)
    if index >= abi.IA32_MC0_CTL:
        return _write_bank(check, index - abi.IA32_MC0_CTL, value)
    if index >= abi.IA32_MC0_CTL2:
        taken = not value & ~CTL2_MASK and (not value or check.has(abi.MCG_CMCI_P))
        if taken:
            check.ctl2[index - abi.IA32_MC0_CTL2] = value
        return taken
    if index == abi.IA32_MCG_STATUS:
        check.status = value
    elif index == abi.IA32_MCG_CTL and value in {0, U64_MAX if check.has(abi.MCG_CTL_P) else 0}:
        check.control = value
    else:
        return False
    return True


def guest_write(vcpu: Vcpu, index: int, value: int) -> bool:
    """Set one register from the guest, which can clear a status but not make one up; False: #GP."""
    position = index - abi.IA32_MC0_CTL
    if position >= 0 and position % 4 == STATUS and value and not _may_set_status(vcpu):
        return False
    return write(vcpu, index, value)


def _may_set_status(vcpu: Vcpu) -> bool:
    """AMD: HWCR.McStatusWrEn (Linux 6.12 x86.c ``can_set_mci_status``)."""
    return bool(msr_rules.stored(vcpu, abi.AMD_HWCR) >> 18 & 1)


def _write_bank(check: MachineCheck, position: int, value: int) -> bool:
    bank, register = divmod(position, 4)
    if register == CTL and value and value | CTL_TOLERATED != U64_MAX:
        return False
    check.banks[bank][register] = value
    return True


@handles(SystemFile, KVM_X86_GET_MCE_CAP_SUPPORTED)
def get_mce_cap_supported(system: System, call: Call) -> int:
    """Which capabilities KVM_X86_SETUP_MCE takes."""
    call.write(supported(system.machine).to_bytes(8, "little"))
    return 0


@handles(VcpuFile, KVM_X86_SETUP_MCE)
def setup_mce(vcpu: Vcpu, call: Call) -> int:
    """Give the guest banks and capabilities; everything is enabled."""
    capabilities = int.from_bytes(call.read(8), "little")
    nr_banks = capabilities & BANKS_MASK
    if not 0 < nr_banks <= KVM_MAX_MCE_BANKS:
        raise KvmError(EINVAL, f"{nr_banks} machine check banks")
    if capabilities & ~(supported(vcpu.vm.machine) | BANKS_MASK | EXTENDED_MASK):
        raise KvmError(EINVAL, f"machine check capabilities {capabilities:#x}")
    check = of(vcpu)
    check.capabilities = capabilities
    if capabilities & abi.MCG_CTL_P:
        check.control = U64_MAX
    for bank in range(nr_banks):
        check.banks[bank][CTL] = U64_MAX
    return 0


@handles(VcpuFile, KVM_X86_SET_MCE)
def set_mce(vcpu: Vcpu, call: Call) -> int:
    """Report an error in a bank. An uncorrected one is recorded, not raised."""
    data = call.read(KVM_X86_MCE.size_bytes)
    get = KVM_X86_MCE.get
    check = of(vcpu)
    bank, status = get(data, "bank"), get(data, "status")
    if bank >= check.nr_banks or not status & abi.MCI_STATUS_VAL:
        raise KvmError(EINVAL, f"bank {bank}, status {status:#x}")
    registers = check.banks[bank]
    uncorrected = bool(status & abi.MCI_STATUS_UC)
    if uncorrected and check.capabilities & abi.MCG_CTL_P and check.control != U64_MAX:
        return 0
    if uncorrected and registers[CTL] != U64_MAX:
        return 0
    if uncorrected:
        check.status = get(data, "mcg_status")
    elif registers[STATUS] & abi.MCI_STATUS_VAL and registers[STATUS] & abi.MCI_STATUS_UC:
        registers[STATUS] |= abi.MCI_STATUS_OVER
        return 0
    if registers[STATUS] & abi.MCI_STATUS_VAL:
        status |= abi.MCI_STATUS_OVER
    registers[STATUS:] = [status, get(data, "addr"), get(data, "misc")]
    return 0
