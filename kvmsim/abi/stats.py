"""The file behind KVM_GET_STATS_FD: header, descriptors, and the bits that describe a number."""

from __future__ import annotations

from typing import Final

from kvmsim.abi.layout import Field, Layout

KVM_STATS_HEADER: Final = Layout(
    "kvm_stats_header",
    24,
    {
        "flags": Field(0, "u32"),
        "name_size": Field(4, "u32"),
        "num_desc": Field(8, "u32"),
        "id_offset": Field(12, "u32"),
        "desc_offset": Field(16, "u32"),
        "data_offset": Field(20, "u32"),
    },
)
#: The descriptor without its name, which follows in ``NAME_BYTES`` bytes.
KVM_STATS_DESC: Final = Layout(
    "kvm_stats_desc",
    16,
    {
        "flags": Field(0, "u32"),
        "exponent": Field(4, "s16"),
        "size": Field(6, "u16"),
        "offset": Field(8, "u32"),
        "bucket_size": Field(12, "u32"),
    },
)
NAME_BYTES: Final = 48

KVM_STATS_TYPE_CUMULATIVE: Final = 0x0
KVM_STATS_TYPE_INSTANT: Final = 0x1
KVM_STATS_TYPE_PEAK: Final = 0x2
KVM_STATS_TYPE_LOG_HIST: Final = 0x4
KVM_STATS_UNIT_NONE: Final = 0x00
KVM_STATS_UNIT_SECONDS: Final = 0x20
KVM_STATS_UNIT_BOOLEAN: Final = 0x40
