"""What a guest reads of the time its thread waited for a CPU."""

import pytest

from kvmsim.abi import msrs as abi
from kvmsim.abi.exits import Exit
from kvmsim.kvm import msrs, steal_time

AMD = 'vendor = "amd"\n'
HLT = "f4"
PAGE = 0x9000


def shown(guest):
    """Stolen nanoseconds and version."""
    return guest.word_at(PAGE), guest.word_at(PAGE + 8) & 0xFFFF_FFFF


@pytest.fixture
def guest(start):
    guest = start(AMD, HLT, HLT, HLT)
    guest.offer_everything()
    assert msrs.write(guest.vcpu, abi.KVM_STEAL_TIME, PAGE | 1, 0)
    return guest


def test_every_run_tells_what_was_waited_since_the_last(guest):
    steal_time.waited(guest.vcpu, 100)
    assert guest.run() == Exit.HLT
    assert shown(guest) == (100, 2)
    steal_time.waited(guest.vcpu, 150)
    assert guest.run() == Exit.HLT
    assert shown(guest) == (150, 4)


def test_the_guest_may_begin_anew(guest):
    """What it has there is added to, and an odd version is junk of its own."""
    steal_time.waited(guest.vcpu, 100)
    assert guest.run() == Exit.HLT
    guest.word(PAGE, 7)
    guest.word(PAGE + 8, 1 | 3 << 32)
    steal_time.waited(guest.vcpu, 150)
    assert guest.run() == Exit.HLT
    assert guest.word_at(PAGE) == 57
    assert guest.word_at(PAGE + 8) == 4 | 3 << 32


def test_nothing_is_written_for_a_guest_that_did_not_ask(guest):
    assert msrs.write(guest.vcpu, abi.KVM_STEAL_TIME, PAGE, 0)
    assert not steal_time.is_wanted(guest.vcpu)
    steal_time.waited(guest.vcpu, 100)
    assert guest.run() == Exit.HLT
    assert shown(guest) == (0, 0)


def test_an_address_without_memory_is_skipped(guest):
    assert msrs.write(guest.vcpu, abi.KVM_STEAL_TIME, 0x4000_0000 | 1, 0)
    steal_time.waited(guest.vcpu, 100)
    assert guest.run() == Exit.HLT
    assert msrs.write(guest.vcpu, abi.KVM_STEAL_TIME, PAGE | 1, 0)
    steal_time.waited(guest.vcpu, 150)
    assert guest.run() == Exit.HLT
    assert shown(guest) == (150, 2)
