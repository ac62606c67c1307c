"""Last-branch hardware by model, and who of the host has it."""

import pytest

from kvmsim.host.kernel_log import KernelLog
from kvmsim.host.lbr import LbrFacility, hardware_of
from kvmsim.host.presets import load, parse


def found(model, more="", vendor="intel", family=6):
    toml = f'vendor = "{vendor}"\nfamily = {family}\nmodel = {model}\n{more}'
    return hardware_of(parse(toml, "test.toml"))


@pytest.mark.parametrize(
    ("model", "depth", "base", "info", "call_stack"),
    [
        (23, 4, 0x40, 0, False),  # Penryn
        (28, 8, 0x40, 0, False),  # Bonnell
        (77, 8, 0x40, 0, False),  # Silvermont
        (26, 16, 0x680, 0, False),  # Nehalem
        (62, 16, 0x680, 0, False),  # Ivy Bridge
        (63, 16, 0x680, 0, True),  # Haswell
        (87, 8, 0x680, 0, False),  # Knights Landing
        (95, 32, 0x680, 0xDC0, True),  # Goldmont
        (85, 32, 0x680, 0xDC0, True),  # Skylake
        (106, 32, 0x680, 0xDC0, True),  # Ice Lake
    ],
)
def test_records_follow_from_the_model(model, depth, base, info, call_stack):
    hardware = found(model)
    assert (hardware.depth, hardware.from_base, hardware.info_base) == (depth, base, info)
    assert hardware.to_base == base + (0x20 if base == 0x40 else 0x40)
    assert hardware.call_stack == call_stack


@pytest.mark.parametrize(
    "hardware",
    [found(143), found(151), found(106, vendor="amd"), found(106, family=15)],
)
def test_who_has_none(hardware):
    assert hardware is None


def test_a_preset_may_name_the_format():
    assert found(106, "[pmu]\nlbr-format = 7\n").format == 7


@pytest.mark.parametrize(
    ("name", "has"), [("icelake-lbr", True), ("lab-intel", True), ("spr-buslock", False)]
)
def test_presets(name, has):
    assert (hardware_of(load(name)) is not None) == has


def test_each_time_somebody_takes_it_counts():
    facility = LbrFacility(KernelLog())
    facility.take()
    facility.take()
    facility.release()
    facility.release()
    facility.take()
    assert (facility.taken, facility.takeovers) == (True, 2)
