import os

import pytest

from cgfs.cli.helper import HelperCall, is_helper_call, parse_helper_call, split_options
from cgfs.cli.mount_options import MountOptions, parse_options
from cgfs.control.errors import CommandError

SUBCOMMANDS = {"mount", "tree"}


def test_no_options_is_v2_with_every_controller():
    assert parse_options([]) == MountOptions(2, ("encryption_ids", "misc", "bus_lock"))


def test_v1_with_one_controller():
    options = parse_options(["v1", "encryption_ids"])
    assert (options.version, options.controllers) == (1, ("encryption_ids",))


def test_controllers_are_kept_in_the_order_of_the_kernel():
    assert parse_options(["bus_lock", "misc"]).controllers == ("misc", "bus_lock")


def test_capacities_by_resource():
    assert parse_options(["misc", "sev=10", "sev_es=5"]).capacities == {"sev": 10, "sev_es": 5}


def test_largest_capacity():
    assert parse_options(["sev=4294967295"]).capacities == {"sev": 2**32 - 1}


def test_v1_flags():
    options = parse_options(["v1", "name=jobs", "clone_children", "release_agent=/bin/r"])
    assert (options.name, options.clone_children, options.release_agent) == ("jobs", True, "/bin/r")
    assert options.controllers == ()


def test_options_of_fstab_and_systemd_are_passed_over():
    words = ["rw", "nosuid", "noauto", "_netdev", "x-systemd.automount", "nofail", "user"]
    assert parse_options(words) == MountOptions()


@pytest.mark.parametrize(
    "words",
    [
        ["cpu"],
        ["sev=many"],
        ["sev=-1"],
        ["sev=4294967296"],
        ["sev=" + "9" * 5000],
        ["sev=\N{ARABIC-INDIC DIGIT THREE}"],
        ["=3"],
        ["all", "misc"],
        ["none", "misc"],
        ["v1", "none"],
        ["name=a/b", "v1"],
        ["name=" + "a" * 64, "v1"],
        ["name=jobs"],
        ["clone_children"],
        ["ro"],
    ],
)
def test_option_that_is_unknown_or_does_not_fit_is_a_usage_error(words):
    with pytest.raises(CommandError, match="mount options") as caught:
        parse_options(words)
    assert caught.value.exit_code == os.EX_USAGE


def test_call_by_libfuse_has_source_and_directory_first():
    call = parse_helper_call(["lab", "/mnt", "-o", "rw,misc,sev=2"])
    assert call == HelperCall("lab", "/mnt", ["rw", "misc", "sev=2"])


def test_call_by_util_linux_has_flags_and_a_type():
    call = parse_helper_call(["lab", "/mnt", "-sv", "-o", "rw", "-t", "fuse.cgfs"])
    assert call == HelperCall("lab", "/mnt", ["rw"])


def test_fake_mount_is_noticed():
    assert parse_helper_call(["lab", "/mnt", "-f"]).fake


@pytest.mark.parametrize("arguments", [[], ["lab"], ["lab", "/mnt", "more"]])
def test_other_number_of_places_is_a_usage_error(arguments):
    with pytest.raises(CommandError) as caught:
        parse_helper_call(arguments)
    assert caught.value.exit_code == os.EX_USAGE


@pytest.mark.parametrize(
    ("program", "arguments", "expected"),
    [
        ("cgfs", ["lab", "/mnt", "-o", "rw"], True),
        ("cgfs", ["lab", "/mnt"], False),
        ("cgfs", ["tre", "/mnt", "--json"], False),
        ("cgfs", ["mount", "/mnt", "-o", "rw"], False),
        ("mount.fuse.cgfs", ["mount", "/mnt"], True),
        ("cgfs", ["--help", "x"], False),
        ("cgfs", ["nonsense"], False),
        ("cgfs", [], False),
        ("cgfs", ["nonsense", "--json"], False),
    ],
)
def test_helper_call_is_told_from_a_subcommand(program, arguments, expected):
    assert is_helper_call(program, arguments, SUBCOMMANDS) is expected


def test_escaped_comma_is_part_of_an_option():
    assert split_options(r"a,release_agent=/x\,y,,b\c") == ["a", "release_agent=/x,y", r"b\c"]
