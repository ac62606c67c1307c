"""misc: formats, write table and vectors (spec B)."""

import pytest


@pytest.fixture
def tree(shell, roots):
    """The tree of spec B.9: root -> A -> {B, C}; root -> E; capacity sev 2."""
    roots.controller("misc").set_capacity("sev", 2)
    shell.echo("+misc", "/cgroup.subtree_control")
    for path in ("/A", "/A/B", "/A/C", "/E"):
        shell.mkdir(path)
    shell.echo("+misc", "/A/cgroup.subtree_control")
    return shell


@pytest.fixture
def charge(roots, tree):
    def charge(path, amount=1, resource="sev"):
        css = roots.v2.find(path).css["misc"]
        css.try_charge(resource, amount)
        return css

    return charge


def test_root_and_others_have_their_files(tree):
    names = ("capacity", "max", "current", "peak", "events", "events.local")
    assert [tree.exists(f"/misc.{n}") for n in names] == [True, False, True, True, False, False]
    assert [tree.exists(f"/A/misc.{n}") for n in names] == [False, True, True, True, True, True]


def test_fresh_files(tree):
    assert tree.cat("/misc.capacity") == "sev 2\n"
    assert tree.cat("/A/misc.max") == "sev max\n"
    assert tree.cat("/A/misc.current") == "sev 0\n"
    assert tree.cat("/A/misc.peak") == "sev 0\n"
    assert tree.cat("/A/misc.events") == "sev.max 0\n"
    assert tree.cat("/A/misc.events.local") == "sev.max 0\n"


def test_lost_capacity_hides_what_nobody_holds(tree, roots, charge):
    charge("/A")
    roots.controller("misc").set_capacity("sev", 0)
    assert tree.cat("/misc.capacity") == ""
    assert tree.cat("/A/misc.max") == ""
    assert tree.cat("/A/misc.current") == "sev 1\n"
    assert tree.cat("/A/misc.peak") == "sev 1\n"
    assert tree.cat("/A/misc.events") == ""


def test_capacity_may_fall_below_usage(roots, charge, fails_with):
    css = charge("/E", 2)
    roots.controller("misc").set_capacity("sev", 1)
    with fails_with("EBUSY"):
        charge("/E")
    css.uncharge("sev", 2)
    charge("/E")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("sev 5", "sev 5\n"),
        ("sev 5\n", "sev 5\n"),
        (" sev 5 ", "sev 5\n"),
        ("sev max", "sev max\n"),
        ("sev 18446744073709551615", "sev max\n"),
        ("sev +7", "sev 7\n"),
        ("sev 0x10", "sev 16\n"),
        ("sev 010", "sev 8\n"),
        ("sev 5\0x", "sev 5\n"),
    ],
)
def test_max_write_accepts(tree, text, shown):
    tree.echo(text, "/A/misc.max")
    assert tree.cat("/A/misc.max") == shown


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("sev  5", "EINVAL"),
        ("sev  max", "EINVAL"),
        ("sev\t5", "EINVAL"),
        ("sev", "EINVAL"),
        ("sev ", "EINVAL"),
        ("5", "EINVAL"),
        ("max", "EINVAL"),
        ("\n", "EINVAL"),
        ("SEV 5", "EINVAL"),
        ("bogus 5", "EINVAL"),
        ("sev=5", "EINVAL"),
        ("sev: 5", "EINVAL"),
        ("sev -1", "EINVAL"),
        ("sev MAX", "EINVAL"),
        ("sev 5k", "EINVAL"),
        ("sev 18446744073709551616", "ERANGE"),
        ("sev 5 sev_es 3", "EINVAL"),
        ("sev 5\nsev_es 3", "EINVAL"),
        ("tdx 3", "EINVAL"),
        ("tdx max", "EINVAL"),
        ("tdx 99999999999999999999999", "ERANGE"),
    ],
)
def test_max_write_refuses_and_keeps_the_old_value(tree, fails_with, text, name):
    tree.echo("sev 1", "/A/misc.max")
    with fails_with(name):
        tree.echo(text, "/A/misc.max")
    assert tree.cat("/A/misc.max") == "sev 1\n"


def test_limits_of_resources_are_apart(tree, roots):
    roots.controller("misc").set_capacity("sev_es", 3)
    tree.echo("sev 1", "/A/misc.max")
    tree.echo("sev_es 2", "/A/misc.max")
    assert tree.cat("/A/misc.max") == "sev 1\nsev_es 2\n"


def test_vectors_of_b9(tree, charge, fails_with):
    def state(path):
        values = [tree.cat(f"{path}/misc.{f}").split()[1] for f in ("current", "peak")]
        if path:
            files = ("events", "events.local")
            values += [tree.cat(f"{path}/misc.{f}").split()[1] for f in files]
        return "/".join(values)

    def states():
        return [state(path) for path in ("/A/B", "/A", "", "/E")]

    tree.echo("+misc", "/A/cgroup.subtree_control")
    charge("/A/B")
    assert states() == ["1/1/0/0", "1/1/0/0", "1/1", "0/0/0/0"]
    tree.echo("sev 1", "/A/misc.max")
    with fails_with("EBUSY"):
        charge("/A/B")
    assert states() == ["1/2/0/0", "1/1/1/1", "1/1", "0/0/0/0"]
    tree.echo("sev 0", "/A/B/misc.max")
    with fails_with("EBUSY"):
        charge("/A/B")
    assert states() == ["1/2/1/1", "1/1/2/1", "1/1", "0/0/0/0"]
    charge("/E")
    assert states() == ["1/2/1/1", "1/1/2/1", "2/2", "1/1/0/0"]
    with fails_with("EBUSY"):
        charge("/E")
    assert states() == ["1/2/1/1", "1/1/2/1", "2/2", "1/2/0/0"]
    with fails_with("EBUSY"):
        charge("/E", 2)
    assert states() == ["1/2/1/1", "1/1/2/1", "2/2", "1/2/1/1"]
    with fails_with("EINVAL"):
        charge("/E", 1, "sev_es")
    assert states() == ["1/2/1/1", "1/1/2/1", "2/2", "1/2/1/1"]


def test_refusal_notifies_the_refusing_cgroup_and_above(tree, charge, recorder, fails_with):
    tree.echo("sev 0", "/A/misc.max")
    with fails_with("EBUSY"):
        charge("/A/B")
    assert recorder.of("modified") == [("/A", "misc.events.local"), ("/A", "misc.events")]


def test_refusal_names_cgroup_file_and_value(tree, charge, fails_with):
    tree.echo("sev 1", "/A/misc.max")
    charge("/A/B")
    with fails_with("EBUSY") as caught:
        charge("/A/B")
    assert str(caught.value) == 'cgroup /A is at misc.max "sev 1"'


def test_refusal_for_want_of_capacity_names_the_root(charge, fails_with):
    charge("/A/B")
    charge("/E")
    with fails_with("EBUSY") as caught:
        charge("/E")
    assert str(caught.value) == 'cgroup / is at misc.capacity "sev 2"'


def test_charge_of_nothing_is_recorded_nowhere(tree, charge):
    charge("/A/B", 0)
    assert tree.cat("/misc.peak") == "sev 0\n"


def test_charge_outlives_its_directory(tree, roots, charge):
    css = charge("/A/B")
    tree.rmdir("/A/B")
    tree.mkdir("/A/B")
    assert tree.cat("/A/B/misc.current") == "sev 0\n"
    assert tree.cat("/A/misc.current") == "sev 1\n"
    css.uncharge("sev")
    assert tree.cat("/misc.current") == "sev 0\n"


def test_uncharging_below_zero_is_loud(charge):
    css = charge("/A/B")
    css.uncharge("sev")
    with pytest.raises(AssertionError, match="below zero"):
        css.uncharge("sev")


def test_resource_of_a_preset_prints_last(tree, roots):
    misc = roots.controller("misc")
    misc.add_resource("sgx_epc")
    misc.set_capacity("sgx_epc", 7)
    assert tree.cat("/misc.capacity") == "sev 2\nsgx_epc 7\n"


def test_new_capacity_changes_max_everywhere(tree, roots, recorder):
    roots.controller("misc").set_capacity("tdx", 31)
    assert recorder.of("changed") == [
        ("/", "misc.capacity"),
        ("/A", "misc.max"),
        ("/A/B", "misc.max"),
        ("/A/C", "misc.max"),
        ("/E", "misc.max"),
    ]


def test_capacity_of_an_unknown_resource_is_einval(roots, fails_with):
    with fails_with("EINVAL"):
        roots.controller("misc").set_capacity("bogus", 1)
