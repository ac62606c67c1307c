"""``kvmsim info``."""

from pathlib import Path

import click

from cgfs.cli.frame import print_json
from kvmsim.cli.hosts import connect, host_option
from kvmsim.control.messages import HostSnapshot, Nothing


@click.command("info")
@host_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info_command(host: Path | None, as_json: bool) -> None:
    """Show a running host: its machine, what is used of it, who serves it."""
    with connect(host) as client:
        info = client.call("host.info", Nothing(), HostSnapshot)
    if as_json:
        print_json(info)
    else:
        click.echo("".join(f"{name:<17} {value}\n" for name, value in rows(info)), nl=False)


def rows(info: HostSnapshot) -> list[tuple[str, str]]:
    """Names and values for people."""
    used = [
        f"{name} {resource.used}/{resource.capacity}" for name, resource in info.resources.items()
    ]
    return [
        ("directory", info.directory),
        ("preset", f"{info.preset} ({info.description})" if info.description else info.preset),
        ("cpus", f"{info.cpus} ({info.vendor})"),
        ("controllers", " ".join(info.controllers) or "none"),
        ("used", ", ".join(used) or "nothing to count"),
        ("vms", str(info.vms)),
        ("cgroups", str(info.cgroups)),
        ("process tracking", info.process_tracking),
        ("seed", str(info.seed)),
        ("uptime", duration(info.uptime_ns)),
        ("pid", f"{info.pid} (uid {info.uid})"),
        ("socket", info.socket),
        ("log", info.log or "standard error"),
    ]


def duration(ns: int) -> str:
    """``2 h 03 min``, ``4 min 05 s`` or ``1.250 s``."""
    seconds, rest_ns = divmod(ns, 10**9)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    if minutes:
        return f"{minutes} min {seconds:02} s"
    return f"{seconds}.{rest_ns // 10**6:03} s"
