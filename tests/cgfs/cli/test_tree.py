import json

import pytest
from click.testing import CliRunner

from cgfs.cli.tree import drawn, parse_value, read_group, summary, tree_command
from cgfs.control.errors import CommandError


@pytest.fixture
def root(tmp_path):
    """A directory with the files of a small tree."""
    tenant = tmp_path / "tenant"
    tenant.mkdir()
    texts = {
        "cgroup.procs": "1\n2\n",
        "cgroup.controllers": "misc\n",
        "misc.capacity": "sev 10\nsev_es 5\n",
        "misc.current": "sev 1\nsev_es 0\n",
        "tenant/cgroup.procs": "77\n",
        "tenant/cgroup.events": "populated 1\nfrozen 1\n",
        "tenant/cgroup.type": "domain\n",
        "tenant/cgroup.max.depth": "max\n",
        "tenant/misc.max": "sev 2\nsev_es max\n",
        "tenant/misc.current": "sev 1\nsev_es 0\n",
        "tenant/encryption_ids.sev.max": "max\n",
        "tenant/encryption_ids.sev.current": "1\n",
        "tenant/bus_lock.max": "100 1000000\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_group_has_members_state_and_the_values_of_its_controllers(root):
    tenant = read_group(root, "/").children[0]
    assert (tenant.path, tenant.procs, tenant.frozen) == ("/tenant", [77], True)
    assert tenant.files == {
        "bus_lock.max": "100 1000000",
        "encryption_ids.sev.current": "1",
        "encryption_ids.sev.max": "max",
        "misc.current": {"sev": "1", "sev_es": "0"},
        "misc.max": {"sev": "2", "sev_es": "max"},
    }


def test_line_of_a_group_shows_use_against_limits_and_leaves_out_the_rest(root):
    assert summary(read_group(root, "/").children[0]) == (
        "  1 process  frozen  encryption_ids.sev 1  misc.sev 1/2  bus_lock at most 100 per 1 s"
    )


def test_root_shows_use_against_capacity(root):
    assert "misc.sev 1/10  misc.sev_es 0/5" in summary(read_group(root, "/"))


def test_drawing_has_a_branch_per_child(root):
    tree = drawn(read_group(root, "/"))
    assert "tenant" in str(tree.children[0].label)


def test_json_is_the_same_tree(root):
    result = CliRunner().invoke(tree_command, [str(root), "--json"])
    assert json.loads(result.stdout)["children"][0]["path"] == "/tenant"


def test_host_directory_is_searched_for_its_tree(root, tmp_path_factory):
    host = tmp_path_factory.mktemp("host")
    (host / "sys/fs").mkdir(parents=True)
    (host / "sys/fs/cgroup").symlink_to(root)
    result = CliRunner().invoke(tree_command, [str(host)])
    assert "tenant" in result.stdout


def test_other_directory_is_refused(tmp_path):
    result = CliRunner().invoke(tree_command, [str(tmp_path)])
    assert isinstance(result.exception, CommandError)
    assert "not a cgroup tree" in str(result.exception)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("sev 2\nsev_es max\n", {"sev": "2", "sev_es": "max"}),
        ("100 1000000\n", "100 1000000"),
        ("max 1000000\n", "max 1000000"),
        ("max\n", "max"),
        ("7\n", "7"),
        ("", ""),
    ],
)
def test_value_of_several_keys_is_a_mapping(text, value):
    assert parse_value(text) == value
