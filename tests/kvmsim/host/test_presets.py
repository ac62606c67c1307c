import pytest

from kvmsim.errors import ConfigError
from kvmsim.host.presets import load, names, parse

GOOD = 'vendor = "amd"\n'
SEV = "[sev]\nmax-asid = 15\nmin-sev-asid = 6\n"


def complaint(text):
    with pytest.raises(ConfigError) as error:
        parse(text, "mine.toml")
    message = str(error.value)
    assert message.startswith("mine.toml: ")
    assert "\n" not in message
    return message.removeprefix("mine.toml: ")


@pytest.mark.parametrize("name", names())
def test_preset_of_the_package_can_be_loaded_and_describes_itself(name):
    assert load(name).description


def test_presets_the_documentation_names_exist():
    expected = {"lab-amd", "naples15", "rome509", "milan509-es99", "genoa1006-es99", "turin1006"}
    assert expected | {"tdx31", "spr-buslock"} <= set(names())


def test_lab_machine_has_10_sev_and_5_sev_es_asids():
    sev = load("lab-amd").sev
    assert (sev.max_asid, sev.min_sev_asid) == (15, 6)


def test_values_not_given_have_defaults():
    preset = parse(GOOD, "mine.toml")
    assert (preset.cpus, preset.bus_lock.exit, preset.sev, preset.misc) == (8, "none", None, {})
    assert preset.quirks.sticky_bus_lock


def test_file_of_ones_own_is_read_by_its_path(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(GOOD + "cpus = 3\n[misc]\nwidgets = 7\n")
    preset = load(str(path))
    assert (preset.cpus, preset.misc) == (3, {"widgets": 7})


def test_unknown_name_lists_what_there_is():
    with pytest.raises(ConfigError, match=r"^nope: no such preset \(there are: .*lab-amd"):
        load("nope")


def test_path_without_a_file_says_why(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.toml: No such file or directory"):
        load(str(tmp_path / "absent.toml"))


def test_file_that_is_not_text_says_so(tmp_path):
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.toml: not UTF-8 text"):
        load(str(path))


def test_file_without_end_is_no_preset():
    with pytest.raises(ConfigError, match=r"/dev/zero: longer than a preset can be"):
        load("/dev/zero")


def test_directory_is_no_preset(tmp_path):
    with pytest.raises(ConfigError, match="Is a directory"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "vendor: missing"),
        ('vendor = "arm"', "vendor: invalid enum value 'arm'"),
        ("vendor = 3", "vendor: expected `str`, got `int`"),
        (GOOD + "colour = 1", "colour: unknown key"),
        (GOOD + "cpus = 0", "cpus: expected `int` >= 1"),
        (GOOD + "cpus = true", "cpus: expected `int`, got `bool`"),
        (GOOD + "tsc-khz = 1.5", "tsc-khz: expected `int`, got `float`"),
        (GOOD + "sev = 1", "sev: expected `object | null`, got `int`"),
        (GOOD + "[sev]\nmax-asid = 5", "sev.min-sev-asid: missing"),
        (GOOD + SEV + "colour = 1", "sev.colour: unknown key"),
        (GOOD + SEV + 'es = "yes"', "sev.es: expected `bool`, got `str`"),
        (GOOD + SEV + "c-bit = 64", "sev.c-bit: expected `int` <= 63"),
        (GOOD + "[sev]\nmax-asid = 15\nmin-sev-asid = 17", "sev.min-sev-asid: 17 is above"),
        (GOOD + "[sev]\nmax-asid = 15\nmin-sev-asid = 0", "sev.min-sev-asid: 0 is broken firmware"),
        (GOOD + SEV + "es = false\nsnp = true", "sev.snp: needs es"),
        (GOOD + "[misc]\nwidgets = 0", "misc.widgets: 0 is not a capacity"),
        (GOOD + "[misc]\nsev = 3", "misc.sev: comes from the hardware"),
        (GOOD + '[misc]\n"a b" = 3', "misc.'a b': not a resource name"),
        (GOOD + '[misc]\nwidgets = "3"', "misc: expected `int`, got `str`"),
        (GOOD + "[quirks]\ncolour = true", "quirks.colour: unknown key"),
        (GOOD + "[faults]\npsp-init = 1", "faults.psp-init: expected `bool`, got `int`"),
        (GOOD + '[bus-lock]\nexit = "trap"', 'bus-lock.exit: "trap" is not how amd reports one'),
        ('vendor = "intel"\n' + SEV, "sev: an Intel machine has no SEV"),
        (GOOD + "[tdx]\nkeys = 3", "tdx: an AMD machine has no TDX"),
        (GOOD + "[pmu]", "pmu, rtm: only of Intel machines here"),
        (GOOD + "rtm = true", "pmu, rtm: only of Intel machines here"),
        ('vendor = "intel"\n[pmu]\nversion = 6', "pmu.version: expected `int` <= 5"),
        ('vendor = "intel"\n[pmu]\nlbr-format = 63', "pmu.lbr-format: expected `int` <= 62"),
        ('vendor = "intel"\n[kernel]\nhz = 7', "kernel.hz: invalid enum value 7"),
        ("vendor", "Expected '=' after a key in a key/value pair (at end of document)"),
        ('vendor = "amd"\nvendor = "amd"', "Cannot overwrite a value"),
    ],
)
def test_mistake_is_one_line_naming_file_and_key(text, expected):
    assert complaint(text).startswith(expected)
