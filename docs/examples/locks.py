"""Runs eleven bytes of code that takes three bus locks, on a trap-like and a fault-like machine."""

import mmap

from cgfs.controllers.bus_lock import CONTROLLER as BUS_LOCK
from cgfs.core.roots import Roots
from kvmsim.abi.exits import Exit
from kvmsim.abi.structs import KVM_REGS
from kvmsim.engine.x86.memory import Slot
from kvmsim.host.accounting import CgroupAccounting
from kvmsim.host.machine import Machine
from kvmsim.host.presets import load
from kvmsim.kvm import sregs
from kvmsim.kvm.client import LocalClient
from kvmsim.kvm.system import System
from kvmsim.kvm.vcpu import Vcpu
from kvmsim.kvm.vm import KvmEnableCap
from kvmsim.kvm.x86.guest import attach

CODE = bytes.fromhex(
    "b9 03 00"  #              mov   $3, %cx
    "f0 ff 06 3f 20"  # again: lock incw 0x203f    its bytes are in two cache lines
    "e2 f9"  #                 loop  again
    "f4"  #                    hlt
)


def enter(vcpu: Vcpu, now_ns: int) -> int:
    """KVM_RUN, to its end, as the ioctl does; returns the exit reason."""
    blocked = vcpu.kvm_run(now_ns)
    while blocked is not None:  # guest time; a VMM in real time lets it pass
        blocked = vcpu.resume(now_ns)
    return vcpu.run.exit_reason


def play(preset: str) -> None:
    """Run the code on a machine and say what KVM_RUN said."""
    roots = Roots([BUS_LOCK])
    kvm = System(Machine(load(preset), roots, CgroupAccounting(roots)))
    vm = kvm.create_vm(vm_type=0, owner=LocalClient(pid=1))
    vm.enable_cap(KvmEnableCap(cap=193, args=(2, 0, 0, 0)))  # KVM_CAP_X86_BUS_LOCK_EXIT
    memory = mmap.mmap(-1, 1 << 16)
    memory[0x1000 : 0x1000 + len(CODE)] = CODE

    vcpu = vm.create_vcpu(0)
    engine = attach(vm, [vcpu], [Slot(0, memoryview(memory))])
    for member in ("cs.base", "cs.selector"):
        sregs.of(vcpu).put(member, 0)
    vcpu.set_regs(bytes(KVM_REGS.pack(rip=0x1000, rflags=2)))

    print(preset)
    while True:
        reason = enter(vcpu, now_ns=0)
        rip = KVM_REGS.get(vcpu.get_regs(), "rip")
        count = int.from_bytes(memory[0x203F:0x2041], "little")
        print(f"  {Exit(reason).name:12} rip {rip:#x}, count {count}")
        if reason != Exit.X86_BUS_LOCK:
            break
    engine.close()
    vm.close()


play("spr-buslock")  # the exit comes behind the instruction
play("lab-amd")  # the exit comes in front of it
