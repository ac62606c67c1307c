import pytest

from kvmsim.host.machine import Machine
from kvmsim.host.presets import load, names, parse
from kvmsim.host.sev_setup import set_up
from kvmsim.host.sysfiles import cpu_flags, cpuinfo


def host(ecx, edx, more=""):
    return f'vendor = "amd"\n[sev]\nmax-asid = {ecx}\nmin-sev-asid = {edx}\n{more}'


PARAMETERS_OFF = "[kvm-amd]\nsev_es = false\n"
PSP_FAILED = "[faults]\npsp-init = true\n"
DISABLED = "SEV disabled (ASIDs 0 - 0)"


@pytest.mark.parametrize(
    ("toml", "sev", "sev_es", "capacities", "log"),
    [
        ('vendor = "amd"\n', False, False, {}, DISABLED),
        (host(0, 1), False, False, {}, DISABLED),
        (host(15, 6, "nested-paging = false\n"), False, False, {}, DISABLED),
        (host(15, 6, "next-rip = false\n"), False, False, {}, DISABLED),
        (host(15, 6, "decode-assists = false\n"), False, False, {}, DISABLED),
        (host(15, 6, "flush-by-asid = false\n"), False, False, {}, DISABLED),
        (host(15, 6, "[kvm-amd]\nsev = false\n"), False, False, {}, DISABLED),
        (host(15, 6, PSP_FAILED), False, False, {"sev": 10, "sev_es": 5}, "SEV disabled (ASIDs 6"),
        (
            host(509, 100),
            True,
            True,
            {"sev": 410, "sev_es": 99},
            "SEV enabled (ASIDs 100 - 509)|SEV-ES enabled (ASIDs 1 - 99)",
        ),
        (
            host(509, 1),
            True,
            False,
            {"sev": 509},
            "SEV enabled (ASIDs 1 - 509)|SEV-ES disabled (ASIDs 0 - 0)",
        ),
        (
            host(1006, 1007),
            True,
            True,
            {"sev_es": 1006},
            "SEV unusable (ASIDs 1007 - 1006)|SEV-ES enabled (ASIDs 1 - 1006)",
        ),
        (host(15, 6, PARAMETERS_OFF), True, False, {"sev": 10}, "SEV enabled|SEV-ES disabled"),
        (host(15, 6, "es = false\n"), True, False, {"sev": 10}, "SEV enabled (ASIDs 6 - 15)"),
        (host(15, 6, "lbr-virtualization = false\n"), True, False, {"sev": 10}, "SEV enabled"),
    ],
)
def test_module_state_follows_the_hardware(accounting, toml, sev, sev_es, capacities, log):
    machine = Machine(parse(toml, "t"), None, accounting)
    parameters = machine.parameters
    assert parameters["kvm_amd/parameters/sev"] == ("Y\n" if sev else "N\n")
    assert parameters["kvm_amd/parameters/sev_es"] == ("Y\n" if sev_es else "N\n")
    assert parameters["kvm_amd/parameters/avic"] == "N\n"
    assert machine.capacities == capacities
    assert all(
        line.startswith(part) for line, part in zip(machine.log, log.split("|"), strict=False)
    )


def test_failed_platform_withdraws_the_capacities_without_the_quirk():
    toml = host(15, 6, PSP_FAILED + "[quirks]\npsp_fail_keeps_capacity = false\n")
    sev = set_up(parse(toml, "t"))
    assert (sev.sev, sev.sev_capacity, sev.sev_es_capacity) == (False, 0, 0)


@pytest.mark.parametrize(
    ("more", "snp"),
    [
        ("snp = true\n", True),
        ("", False),
        ("snp = true\n[kvm-amd]\nsev_snp = false\n", False),
        ("snp = true\n[kvm-amd]\nsev_es = false\n", False),
    ],
)
def test_snp_needs_sev_es_and_the_platform(more, snp):
    assert set_up(parse(host(15, 6, more), "t")).sev_snp == snp


def test_capacities_are_registered_sev_first_then_extras(accounting):
    toml = host(15, 6, "[misc]\nwidgets = 3\n")
    assert list(Machine(parse(toml, "t"), None, accounting).capacities) == [
        "sev",
        "sev_es",
        "widgets",
    ]


def test_tdx_keys_are_a_counted_resource(accounting):
    assert Machine(load("tdx31"), None, accounting).capacities == {"tdx": 31}


@pytest.mark.parametrize("name", names())
def test_parameters_of_a_preset_are_single_lines(accounting, name):
    machine = Machine(load(name), None, accounting)
    assert all(text.count("\n") == 1 for text in machine.parameters.values())
    vendor = machine.preset.vendor
    assert f"kvm_{vendor}/parameters/nested" in machine.parameters


def test_cpuinfo_has_one_paragraph_per_cpu():
    text = cpuinfo(load("lab-amd"))
    assert text.count("processor\t:") == 8
    assert text.endswith("\n\n")
    assert "vendor_id\t: AuthenticAMD\ncpu family\t: 26\n" in text
    assert "cpu MHz\t\t: 2000.000\n" in text
    assert "bogomips\t: 4000.00\n" in text


@pytest.mark.parametrize(
    ("name", "present", "absent"),
    [
        ("lab-amd", {"svm", "sev", "sev_es", "bus_lock_detect"}, {"vmx", "sev_snp"}),
        ("milan509-es99", {"sev_snp"}, {"bus_lock_detect"}),
        ("spr-buslock", {"vmx", "bus_lock_detect", "split_lock_detect"}, {"svm", "sev"}),
        ("tdx31", {"tdx_host_platform"}, set()),
    ],
)
def test_flags_show_the_features_of_the_preset(name, present, absent):
    flags = set(cpu_flags(load(name)))
    assert present <= flags
    assert not absent & flags


def test_machine_without_sev_table_has_no_sev_flags():
    assert not {"sev", "sme", "sev_es"} & set(cpu_flags(parse('vendor = "amd"\n', "t")))


def test_stall_of_a_bus_lock_is_its_cycles_at_the_tsc_rate(accounting):
    assert Machine(load("spr-buslock"), None, accounting).bus_lock_stall_ns == 3500


def test_cpuinfo_is_made_once(accounting):
    machine = Machine(load("lab-amd"), None, accounting)
    assert machine.cpuinfo is machine.cpuinfo
