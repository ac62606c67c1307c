"""Capabilities: what KVM_CHECK_EXTENSION answers, and the ones that are just switched on.

Capabilities that belong to a subsystem are enabled in its file (``@enables``). Source of the
values: Linux 6.12 x86 ``kvm_vm_ioctl_check_extension`` and kvm.md G.
"""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING

from kvmsim.abi import caps
from kvmsim.errors import KvmError
from kvmsim.kvm import irqchip
from kvmsim.kvm.dispatch import enables, state_of

if TYPE_CHECKING:
    from kvmsim.host.machine import Machine
    from kvmsim.kvm.client import Client
    from kvmsim.kvm.vm import KvmEnableCap, Vm

#: Those whose value says no more than "yes".
_PRESENT = (
    *(caps.KVM_CAP_IRQCHIP, caps.KVM_CAP_HLT, caps.KVM_CAP_USER_MEMORY),
    *(caps.KVM_CAP_SET_TSS_ADDR, caps.KVM_CAP_VAPIC, caps.KVM_CAP_EXT_CPUID),
    *(caps.KVM_CAP_CLOCKSOURCE, caps.KVM_CAP_PIT, caps.KVM_CAP_NOP_IO_DELAY),
    *(caps.KVM_CAP_MP_STATE, caps.KVM_CAP_SYNC_MMU, caps.KVM_CAP_USER_NMI),
    *(caps.KVM_CAP_DESTROY_MEMORY_REGION_WORKS, caps.KVM_CAP_JOIN_MEMORY_REGIONS_WORKS),
    *(caps.KVM_CAP_SET_GUEST_DEBUG, caps.KVM_CAP_REINJECT_CONTROL),
    *(caps.KVM_CAP_IRQ_INJECT_STATUS, caps.KVM_CAP_IRQFD, caps.KVM_CAP_PIT2),
    *(caps.KVM_CAP_SET_BOOT_CPU_ID, caps.KVM_CAP_PIT_STATE2, caps.KVM_CAP_IOEVENTFD),
    *(caps.KVM_CAP_SET_IDENTITY_MAP_ADDR, caps.KVM_CAP_VCPU_EVENTS),
    *(caps.KVM_CAP_INTERNAL_ERROR_DATA, caps.KVM_CAP_DEBUGREGS),
    *(caps.KVM_CAP_X86_ROBUST_SINGLESTEP, caps.KVM_CAP_ENABLE_CAP),
    *(caps.KVM_CAP_XSAVE, caps.KVM_CAP_XCRS, caps.KVM_CAP_ASYNC_PF),
    *(caps.KVM_CAP_GET_TSC_KHZ, caps.KVM_CAP_TSC_DEADLINE_TIMER),
    *(caps.KVM_CAP_KVMCLOCK_CTRL, caps.KVM_CAP_SIGNAL_MSI, caps.KVM_CAP_READONLY_MEM),
    *(caps.KVM_CAP_IRQFD_RESAMPLE, caps.KVM_CAP_DEVICE_CTRL, caps.KVM_CAP_EXT_EMUL_CPUID),
    *(caps.KVM_CAP_IOAPIC_POLARITY_IGNORED, caps.KVM_CAP_ENABLE_CAP_VM),
    *(caps.KVM_CAP_IOEVENTFD_NO_LENGTH, caps.KVM_CAP_IOEVENTFD_ANY_LENGTH),
    *(caps.KVM_CAP_CHECK_EXTENSION_VM, caps.KVM_CAP_DISABLE_QUIRKS),
    *(caps.KVM_CAP_SPLIT_IRQCHIP, caps.KVM_CAP_VCPU_ATTRIBUTES, caps.KVM_CAP_IMMEDIATE_EXIT),
    *(caps.KVM_CAP_GET_MSR_FEATURES, caps.KVM_CAP_MSR_PLATFORM_INFO),
    *(caps.KVM_CAP_COALESCED_PIO, caps.KVM_CAP_EXCEPTION_PAYLOAD),
    *(caps.KVM_CAP_PMU_EVENT_FILTER, caps.KVM_CAP_HALT_POLL, caps.KVM_CAP_LAST_CPU),
    *(caps.KVM_CAP_ASYNC_PF_INT, caps.KVM_CAP_STEAL_TIME, caps.KVM_CAP_X86_MSR_FILTER),
    *(caps.KVM_CAP_X86_USER_SPACE_MSR, caps.KVM_CAP_ENFORCE_PV_FEATURE_CPUID),
    *(caps.KVM_CAP_SREGS2, caps.KVM_CAP_BINARY_STATS_FD),
    *(caps.KVM_CAP_EXIT_ON_EMULATION_FAILURE, caps.KVM_CAP_SYS_ATTRIBUTES),
    *(caps.KVM_CAP_TSC_CONTROL, caps.KVM_CAP_VM_TSC_CONTROL),
    *(caps.KVM_CAP_SYSTEM_EVENT_DATA, caps.KVM_CAP_X86_TRIPLE_FAULT_EVENT),
    *(caps.KVM_CAP_USER_MEMORY2, caps.KVM_CAP_MEMORY_FAULT_INFO, caps.KVM_CAP_GUEST_MEMFD),
    # On every x86 host, also without SEV: the vendor is asked only when they are used.
    *(caps.KVM_CAP_VM_COPY_ENC_CONTEXT_FROM, caps.KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM),
)


def extensions(machine: Machine) -> dict[int, int]:
    """Capability -> value, for what KVM does on a machine; those not named are worth 0."""
    both = caps.KVM_BUS_LOCK_DETECTION_OFF | caps.KVM_BUS_LOCK_DETECTION_EXIT
    values = dict.fromkeys(_PRESENT, 1)
    values |= {
        caps.KVM_CAP_NR_VCPUS: min(machine.preset.cpus, caps.KVM_MAX_VCPUS),
        caps.KVM_CAP_NR_MEMSLOTS: caps.KVM_USER_MEM_SLOTS,
        caps.KVM_CAP_COALESCED_MMIO: 2,  # the page of the ring in the vCPU's mapping
        caps.KVM_CAP_IRQ_ROUTING: caps.KVM_MAX_IRQ_ROUTES,
        caps.KVM_CAP_MCE: caps.KVM_MAX_MCE_BANKS,
        caps.KVM_CAP_ADJUST_CLOCK: caps.KVM_CLOCK_VALID_FLAGS,
        caps.KVM_CAP_MAX_VCPUS: caps.KVM_MAX_VCPUS,
        caps.KVM_CAP_SYNC_REGS: 7,
        caps.KVM_CAP_MAX_VCPU_ID: caps.KVM_MAX_VCPU_IDS,
        caps.KVM_CAP_X2APIC_API: caps.KVM_X2APIC_API_VALID_FLAGS,
        caps.KVM_CAP_X86_DISABLE_EXITS: 0xE,  # HLT, PAUSE, CSTATE; MWAIT is the host's own
        caps.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: 3,
        caps.KVM_CAP_X86_BUS_LOCK_EXIT: 0 if machine.bus_lock_exit == "none" else both,
        caps.KVM_CAP_SET_GUEST_DEBUG2: caps.KVM_GUESTDBG_VALID_MASK,
        caps.KVM_CAP_EXIT_HYPERCALL: caps.KVM_EXIT_HYPERCALL_VALID_MASK,
        caps.KVM_CAP_XSAVE2: 4096,
        caps.KVM_CAP_DISABLE_QUIRKS2: caps.KVM_X86_VALID_QUIRKS,
        caps.KVM_CAP_VM_TYPES: vm_types(machine),
        caps.KVM_CAP_PMU_CAPABILITY: int(machine.preset.pmu is not None),
    }
    if has_private_memory(machine):
        values[caps.KVM_CAP_MEMORY_ATTRIBUTES] = 1 << 3
    return values


def vm_types(machine: Machine) -> int:
    """One bit for each ``KVM_X86_*_VM`` a machine has."""
    sev = machine.sev
    present = {
        caps.KVM_X86_DEFAULT_VM: True,
        caps.KVM_X86_SEV_VM: sev.sev,
        caps.KVM_X86_SEV_ES_VM: sev.sev_es,
        caps.KVM_X86_SNP_VM: sev.sev_snp,
        caps.KVM_X86_TDX_VM: machine.preset.tdx is not None,
    }
    return sum(1 << vm_type for vm_type, has in present.items() if has)


def has_private_memory(machine: Machine) -> bool:
    """Whether some VM type of a machine has memory that user space cannot reach."""
    return machine.sev.sev_snp or machine.preset.tdx is not None


class VmSwitches:
    """What a VMM switched on for a VM, as far as it is only remembered.

    Attributes:
        exception_payload: pending exceptions are reported with their payload.
        triple_fault_event: a pending triple fault is part of the vCPU's events.
        exit_on_emulation_failure: every failed emulation is an exit.
        user_space_msr: reasons (``KVM_MSR_EXIT_REASON_*``) for which RDMSR and WRMSR are exits.
        hypercall_exits: hypercalls that are exits, one bit each.
        disabled_exits: instructions the guest executes without an exit (``KVM_X86_DISABLE_*``).
        disabled_quirks: ``KVM_X86_QUIRK_*`` that are off.
        x2apic_api: ``KVM_X2APIC_API_*``.
        halt_poll_ns: longest time to poll before a halt; None: the module's.
        platform_info: the guest may read MSR_PLATFORM_INFO.
    """

    __slots__ = (
        *("disabled_exits", "disabled_quirks", "exception_payload", "exit_on_emulation_failure"),
        *("halt_poll_ns", "hypercall_exits", "platform_info", "triple_fault_event"),
        *("user_space_msr", "x2apic_api"),
    )

    def __init__(self, vm: Vm) -> None:
        del vm
        self.exception_payload = False
        self.triple_fault_event = False
        self.exit_on_emulation_failure = False
        self.user_space_msr = 0
        self.hypercall_exits = 0
        self.disabled_exits = 0
        self.disabled_quirks = 0
        self.x2apic_api = 0
        self.halt_poll_ns: int | None = None
        self.platform_info = True


def of(vm: Vm) -> VmSwitches:
    """What is switched on for a VM."""
    return state_of(vm, VmSwitches)


def _masked(enable: KvmEnableCap, mask: int) -> int:
    """The value of a capability; KvmError EINVAL for bits outside the mask."""
    if enable.arg0 & ~mask:
        raise KvmError(EINVAL, f"capability {enable.cap} value {enable.arg0:#x}")
    return enable.arg0


@enables(caps.KVM_CAP_X86_BUS_LOCK_EXIT)
def enable_bus_lock_exit(vm: Vm, enable: KvmEnableCap, client: Client) -> int:
    """Bus lock detection. A host without the mechanism accepts it and does nothing."""
    del client
    off, leave = caps.KVM_BUS_LOCK_DETECTION_OFF, caps.KVM_BUS_LOCK_DETECTION_EXIT
    mode = _masked(enable, caps.KVM_BUS_LOCK_DETECTION_VALID_MODE)
    if mode == off | leave:
        raise KvmError(EINVAL, f"bus lock detection mode {mode:#x}")
    if mode & leave and vm.machine.bus_lock_exit != "none":
        vm.bus_lock_detection = True
    elif mode & off and not vm.machine.quirks.sticky_bus_lock:
        vm.bus_lock_detection = False
    return 0


@enables(caps.KVM_CAP_MAX_VCPU_ID)
def limit_vcpu_ids(vm: Vm, enable: KvmEnableCap, client: Client) -> int:
    """Set the highest number of ids, once; the first vCPU sets it to the maximum."""
    del client
    limit = enable.arg0
    if irqchip.of(vm).boot_cpu > limit:
        raise KvmError(EINVAL, f"limit {limit} leaves no id for the boot CPU")
    if limit == vm.max_vcpu_ids:
        return 0
    if limit > caps.KVM_MAX_VCPU_IDS or vm.max_vcpu_ids:
        raise KvmError(EINVAL, f"limit of vCPU ids {limit}")
    vm.max_vcpu_ids = limit
    return 0


@enables(caps.KVM_CAP_EXCEPTION_PAYLOAD)
def enable_exception_payload(vm: Vm, enable: KvmEnableCap, client: Client) -> int:
    """Report pending exceptions apart from injected ones, with their payload; any value."""
    del client
    of(vm).exception_payload = bool(enable.arg0)
    return 0


@enables(caps.KVM_CAP_X86_TRIPLE_FAULT_EVENT)
def enable_triple_fault_event(vm: Vm, enable: KvmEnableCap, client: Client) -> int:
    """Report a pending triple fault among the events; any value."""
    del client
    of(vm).triple_fault_event = bool(enable.arg0)
    return 0


@enables(caps.KVM_CAP_X86_USER_SPACE_MSR)
def enable_user_space_msr(vm: Vm, enable: KvmEnableCap, client: Client) -> int:
    """Choose for which reasons an MSR access of the guest becomes an exit."""
    del client
    of(vm).user_space_msr = _masked(enable, caps.KVM_MSR_EXIT_REASON_VALID_MASK)
    return 0


@enables(caps.KVM_CAP_X86_DISABLE_EXITS)
def disable_exits(vm: Vm, enable: KvmEnableCap, client: Client) -> int:
    """Let the guest execute HLT, PAUSE, MWAIT or C-state reads by itself; before the first vCPU."""
    del client
    disabled = _masked(enable, caps.KVM_X86_DISABLE_EXITS_VALID_MASK)
    if vm.vcpus:
        raise KvmError(EINVAL, "vCPUs exist")
    of(vm).disabled_exits |= disabled
    return 0


@enables(caps.KVM_CAP_DISABLE_QUIRKS)
def disable_quirks(vm: Vm, enable: KvmEnableCap, client: Client) -> int:
    """Any value."""
    del client
    of(vm).disabled_quirks = enable.arg0
    return 0


@enables(caps.KVM_CAP_DISABLE_QUIRKS2)
def disable_known_quirks(vm: Vm, enable: KvmEnableCap, client: Client) -> int:
    """Only quirks there are."""
    del client
    of(vm).disabled_quirks = _masked(enable, caps.KVM_X86_VALID_QUIRKS)
    return 0


@enables(caps.KVM_CAP_EXIT_HYPERCALL)
def enable_hypercall_exits(vm: Vm, enable: KvmEnableCap, client: Client) -> int:
    """Only KVM_HC_MAP_GPA_RANGE can be an exit."""
    del client
    of(vm).hypercall_exits = _masked(enable, caps.KVM_EXIT_HYPERCALL_VALID_MASK)
    return 0


@enables(caps.KVM_CAP_EXIT_ON_EMULATION_FAILURE)
def enable_exit_on_emulation_failure(vm: Vm, enable: KvmEnableCap, client: Client) -> int:
    """0 or 1."""
    del client
    of(vm).exit_on_emulation_failure = bool(_masked(enable, 1))
    return 0


@enables(caps.KVM_CAP_X2APIC_API)
def enable_x2apic_api(vm: Vm, enable: KvmEnableCap, client: Client) -> int:
    """32-bit APIC ids, and no broadcast quirk."""
    del client
    of(vm).x2apic_api |= _masked(enable, caps.KVM_X2APIC_API_VALID_FLAGS)
    return 0


@enables(caps.KVM_CAP_HALT_POLL)
def set_halt_poll(vm: Vm, enable: KvmEnableCap, client: Client) -> int:
    """Any value, in nanoseconds."""
    del client
    of(vm).halt_poll_ns = enable.arg0
    return 0


@enables(caps.KVM_CAP_MSR_PLATFORM_INFO)
def allow_platform_info(vm: Vm, enable: KvmEnableCap, client: Client) -> int:
    """Whether the guest may read MSR_PLATFORM_INFO; any value."""
    del client
    of(vm).platform_info = bool(enable.arg0)
    return 0
