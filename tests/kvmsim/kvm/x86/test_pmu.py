"""Counters as guests of real code read them."""

import pytest

from kvmsim.abi.exits import Exit
from kvmsim.kvm import msrs, sregs

pytest.importorskip("unicorn")

HANDLER = 0x2000
HLT = "f4"
CR4_PCE = 1 << 8
ICE_LAKE = 'vendor = "intel"\nfamily = 6\nmodel = 106\n[pmu]\n'


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (1, 0x1234_5678_9ABC),
        (1 | 1 << 31, 0x5678_9ABC),
        (1 << 30 | 2, 0x77),
        (8, None),
        (1 << 30 | 3, None),
        (1 << 29, None),
    ],
)
def test_rdpmc_reads_the_counters_there_are(start, index, value):
    guest = start(ICE_LAKE, "0f 33", HLT).offer_everything().gate(13, HLT)
    assert msrs.write(guest.vcpu, 0xC2, 0x1234_5678_9ABC, 0)
    assert msrs.write(guest.vcpu, 0x30B, 0x77, 0)
    guest.set_regs(rcx=index)
    assert guest.run() == Exit.HLT
    if value is None:
        assert guest.regs("rip") == HANDLER + 1
    else:
        assert guest.regs("rdx") << 32 | guest.regs("rax") == value


def test_without_a_pmu_rdpmc_is_a_general_protection_fault(start):
    guest = start('vendor = "intel"\n', "0f 33", HLT).offer_everything().gate(13, HLT)
    guest.set_regs(rcx=0)
    assert guest.run() == Exit.HLT
    assert guest.regs("rip") == HANDLER + 1


@pytest.mark.parametrize(("pce", "allowed"), [(0, False), (CR4_PCE, True)])
def test_above_ring_0_cr4_has_to_allow_it(start, pce, allowed):
    guest = start(ICE_LAKE, "0f 33", "cd 80", ring=3).offer_everything()
    guest.gate(13, HLT).gate(0x80, HLT, at=HANDLER + 0x100, dpl=3)
    special = sregs.of(guest.vcpu)
    special.put("cr4", special.get("cr4") | pce)
    guest.set_regs(rcx=0)
    assert guest.run() == Exit.HLT
    assert guest.regs("rip") == (HANDLER + 0x101 if allowed else HANDLER + 1)
