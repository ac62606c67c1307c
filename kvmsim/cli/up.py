"""``kvmsim up DIR``, and the helper behind ``mount -t fuse.kvmsim PRESET DIR``."""

import os
import secrets
from pathlib import Path

import click
import msgspec

from cgfs.cli.helper import is_generic, parse_helper_call
from cgfs.cli.mount_options import CONTROLLERS
from cgfs.control.errors import CommandError
from cgfs.control.launch import Launch, launch
from kvmsim.cli.hosts import KIND
from kvmsim.control.explain import explain
from kvmsim.errors import ConfigError
from kvmsim.host import presets

DEFAULT_PRESET = "milan509-es99"
SEED_BITS = 32


@click.command("up")
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@click.option(
    "--preset",
    default=DEFAULT_PRESET,
    show_default=True,
    metavar="P",
    help="A name from 'kvmsim presets', or a TOML file.",
)
@click.option(
    "--controllers",
    metavar="LIST",
    help=f"cgroup controllers of its kernel, by commas; without it {','.join(CONTROLLERS)}.",
)
@click.option("--seed", type=click.IntRange(0), help="Same seed, same chance of the guests.")
@click.option(
    "--split-lock-detect",
    metavar="MODE",
    help="Its kernel's option: off, warn, fatal or ratelimit:N; without it the preset's.",
)
@click.option("--foreground", is_flag=True, help="Stay, and log to standard error.")
@click.option(
    "--allow-other",
    is_flag=True,
    help="Let other users in, as modes and owners allow; for root, or with user_allow_other.",
)
def up_command(
    directory: Path,
    preset: str,
    controllers: str | None,
    seed: int | None,
    split_lock_detect: str | None,
    foreground: bool,
    allow_other: bool,
) -> None:
    """Start an emulated host and mount it on DIR.

    Returns once it is mounted. A missing DIR is created, and removed with the host.
    """
    start_host(
        directory,
        preset,
        _controllers(controllers),
        seed,
        split_lock_detect=split_lock_detect,
        foreground=foreground,
        allow_other=allow_other,
    )


@click.command("mount-helper", context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def helper_command(arguments: tuple[str, ...]) -> None:
    """Take the arguments of a mount(8) helper: PRESET DIR [-o OPTIONS]."""
    call = parse_helper_call(arguments)
    preset, controllers, seed, split_lock_detect = call.source, None, None, None
    allow_other = os.geteuid() == 0
    for option in call.options:
        key, _, value = option.partition("=")
        if key == "preset":
            preset = value
        elif key == "controllers":
            controllers = value.replace(":", ",")
        elif key == "seed" and value.isdecimal():
            seed = int(value)
        elif key == "split_lock_detect":
            split_lock_detect = value
        elif option == "allow_other":
            allow_other = True
        elif not is_generic(option):
            raise CommandError(f"mount options: unknown option {option!r}", os.EX_USAGE)
    start_host(
        Path(call.directory),
        preset,
        _controllers(controllers),
        seed,
        split_lock_detect=split_lock_detect,
        source=call.source,
        allow_other=allow_other,
        fake=call.fake,
    )


def start_host(
    directory: Path,
    preset: str,
    controllers: tuple[str, ...],
    seed: int | None,
    *,
    split_lock_detect: str | None = None,
    source: str = "",
    foreground: bool = False,
    allow_other: bool = False,
    fake: bool = False,
) -> None:
    """Starts a host; see ``up_command``.

    Args:
        directory: where to mount it.
        preset: a name or a file.
        controllers: of its kernel.
        seed: chance of its guests; None picks one.
        split_lock_detect: option of its kernel; None: the preset's.
        source: what /proc/mounts shows as the device; the preset's name without it.
        foreground: stay in this process.
        allow_other: let other users in.
        fake: check the arguments, start nothing.

    Raises:
        CommandError: it cannot be started; nothing is left behind.
    """
    try:
        machine = presets.load(preset)
    except ConfigError as error:
        raise explain(error) or error from error
    if split_lock_detect is not None:
        kernel = msgspec.structs.replace(machine.kernel, split_lock_detect=split_lock_detect)
        machine = msgspec.structs.replace(machine, kernel=kernel)
    if fake:
        return
    name = preset if "/" not in preset else str(Path(preset).resolve())
    seed = secrets.randbits(SEED_BITS) if seed is None else seed

    def serve(launched: Launch) -> None:
        # Only the process that serves loads trio and pyfuse3.
        from kvmsim.builder.serve import HostOptions, serve_host  # noqa: PLC0415

        options = HostOptions(name, machine, controllers, seed, source or name, allow_other or None)
        serve_host(options, launched)

    launch(KIND, directory, serve, foreground=foreground)


def _controllers(text: str | None) -> tuple[str, ...]:
    """The chosen controllers in the kernel's order; all without a choice."""
    if text is None:
        return CONTROLLERS
    chosen = {name for name in text.replace(" ", ",").split(",") if name}
    if unknown := chosen - set(CONTROLLERS):
        known = ", ".join(CONTROLLERS)
        raise CommandError(f"no controller {min(unknown)!r} (there are: {known})", os.EX_USAGE)
    return tuple(name for name in CONTROLLERS if name in chosen)
