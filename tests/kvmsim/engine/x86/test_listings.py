"""Machine code that is written as bytes, against its listing put through the assembler."""

import shutil
import subprocess
from pathlib import Path

import pytest

from kvmsim.engine.x86 import branches, dirty_pages, meter

LISTINGS = Path(__file__).parent / "listings"
CODES = {
    "branches": branches._ENTERED,
    "dirty_pages": dirty_pages._STUB,
    "meter": meter._STUB,
}


@pytest.mark.parametrize("name", CODES)
def test_machine_code_is_its_listing(tmp_path, name):
    if not (shutil.which("as") and shutil.which("objcopy")):
        pytest.skip("needs as and objcopy")
    linked, code = tmp_path / "listing.o", tmp_path / "listing.bin"
    text = ".intel_syntax noprefix\n" + (LISTINGS / f"{name}.s").read_text()
    subprocess.run(["as", "--64", "-o", linked, "-"], input=text, text=True, check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", linked, code], check=True)
    assert code.read_bytes() == CODES[name]
