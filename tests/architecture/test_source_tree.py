from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
MOST_LINES = 600


def sources(*tops):
    """The Python files below some directories of the checkout."""
    return sorted(path for top in tops for path in (CHECKOUT / top).rglob("*.py"))


def test_no_source_file_is_too_long_to_read():
    lengths = {
        str(path.relative_to(CHECKOUT)): len(path.read_text().splitlines())
        for path in sources("cgfs", "kvmsim", "tests", "tools")
    }
    assert {path: lines for path, lines in lengths.items() if lines > MOST_LINES} == {}


def mirrored(directory):
    """The package whose tests a directory holds.

    Those that also run against the machine's own kernel are below one named "real" beside the
    others.
    """
    package = CHECKOUT / directory.relative_to(CHECKOUT / "tests")
    return next(
        (parent.parent for parent in (package, *package.parents) if parent.name == "real"), package
    )


def test_directories_of_mirroring_tests_mirror_a_package():
    packages = {
        mirrored(path.parent)
        for path in sources("tests/cgfs", "tests/kvmsim")
        if path.name.startswith("test_")
    }
    assert [str(package) for package in packages if not (package / "__init__.py").is_file()] == []


def test_tests_are_no_packages():
    assert list((CHECKOUT / "tests").rglob("__init__.py")) == []
