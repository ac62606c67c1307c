import logging
import os
import subprocess
from contextlib import asynccontextmanager, contextmanager
from errno import EBUSY, EFAULT, EINTR, EIO

import pytest
import trio

from cgfs.controllers.misc import CONTROLLER as MISC
from cgfs.core.roots import Roots
from kvmsim.abi.ioctls import (
    KVM_CREATE_IRQCHIP,
    KVM_CREATE_VCPU,
    KVM_CREATE_VM,
    KVM_GET_API_VERSION,
    KVM_GET_MP_STATE,
    KVM_GET_REGS,
    KVM_RUN,
)
from kvmsim.engine.base import Hlt, InKernel, Io
from kvmsim.engine.scripted import Scripted
from kvmsim.host.accounting import CgroupAccounting
from kvmsim.host.machine import Machine
from kvmsim.host.presets import load
from kvmsim.interpose import clients, parked
from kvmsim.interpose.filter import NR_FSTATFS, NR_IOCTL
from kvmsim.interpose.supervisor import Supervisor
from kvmsim.kvm.system import System
from kvmsim.vmm.run_loop import RunLoop
from kvmsim.vmm.timeline import Timeline

ME = os.getpid()
OUT = Io(port=0x10, size=1, data=b"x")
GONE_ON = "goes on"


class Listener:
    """Takes the answers; this process stands for the client, so descriptors are real."""

    def __init__(self):
        self.fd = -1
        self.answers = {}
        self.dead = set()

    def answer(self, number, value, error=0):
        self.answers[number] = -error if error else value
        return number not in self.dead

    def go_on(self, number):
        self.answers[number] = GONE_ON
        return True

    def answer_with_descriptor(self, number, fd):
        self.answers[number] = os.dup(fd)
        return self.answers[number]

    def is_valid(self, number):
        return number not in self.dead

    def close(self):
        pass


class Client:
    """Makes calls and remembers what came back."""

    def __init__(self, supervisor, listener, kvm):
        self.supervisor = supervisor
        self.listener = listener
        self.kvm = kvm
        self.number = 0

    def begin(self, fd, request, arg=0, nr=NR_IOCTL, tid=ME):
        self.number += 1
        self.supervisor.handle((self.number, tid, nr, 0, fd, request, arg))
        return self.number

    def call(self, fd, request, arg=0):
        return self.listener.answers[self.begin(fd, request, arg)]

    def answer(self, number):
        return self.listener.answers.get(number)

    def vcpu(self, *, irqchip=False):
        vm = self.call(self.kvm, KVM_CREATE_VM)
        if irqchip:
            assert self.call(vm, KVM_CREATE_IRQCHIP) == 0
        vcpu = self.call(vm, KVM_CREATE_VCPU)
        os.close(vm)
        return vcpu


@asynccontextmanager
async def serving(*stops, tap=None, times=1):
    roots = Roots([MISC])
    system = System(Machine(load("naples15"), roots, CgroupAccounting(roots)))
    kvm = os.memfd_create("stands for /dev/kvm")
    status = os.fstat(kvm)
    listener = Listener()
    loop = RunLoop(Timeline())
    supervisor = Supervisor(
        listener,
        {(status.st_dev, status.st_ino): system},
        loop,
        engine=lambda _: Scripted(list(stops), times),
        tap=tap,
    )
    client = Client(supervisor, listener, kvm)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(loop.run)
            nursery.start_soon(supervisor.parked.watch_signals)
            nursery.start_soon(supervisor._handle_late)
            yield client
            nursery.cancel_scope.cancel()
    finally:
        supervisor.close()
        os.close(kvm)
    assert system.statistics().vms == 0


@contextmanager
def process_with(fd):
    """Another process that has a descriptor under the same number."""
    with subprocess.Popen(["sleep", "60"], pass_fds=[fd]) as process:
        yield process.pid
        process.kill()


async def test_exit_without_guest_time_is_answered_at_once(autojump_clock):
    async with serving(OUT) as client:
        vcpu = client.vcpu()
        assert client.call(vcpu, KVM_RUN) == 0
        os.close(vcpu)


async def test_run_is_answered_when_its_guest_time_is_over(autojump_clock):
    async with serving(Io(after_ns=50_000_000, port=0x10, size=1, data=b"x")) as client:
        vcpu = client.vcpu()
        run = client.begin(vcpu, KVM_RUN)
        await trio.sleep(0.049)
        assert client.answer(run) is None
        await trio.sleep(0.003)
        assert client.answer(run) == 0
        os.close(vcpu)


async def test_calls_for_a_running_vcpu_wait_for_the_end_of_the_run(autojump_clock):
    async with serving(Io(after_ns=50_000_000, port=0x10, size=1, data=b"x"), OUT) as client:
        vcpu = client.vcpu()
        first = client.begin(vcpu, KVM_RUN)
        state = client.begin(vcpu, KVM_GET_MP_STATE)
        second = client.begin(vcpu, KVM_RUN)
        assert client.call(client.kvm, KVM_GET_API_VERSION) == 12
        await trio.sleep(0.03)
        assert (client.answer(first), client.answer(state), client.answer(second)) == (None,) * 3
        await trio.sleep(0.03)
        assert (client.answer(first), client.answer(state), client.answer(second)) == (
            0,
            -EFAULT,
            0,
        )
        os.close(vcpu)


async def test_call_that_is_refused_anyway_does_not_wait_for_the_end_of_the_run(autojump_clock):
    async with serving(Hlt()) as client:
        vcpu = client.vcpu(irqchip=True)
        run = client.begin(vcpu, KVM_RUN)
        with process_with(vcpu) as other:
            foreign = client.begin(vcpu, KVM_GET_MP_STATE, tid=other)
        assert client.answer(foreign) == -EIO
        client.supervisor.interrupt_all()
        assert client.answer(run) == -EINTR
        os.close(vcpu)


async def test_guest_that_only_keeps_linux_busy_leaves_time_for_others(autojump_clock):
    async with serving(InKernel(), times=None) as client:
        vcpu = client.vcpu()
        run = client.begin(vcpu, KVM_RUN)
        await trio.sleep(0.01)
        assert client.call(client.kvm, KVM_GET_API_VERSION) == 12
        assert client.answer(run) is None
        client.supervisor.interrupt_all()
        assert client.answer(run) == -EINTR
        os.close(vcpu)


async def test_halted_guest_of_a_client_that_died_is_abandoned(autojump_clock):
    async with serving(Hlt()) as client:
        vcpu = client.vcpu(irqchip=True)
        run = client.begin(vcpu, KVM_RUN)
        client.listener.dead.add(run)
        await trio.sleep(0.02)
        os.close(vcpu)
        client.call(client.kvm, KVM_GET_API_VERSION)
        assert len(client.supervisor.descriptors) == 0
        assert client.answer(run) is None


async def test_many_waiting_vcpus_are_looked_at_less_often(autojump_clock, monkeypatch):
    looks = []
    monkeypatch.setattr(parked, "pending", lambda *_: looks.append(1))
    async with serving(Hlt()) as client:
        vm = client.call(client.kvm, KVM_CREATE_VM)
        assert client.call(vm, KVM_CREATE_IRQCHIP) == 0
        vcpus = [client.call(vm, KVM_CREATE_VCPU, number) for number in range(200)]
        for vcpu in vcpus:
            client.begin(vcpu, KVM_RUN)
        await trio.sleep(0.5)
        assert len(looks) < 8000
        client.supervisor.interrupt_all()
        for fd in (vm, *vcpus):
            os.close(fd)


async def test_vcpu_that_is_closed_during_a_run_lives_until_its_end(autojump_clock):
    async with serving(Hlt()) as client:
        vcpu = client.vcpu(irqchip=True)
        run = client.begin(vcpu, KVM_RUN)
        os.close(vcpu)
        system = next(iter(client.supervisor._devices.values()))
        client.call(client.kvm, KVM_GET_API_VERSION)
        assert system.statistics().vms == 1
        client.supervisor.interrupt_all()
        assert client.answer(run) == -EINTR
        assert system.statistics().vms == 0


async def test_other_descriptors_and_other_calls_go_on(autojump_clock):
    async with serving() as client:
        foreign = os.open("/dev/null", os.O_RDONLY)
        assert client.call(foreign, KVM_GET_API_VERSION) == GONE_ON
        os.close(foreign)
        assert client.call(1 << 31, KVM_GET_API_VERSION) == GONE_ON
        assert client.answer(client.begin(client.kvm, 0, 0, nr=NR_FSTATFS)) == GONE_ON


async def test_caller_that_is_gone_gets_no_answer(autojump_clock):
    async with serving() as client:
        client.listener.dead.add(1)
        assert client.begin(client.kvm, KVM_GET_API_VERSION) == 1
        assert client.answer(1) is None


async def test_mistake_in_a_guest_is_eio_and_leaves_no_vcpu(autojump_clock, monkeypatch, caplog):
    async with serving() as client:
        vm = client.call(client.kvm, KVM_CREATE_VM)
        monkeypatch.setattr(client.supervisor, "_engine", lambda _: 1 / 0)
        assert client.call(vm, KVM_CREATE_VCPU) == -EIO
        assert "ZeroDivisionError" in caplog.text
        assert client.call(client.kvm, KVM_GET_API_VERSION) == 12
        assert len(client.supervisor.descriptors) == 1
        os.close(vm)


async def test_mistake_in_a_handler_is_eio_for_one_call(autojump_clock, monkeypatch, caplog):
    async with serving(OUT) as client:
        vcpu = client.vcpu()
        with monkeypatch.context() as patched, caplog.at_level(logging.ERROR):
            patched.setattr(clients.Process, "write", lambda *_: 1 / 0)
            assert client.call(vcpu, KVM_GET_REGS) == -EIO
        assert "ZeroDivisionError" in caplog.text
        assert client.call(vcpu, KVM_RUN) == 0
        os.close(vcpu)


class Tap:
    def __init__(self):
        self.seen = []

    def called(self, file, request, arg, caller):
        return EBUSY if request == KVM_CREATE_VCPU and arg == 1 else None

    def returned(self, file, request, arg, caller, result, now_ns):
        self.seen.append((request, result))


async def test_tap_sees_results_and_makes_calls_fail(autojump_clock):
    tap = Tap()
    async with serving(Io(after_ns=1_000_000, port=0x10, size=1, data=b"x"), tap=tap) as client:
        vm = client.call(client.kvm, KVM_CREATE_VM)
        assert client.call(vm, KVM_CREATE_VCPU, 1) == -EBUSY
        vcpu = client.call(vm, KVM_CREATE_VCPU, 0)
        run = client.begin(vcpu, KVM_RUN)
        assert len(tap.seen) == 3
        await trio.sleep(0.01)
        assert client.answer(run) == 0
        assert tap.seen == [
            (KVM_CREATE_VM, vm),
            (KVM_CREATE_VCPU, -EBUSY),
            (KVM_CREATE_VCPU, vcpu),
            (KVM_RUN, 0),
        ]
        os.close(vcpu)
        os.close(vm)


@pytest.mark.parametrize("irqchip", [False, True])
async def test_end_of_the_clients_releases_what_they_left(autojump_clock, irqchip):
    async with serving(Hlt()) as client:
        vcpu = client.vcpu(irqchip=irqchip)
        client.begin(vcpu, KVM_RUN)
    os.close(vcpu)


class Breaks:
    """An engine that goes wrong the second time it is asked."""

    def __init__(self):
        self.asked = 0

    def next_stop(self, vcpu):
        self.asked += 1
        if self.asked == 2:
            raise ZeroDivisionError
        return InKernel(after_ns=1_000_000)


async def test_engine_that_goes_wrong_ends_its_vm_and_no_caller_hangs(
    autojump_clock, monkeypatch, caplog
):
    async with serving() as client:
        monkeypatch.setattr(client.supervisor, "_engine", lambda _: Breaks())
        vcpu = client.vcpu()
        run = client.begin(vcpu, KVM_RUN)
        late = client.begin(vcpu, KVM_GET_MP_STATE)
        await trio.sleep(0.01)
        assert (client.answer(run), client.answer(late)) == (-EIO, -EIO)
        assert client.call(vcpu, KVM_RUN) == -EIO
        os.close(vcpu)
    assert "vCPU 0 cannot go on" in caplog.text


async def test_engine_that_goes_wrong_at_once_fails_the_call(autojump_clock, monkeypatch, caplog):
    broken = Breaks()
    broken.asked = 1
    async with serving() as client:
        monkeypatch.setattr(client.supervisor, "_engine", lambda _: broken)
        vcpu = client.vcpu()
        assert client.call(vcpu, KVM_RUN) == -EIO
        assert client.call(vcpu, KVM_RUN) == -EIO
        os.close(vcpu)
    assert "ZeroDivisionError" in caplog.text
