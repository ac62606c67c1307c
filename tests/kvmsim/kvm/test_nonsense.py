"""Whatever a client asks with whatever bytes: an answer or an errno, and nothing breaks."""

import random

import pytest

from kvmsim.abi import ioctls
from kvmsim.errors import KvmError
from kvmsim.kvm.client import LocalClient
from kvmsim.kvm.dispatch import ENABLERS, KvmFile, SystemFile, VcpuFile, VmFile
from kvmsim.kvm.run import Blocked

MACHINES = {
    "amd": 'vendor = "amd"\n[bus-lock]\nexit = "fault"\n',
    "snp": 'vendor = "amd"\n[sev]\nmax-asid = 99\nmin-sev-asid = 50\nsnp = true\n',
    "intel": 'vendor = "intel"\n[bus-lock]\nexit = "trap"\ndetect = true\n[tdx]\nkeys = 3\n',
}
TABLES = {SystemFile: ioctls.SYSTEM, VmFile: ioctls.VM, VcpuFile: ioctls.VCPU}
REQUESTS = sorted({number for table in TABLES.values() for number in table.values()})
CAPABILITIES = tuple(sorted(ENABLERS))
#: More than once what most structures want.
NUMBERS = (
    *(0, 0, 0, 0, 0, 0, 1, 1, 2, 3, 7, 8, 31, 64, 255, 256, 4095, 4096, 1 << 20, 1 << 31),
    (1 << 32) - 1,
)
CALLS = 4000
MAX_FILES = 60


class Fuzz:
    """Makes calls on whatever there is."""

    def __init__(self, system, seed):
        self.chance = random.Random(seed)
        self.client = LocalClient(1)
        self.buffers = [bytearray(8192) for _ in range(4)]
        self.addresses = [self.client.map(data) for data in self.buffers]
        self.files = [system]
        self.client.open(None)

    def word(self, size_bytes):
        chance = self.chance
        pick = chance.random()
        if pick < 0.5:
            return chance.choice(NUMBERS) & (1 << 8 * size_bytes) - 1
        if pick < 0.8:
            return 0
        if pick < 0.85 and size_bytes == 8:
            return chance.choice(self.addresses)
        if pick < 0.9:
            return chance.choice(CAPABILITIES)
        return chance.getrandbits(8 * size_bytes)

    def fill(self, data):
        data[:600] = bytes(600)
        for at in range(0, 8 * self.chance.randrange(75), 8):
            half = self.chance.random() < 0.5
            data[at : at + 8] = (
                self.word(4).to_bytes(4, "little") + self.word(4).to_bytes(4, "little")
                if half
                else self.word(8).to_bytes(8, "little")
            )

    def call(self):
        chance = self.chance
        which = chance.randrange(len(self.buffers))
        self.fill(self.buffers[which])
        arg = self.addresses[which] if chance.random() < 0.8 else self.word(8)
        file = chance.choice(self.files)
        kind = next((kind for kind in TABLES if isinstance(file, kind)), None)
        own = kind is not None and chance.random() < 0.9
        request = chance.choice(list(TABLES[kind].values()) if own else REQUESTS)
        if request in {ioctls.KVM_CREATE_VM, ioctls.KVM_CREATE_VCPU} or chance.random() < 0.1:
            arg = chance.choice((*range(6), arg))
        try:
            result = file.ioctl(request, arg, self.client, now_ns=chance.getrandbits(40))
        except KvmError as error:
            assert 0 < error.errno < 4096
            return
        if isinstance(result, Blocked):
            with pytest.raises(KvmError):
                file.interrupt(0, 0)
        elif isinstance(result, KvmFile) and len(self.files) < MAX_FILES:
            self.files.append(result)
            self.client.open(result)
        elif not isinstance(result, KvmFile):
            assert isinstance(result, int)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("machine", MACHINES)
def test_nonsense_is_answered(kvm, accounting, machine, seed):
    system = kvm(MACHINES[machine])
    fuzz = Fuzz(system, seed)
    for _ in range(CALLS):
        fuzz.call()
    assert len(fuzz.files) > 10
    for vm in list(system.vms):
        vm.close()
    assert system.statistics().vms == 0
    assert not any(accounting.charged.values())
