"""Oracle rows that a mounted file system cannot answer as Linux does, each with its reason.

row (or test name, where there is no row) -> label -> reason. The label is that of one
observation: the rest of the row still has to agree. The label "*" stands for the whole row.
"""

EXACT_SIZE = "limits are cached pages, which need their exact size; Linux shows 0"
NOT_ASKED = "the kernel does not ask a FUSE server"
PRIVATE_MAPPING = "a private mapping is made without asking a FUSE server"
NO_PAGES = "sendfile and splice go through the page cache, where a live file has size 0"
FUSE_HANDLE = "file handles are the FUSE module's"
NO_CGROUP = "membership of a mounted tree is not the kernel's"
NO_CLONE = "clone3 takes directories of a real cgroup2 only"

DIFFERENCES: dict[int | str, dict[str, str]] = {
    31: {"size": EXACT_SIZE},
    34: {
        "mmap private": PRIVATE_MAPPING,
        "mmap private of a descriptor for reading": PRIVATE_MAPPING,
    },
    35: {"FIONREAD": EXACT_SIZE},
    37: {
        "END 0": EXACT_SIZE,
        "DATA": EXACT_SIZE,
        "HOLE": EXACT_SIZE,
        "SET 2^40": "a FUSE file may be longer than 2^31-1 bytes",
    },
    38: {
        "sendfile of a live file": NO_PAGES,
        "sent of a live file": NO_PAGES,
        "splice out of a live file": NO_PAGES,
        "spliced of a live file": NO_PAGES,
    },
    39: {"copied": EXACT_SIZE, "target": EXACT_SIZE},
    68: {"*": "no pressure files, as on a kernel without PSI"},
    73: {"/proc/self/cgroup": NO_CGROUP},
    79: {"/proc line": NO_CGROUP},
    83: {"*": NO_CGROUP},
    85: {"*": NO_CLONE},
    86: {"removed": NO_CLONE},
    134: {"state": "frozen by SIGSTOP, hence T"},
    136: {"write of 0 bytes": NOT_ASKED},
    138: {"lseek": NOT_ASKED},
    "test_c5_stat_of_files_and_directories": {"size of a file": EXACT_SIZE},
    "test_c5_the_directory_inode_is_the_handle": {
        "type": FUSE_HANDLE,
        "id": FUSE_HANDLE,
    },
    "test_c1_statfs_shows_the_magic": {"magic": "the magic is the FUSE module's"},
    "test_c6_a_descriptor_passed_on_moves_the_writer": {
        "listed": "pyfuse3 tells who opened, not who writes: 0 is the opener"
    },
}
