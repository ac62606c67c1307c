"""``kvmsim presets``."""

import click
import msgspec

from cgfs.cli.frame import print_json
from kvmsim.host import presets


class PresetRow(msgspec.Struct, frozen=True):
    """A preset at a glance."""

    name: str
    vendor: str
    cpus: int
    description: str


@click.command("presets")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def presets_command(as_json: bool) -> None:
    """List the machines that can be emulated; a TOML file of one's own works as well."""
    rows = [
        PresetRow(name, preset.vendor, preset.cpus, preset.description)
        for name in presets.names()
        for preset in [presets.load(name)]
    ]
    if as_json:
        print_json(rows)
        return
    width = max(len(row.name) for row in rows)
    for row in rows:
        click.echo(f"{row.name:<{width}}  {row.description}")
