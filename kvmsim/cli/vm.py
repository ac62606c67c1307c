"""``kvmsim vm start|stop|list|show``."""

import os
from pathlib import Path

import click

from cgfs.cli.frame import print_json
from cgfs.control.errors import CommandError
from kvmsim.cli.hosts import connect, host_option
from kvmsim.cli.info import duration
from kvmsim.control.messages import NamedVm, Nothing, StartVm, VmSnapshot

TYPES = ("default", "sev", "sev-es", "snp", "tdx")
COLUMNS = ("NAME", "TYPE", "STATE", "CGROUP", "PID", "ASID", "VCPUS", "BUS LOCKS", "UPTIME")


@click.group("vm", no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
def vm_group() -> None:
    """Start, stop and look at emulated virtual machines."""


@vm_group.command("start")
@click.argument("name")
@host_option
@click.option(
    "--type",
    "vm_type",
    type=click.Choice(TYPES),
    default="default",
    show_default=True,
    help="Protection of the guest; decides which ASID or key it takes.",
)
@click.option("--cgroup", metavar="PATH", help="Such as /tenant; without it the caller's own.")
@click.option("--guest", default="idle", show_default=True, metavar="WORDS", help="What it does.")
@click.option("--vcpus", type=click.IntRange(1, 4096), default=1, show_default=True)
@click.option(
    "--bus-lock-ratelimit",
    type=click.IntRange(0, 2**64 - 1),
    default=0,
    show_default=True,
    metavar="N",
    help="Bus locks a second the VMM lets through, as QEMU's machine property; 0 is off.",
)
@click.option("--seed", type=int, help="Chance of the guest; without it derived from the host's.")
@click.option("--json", "as_json", is_flag=True, help="Print what was started as JSON.")
def start_command(
    name: str,
    host: Path | None,
    vm_type: str,
    cgroup: str | None,
    guest: str,
    vcpus: int,
    bus_lock_ratelimit: int,
    seed: int | None,
    as_json: bool,
) -> None:
    """Start a VM called NAME.

    Guests, with rates a second on each vCPU:

    \b
      idle                          halts
      busy                          computes, without an exit
      buslock rate=5000             computes and takes bus locks
      mixed buslock=100 io=50 mmio=20 hlt=10
                                    one or several of these

    The last two also take jitter=none (periodic; else poisson), cpl=0 to 3 (of the code
    that locks; else 3) and sleep=MS (how long a halt lasts; else 1). All but idle take
    branches=50000, for their last-branch records.
    """  # noqa: D301 - click wants the control character
    if not name or "/" in name or any(not c.isprintable() for c in name):
        raise CommandError(f"vm {name!r}: not a name", os.EX_USAGE)
    request = StartVm(name, vm_type, cgroup, guest, vcpus, bus_lock_ratelimit, seed)
    with connect(host) as client:
        vm = client.call("vm.start", request, VmSnapshot)
    if as_json:
        print_json(vm)


@vm_group.command("stop")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@host_option
def stop_command(names: tuple[str, ...], host: Path | None) -> None:
    """Stop VMs; their ASIDs and charges are released. One that fails does not keep the others."""
    errors: list[CommandError] = []
    with connect(host) as client:
        for name in names:
            try:
                client.call("vm.stop", NamedVm(name), VmSnapshot)
            except CommandError as refused:
                errors.append(refused)
    for error in errors[:-1]:
        click.echo(f"kvmsim: {error.message}", err=True)
    if errors:
        raise errors[-1]


@vm_group.command("list")
@host_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_command(host: Path | None, as_json: bool) -> None:
    """List the VMs of a host, oldest first."""
    with connect(host) as client:
        vms = client.call("vm.list", Nothing(), list[VmSnapshot])
    if as_json:
        print_json(vms)
        return
    for line in table([COLUMNS, *(_row(vm) for vm in vms)]):
        click.echo(line)


@vm_group.command("show")
@click.argument("name")
@host_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show_command(name: str, host: Path | None, as_json: bool) -> None:
    """Show one VM with its vCPUs."""
    with connect(host) as client:
        vm = client.call("vm.show", NamedVm(name), VmSnapshot)
    if as_json:
        print_json(vm)
        return
    for key, value in _details(vm):
        click.echo(f"{key:<18} {value}")
    for vcpu in vm.vcpus:
        click.echo(
            f"vcpu {vcpu.id:<13} {vcpu.state}, {vcpu.bus_locks} bus locks,"
            f" throttled {duration(vcpu.throttled_ns)}"
        )


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows as lines with aligned columns."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _row(vm: VmSnapshot) -> tuple[str, ...]:
    asid = "-" if vm.asid is None else str(vm.asid)
    return (
        *(vm.name, vm.type, vm.state, vm.cgroup, str(vm.pid), asid),
        *(str(len(vm.vcpus)), str(vm.bus_locks), duration(vm.uptime_ns)),
    )


def _details(vm: VmSnapshot) -> list[tuple[str, str]]:
    limit = f"{vm.bus_lock_ratelimit}/s" if vm.bus_lock_ratelimit else "off"
    return [
        ("name", vm.name),
        ("type", vm.type),
        ("state", f"{vm.state}: {vm.error}" if vm.error else vm.state),
        ("cgroup", vm.cgroup),
        ("pid", str(vm.pid)),
        ("asid", "none" if vm.asid is None else str(vm.asid)),
        ("guest", vm.guest),
        ("uptime", duration(vm.uptime_ns)),
        ("bus locks", str(vm.bus_locks)),
        ("bus lock exits", str(vm.bus_lock_exits)),
        ("throttled", f"{duration(vm.throttled_ns)} by bus_lock.max"),
        ("ratelimit", f"{limit}, slept {duration(vm.ratelimit_ns)}"),
    ]
