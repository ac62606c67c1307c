from pathlib import Path

import pytest
from selftests.expected import Entry, Expect, ListError, deviation, load, wanted

LIST = Path(__file__).parents[3] / "tools" / "selftests" / "expected.toml"

LISTED = {
    "fast": Entry(Expect.PASS, quick=True),
    "slow": Entry(Expect.PASS),
    "huge": Entry(Expect.OMIT, "fills the memory"),
}


def loaded(tmp_path, text):
    path = tmp_path / "expected.toml"
    path.write_text(text)
    return load(path)


def test_list_of_the_repository_is_sound():
    assert load(LIST)


def test_entry_takes_defaults_for_what_it_does_not_say(tmp_path):
    assert loaded(tmp_path, '[a]\nexpect = "pass"') == {
        "a": Entry(Expect.PASS, why="", quick=False, timeout_s=30, preset="milan509-es99")
    }


def test_skip_keeps_its_reason_and_its_own_timeout(tmp_path):
    text = '[a]\nexpect = "skip"\nwhy = "no AMX"\ntimeout_s = 5'
    assert loaded(tmp_path, text)["a"] == Entry(Expect.SKIP, "no AMX", quick=False, timeout_s=5)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a = 1", "a: not a table"),
        ("[a]", "a: expect is one of pass, skip, fail, omit"),
        ('[a]\nexpect = "maybe"', "a: expect is one of"),
        ('[a]\nexpect = "pass"\ntimeout = 3', "a: unknown key 'timeout'"),
        ('[a]\nexpect = "pass"\nquick = 1', "a: quick is not bool"),
        ('[a]\nexpect = "pass"\ntimeout_s = true', "a: timeout_s is not int"),
        ('[a]\nexpect = "fail"', "a: `why` belongs"),
        ('[a]\nexpect = "pass"\nwhy = "because"', "a: `why` belongs"),
        ('[a]\nexpect = "omit"\nwhy = "huge"\nquick = true', "a: what is omitted"),
        ("[a", "expected.toml: "),
    ],
)
def test_wrong_list_is_refused_by_test_and_key(tmp_path, text, complaint):
    with pytest.raises(ListError, match=complaint):
        loaded(tmp_path, text)


def test_all_that_is_built_runs_but_what_is_omitted():
    assert wanted(["fast", "huge", "new", "slow"], LISTED, quick=False, only=None) == [
        "fast",
        "new",
        "slow",
    ]


def test_quick_run_takes_only_what_is_marked():
    assert wanted(["fast", "huge", "new", "slow"], LISTED, quick=True, only=None) == ["fast"]


def test_test_that_is_asked_for_runs_even_where_it_is_omitted():
    assert wanted(["fast", "huge"], LISTED, quick=False, only=["huge"]) == ["huge"]


def test_test_that_was_not_built_is_refused():
    with pytest.raises(ListError, match="no such selftest: slow"):
        wanted(["fast"], LISTED, quick=False, only=["slow"])


@pytest.mark.parametrize("result", [Expect.PASS, Expect.SKIP, Expect.FAIL])
def test_result_deviates_unless_it_is_the_expected_one(result):
    assert (deviation(Entry(Expect.SKIP, "no AMX"), result, "") == "") is (result is Expect.SKIP)


def test_pass_that_leaves_a_charge_deviates():
    assert deviation(Entry(Expect.PASS), Expect.PASS, "sev 3") == "left behind: sev 3"


def test_omitted_test_that_was_asked_for_cannot_deviate():
    assert deviation(LISTED["huge"], Expect.FAIL, "") == ""
