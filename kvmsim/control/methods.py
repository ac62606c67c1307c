"""The methods of a host's control socket.

A method turns its parameters into one call of the host and says what came of it; what the host is
and does lives in ``kvmsim.builder``.
"""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol

from cgfs.control.errors import CommandError
from cgfs.control.server import Method, Peer
from kvmsim.control.explain import explain
from kvmsim.control.messages import HostSnapshot, LbrState, NamedVm, Nothing, StartVm, VmSnapshot


class HostApi(Protocol):
    """What a host can be asked for."""

    def statistics(self) -> HostSnapshot:
        """The host at a glance."""

    def set_lbr(self, state: LbrState) -> LbrState:
        """Takes the last-branch records away from guests, or gives them back."""

    def vm_statistics(self) -> list[VmSnapshot]:
        """Every VM, in the order they were started."""

    async def settle(self) -> None:
        """Wait for what clients have closed, so that nothing is refused for it."""

    def start_vm(self, request: StartVm, caller_pid: int) -> VmSnapshot:
        """Starts a VM; raises what ``explain`` knows."""

    def stop_vm(self, name: str) -> VmSnapshot:
        """Stops a VM and returns what it was at the end."""


def host_methods(host: HostApi) -> list[Method]:
    """Everything that can be called on a host."""

    async def info(_params: Nothing, _peer: Peer) -> HostSnapshot:
        return host.statistics()

    async def lbr(params: LbrState, _peer: Peer) -> LbrState:
        return host.set_lbr(params)

    async def list_vms(_params: Nothing, _peer: Peer) -> list[VmSnapshot]:
        return host.vm_statistics()

    async def show(params: NamedVm, _peer: Peer) -> VmSnapshot:
        for vm in host.vm_statistics():
            if vm.name == params.name:
                return vm
        raise CommandError(f"vm {params.name}: no such VM")

    async def start(params: StartVm, peer: Peer) -> VmSnapshot:
        await host.settle()
        return _about(params.name, partial(host.start_vm, params, peer.pid))

    async def stop(params: NamedVm, _peer: Peer) -> VmSnapshot:
        return _about(params.name, partial(host.stop_vm, params.name))

    return [
        _method("host.info", Nothing, info),
        _method("host.lbr", LbrState, lbr),
        _method("vm.list", Nothing, list_vms),
        _method("vm.show", NamedVm, show),
        _method("vm.start", StartVm, start),
        _method("vm.stop", NamedVm, stop),
    ]


def _method(name: str, params: type[Any], call: Callable[[Any, Peer], Awaitable[object]]) -> Method:
    return Method(name, params, call)


def _about(name: str, call: Callable[[], VmSnapshot]) -> VmSnapshot:
    """Puts the name of the VM before what went wrong with it."""
    try:
        return call()
    except Exception as error:
        failure = explain(error)
        if failure is None:
            raise
        line = f"vm {name}: {failure.message}"
        raise CommandError(line, failure.exit_code, failure.errno) from error
