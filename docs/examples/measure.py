"""Launch an SEV guest and check its measurement, as the guest's owner would."""

import hashlib
import hmac

from cgfs.controllers.misc import CONTROLLER as MISC
from cgfs.core.roots import Roots
from kvmsim.abi import sev
from kvmsim.host.accounting import CgroupAccounting
from kvmsim.host.machine import Machine
from kvmsim.host.presets import load
from kvmsim.kvm.client import LocalClient
from kvmsim.kvm.devsev import SevFile
from kvmsim.kvm.sev import SevCmd
from kvmsim.kvm.system import System

FIRMWARE = b"what the guest boots".ljust(4096, b"\0")
SESSION = b"the owner's session blob"
POLICY = sev.SEV_POLICY_NODBG

# A machine, and a client of it with /dev/sev open.
roots = Roots([MISC])
kvm = System(Machine(load("milan509-es99"), roots, CgroupAccounting(roots)))
client = LocalClient(pid=1)
device = client.open(SevFile(kvm))
vm = kvm.create_vm(vm_type=2, owner=client)


def command(number: int, data: bytearray | int = 0) -> None:
    """One command of KVM_MEMORY_ENCRYPT_OP."""
    vm.memory_encrypt_op(SevCmd(number, data, sev_fd=device), client)


# The launch.
memory = bytearray(FIRMWARE)
blob = bytearray(48)
command(sev.KVM_SEV_INIT2, sev.KVM_SEV_INIT_STRUCT.pack())
command(
    sev.KVM_SEV_LAUNCH_START,
    sev.KVM_SEV_LAUNCH_START_STRUCT.pack(
        policy=POLICY, session_uaddr=client.map(SESSION), session_len=len(SESSION)
    ),
)
command(
    sev.KVM_SEV_LAUNCH_UPDATE_DATA,
    sev.KVM_SEV_LAUNCH_UPDATE_DATA_STRUCT.pack(uaddr=client.map(memory), len=len(memory)),
)
command(
    sev.KVM_SEV_LAUNCH_MEASURE,
    sev.KVM_SEV_LAUNCH_MEASURE_STRUCT.pack(uaddr=client.map(blob), len=len(blob)),
)
command(sev.KVM_SEV_LAUNCH_FINISH)
print("memory is encrypted:", memory != FIRMWARE)

# The owner knows what was to be loaded, the policy, and the session.
measure, nonce = bytes(blob[:32]), bytes(blob[32:])
integrity_key = hashlib.sha256(b"TIK" + SESSION).digest()[:16]
version = kvm.firmware.platform.version
covered = b"\x04" + version + POLICY.to_bytes(4, "little")
covered += hashlib.sha256(FIRMWARE).digest() + nonce
print("measurement is right:", hmac.digest(integrity_key, covered, "sha256") == measure)

vm.close()
