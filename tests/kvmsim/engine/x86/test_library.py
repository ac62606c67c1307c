"""Functions and slots of a loaded library."""

import ctypes

import pytest

from kvmsim.engine.x86 import backend
from kvmsim.engine.x86.library import Library


@pytest.fixture(scope="module")
def cdll():
    return backend.load()


@pytest.fixture(scope="module")
def library(cdll):
    return Library(cdll, "uc_version")


@pytest.mark.parametrize("name", ["uc_emu_start", "uc_close", "uc_reg_read"])
def test_symbol_is_where_the_loader_says(cdll, library, name):
    assert library.symbol(name) == ctypes.cast(getattr(cdll, name), ctypes.c_void_p).value


def test_symbol_whose_name_ends_a_longer_one_is_found(library):
    short, long = "check_exit_request_x86_64", "helper_check_exit_request_x86_64"
    assert library.symbol(short) != library.symbol(long)


def test_symbol_that_is_not_there_is_told(library):
    with pytest.raises(LookupError):
        library.symbol("uc_no_such_function")


def test_slot_holds_the_address_of_a_function_or_of_its_stub(library):
    slot = library.slot("cpu_loop_exit_x86_64")
    assert library.holds(slot.value)


def test_function_that_is_not_called_has_no_slot(library):
    with pytest.raises(LookupError):
        library.slot("uc_version")


def test_addresses_elsewhere_are_not_the_librarys(library):
    assert library.holds(library.symbol("uc_open"))
    assert not library.holds(ctypes.addressof(ctypes.c_int()))


def test_file_that_is_no_elf_is_refused(tmp_path, monkeypatch):
    script = tmp_path / "script"
    script.write_text("no library")
    loaded = ctypes.CDLL(None)
    monkeypatch.setattr(loaded, "_name", str(script))
    with pytest.raises(LookupError):
        Library(loaded, "abort")
