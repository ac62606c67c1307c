"""encryption_ids: formats, write table and vectors (spec A)."""

import pytest


@pytest.fixture
def tree(shell, roots):
    """The tree of spec A.13: root -> A -> {B, C}; capacity sev 4."""
    shell.echo("+encryption_ids", "/cgroup.subtree_control")
    for path in ("/A", "/A/B", "/A/C"):
        shell.mkdir(path)
    shell.echo("+encryption_ids", "/A/cgroup.subtree_control")
    return shell


@pytest.fixture
def charge(roots, tree):
    def charge(path, type="sev"):
        css = roots.v2.find(path).css["encryption_ids"]
        css.try_charge(type)
        return css

    return charge


@pytest.mark.parametrize("type", ["sev", "sev_es"])
def test_files_exist_for_every_type_whatever_its_capacity(tree, type):
    assert tree.exists(f"/encryption_ids.{type}.stat")
    assert not tree.exists(f"/encryption_ids.{type}.max")
    assert not tree.exists(f"/A/encryption_ids.{type}.stat")
    assert tree.cat(f"/A/encryption_ids.{type}.max") == "max\n"
    assert tree.cat(f"/A/encryption_ids.{type}.current") == "0\n"


def test_stat_is_two_lines(tree):
    assert tree.cat("/encryption_ids.sev.stat") == "total 4\nused 0\n"
    assert tree.cat("/encryption_ids.sev_es.stat") == "total 0\nused 0\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("max", "max\n"),
        ("max\n", "max\n"),
        (" max\t", "max\n"),
        ("0", "0\n"),
        ("5\n\n", "5\n"),
        (" 5 ", "5\n"),
        ("\xa05", "5\n"),
        ("0x10", "16\n"),
        ("4294967295", "max\n"),
        ("037777777777", "max\n"),
        ("5\0junk", "5\n"),
    ],
)
def test_max_write_accepts(tree, text, shown):
    tree.echo(text, "/A/encryption_ids.sev.max")
    assert tree.cat("/A/encryption_ids.sev.max") == shown


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("4294967296", "ERANGE"),
        ("99999999999999999999999", "ERANGE"),
        ("4294967296x", "EINVAL"),
        ("-1", "EINVAL"),
        ("MAX", "EINVAL"),
        ("max0", "EINVAL"),
        ("\n", "EINVAL"),
        ("\0", "EINVAL"),
        ("5k", "EINVAL"),
        ("5\n6", "EINVAL"),
    ],
)
def test_max_write_refuses_and_keeps_the_old_value(tree, fails_with, text, name):
    tree.echo("3", "/A/encryption_ids.sev.max")
    with fails_with(name):
        tree.echo(text, "/A/encryption_ids.sev.max")
    assert tree.cat("/A/encryption_ids.sev.max") == "3\n"


def test_vectors_of_a13(tree, roots, charge, processes, fails_with):
    def state():
        current = [tree.cat(f"{p}/encryption_ids.sev.current") for p in ("/A", "/A/B", "/A/C")]
        used = tree.cat("/encryption_ids.sev.stat").split()[3]
        return [*(int(text) for text in current), int(used)]

    vm1 = charge("/A/B")
    assert state() == [1, 1, 0, 1]
    tree.echo("2", "/A/encryption_ids.sev.max")
    vm2 = charge("/A/C")
    assert state() == [2, 1, 1, 2]
    with fails_with("EBUSY") as caught:
        charge("/A/B")
    assert caught.value.cgroup == "/A"
    assert state() == [2, 1, 1, 2]
    charge("/")
    assert state() == [2, 1, 1, 3]
    tree.echo("1", "/A/encryption_ids.sev.max")
    vm2.uncharge("sev")
    with fails_with("EBUSY"):
        charge("/A/C")
    assert state() == [1, 1, 0, 2]
    tree.echo("max", "/A/encryption_ids.sev.max")
    tree.rmdir("/A/B")
    tree.mkdir("/A/B")
    assert state() == [1, 0, 0, 2]
    charge("/A/B")
    charge("/A/B")
    assert state() == [3, 2, 0, 4]
    with fails_with("EBUSY") as caught:
        charge("/A/C")
    assert str(caught.value) == 'cgroup / is at encryption_ids.sev.stat "total 4"'
    vm1.uncharge("sev")
    assert state() == [2, 2, 0, 3]
    with fails_with("EBUSY"):
        roots.controller("encryption_ids").set_capacity("sev", 2)
    with fails_with("EINVAL"):
        charge("/A", "sev_es")
    assert state() == [2, 2, 0, 3]


def test_refused_charge_generates_no_event(tree, charge, recorder, fails_with):
    tree.echo("0", "/A/encryption_ids.sev.max")
    with fails_with("EBUSY"):
        charge("/A/B")
    assert recorder.of("modified") == []


def test_disable_hides_the_charge_and_enable_starts_afresh(tree, charge):
    css = charge("/A/B")
    tree.echo("5", "/A/B/encryption_ids.sev.max")
    tree.echo("-encryption_ids", "/A/cgroup.subtree_control")
    assert not tree.exists("/A/B/encryption_ids.sev.max")
    tree.echo("+encryption_ids", "/A/cgroup.subtree_control")
    assert tree.cat("/A/B/encryption_ids.sev.max") == "max\n"
    assert tree.cat("/A/B/encryption_ids.sev.current") == "0\n"
    assert tree.cat("/A/encryption_ids.sev.current") == "1\n"
    css.uncharge("sev")
    assert tree.cat("/A/encryption_ids.sev.current") == "0\n"


def test_effective_cgroup_is_the_nearest_that_has_the_controller(tree, roots, processes):
    tree.mkdir("/A/B/deep")
    tree.echo(f"{processes.start(100)}", "/A/B/deep/cgroup.procs")
    assert roots.css_of(100, "encryption_ids").cgrp.path == "/A/B"


def test_moving_the_process_leaves_the_charge(tree, roots, processes):
    tree.echo(f"{processes.start(100)}", "/A/B/cgroup.procs")
    roots.css_of(100, "encryption_ids").try_charge("sev")
    tree.echo("100", "/A/C/cgroup.procs")
    assert tree.cat("/A/B/encryption_ids.sev.current") == "1\n"
    assert tree.cat("/A/C/encryption_ids.sev.current") == "0\n"


def test_bad_type_is_einval(charge, fails_with):
    with fails_with("EINVAL"):
        charge("/A", "tdx")
