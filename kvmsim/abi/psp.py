"""The secure processor: statuses of its commands and the structures of ``/dev/sev``.

Source: Linux 6.12 ``include/uapi/linux/psp-sev.h``; every structure is packed.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from kvmsim.abi.layout import Field, Layout


class Status(IntEnum):
    """``sev_ret_code``: what the firmware answers."""

    SUCCESS = 0
    INVALID_PLATFORM_STATE = 1
    INVALID_GUEST_STATE = 2
    INVALID_CONFIG = 3
    INVALID_LENGTH = 4
    ALREADY_OWNED = 5
    INVALID_CERTIFICATE = 6
    POLICY_FAILURE = 7
    INACTIVE = 8
    INVALID_ADDRESS = 9
    BAD_SIGNATURE = 10
    BAD_MEASUREMENT = 11
    ASID_OWNED = 12
    INVALID_ASID = 13
    WBINVD_REQUIRED = 14
    DFFLUSH_REQUIRED = 15
    INVALID_GUEST = 16
    INVALID_COMMAND = 17
    ACTIVE = 18
    HWERROR_PLATFORM = 19
    HWERROR_UNSAFE = 20
    UNSUPPORTED = 21
    INVALID_PARAM = 22
    RESOURCE_LIMIT = 23
    SECURE_DATA_INVALID = 24


#: ``error`` while the firmware was not called.
NO_FW_CALL: Final = 0xFFFF_FFFF


class PlatformState(IntEnum):
    """``sev_user_data_status.state``."""

    UNINIT = 0
    INIT = 1
    WORKING = 2


class GuestState(IntEnum):
    """``kvm_sev_guest_status.state``."""

    UNINIT = 0
    LAUNCH_UPDATE = 1
    LAUNCH_SECRET = 2
    RUNNING = 3
    SEND_UPDATE = 4
    RECEIVE_UPDATE = 5
    SENT = 6


SEV_ISSUE_CMD: Final = 0xC0105300
SEV_ISSUE_CMD_STRUCT: Final = Layout(
    "sev_issue_cmd",
    16,
    {"cmd": Field(0, "u32"), "data": Field(4, "u64"), "error": Field(12, "u32")},
)

SEV_FACTORY_RESET: Final = 0
SEV_PLATFORM_STATUS: Final = 1
SEV_PEK_GEN: Final = 2
SEV_PEK_CSR: Final = 3
SEV_PDH_GEN: Final = 4
SEV_PDH_CERT_EXPORT: Final = 5
SEV_PEK_CERT_IMPORT: Final = 6
SEV_GET_ID: Final = 7
SEV_GET_ID2: Final = 8
SNP_PLATFORM_STATUS: Final = 9
SNP_COMMIT: Final = 10
SNP_SET_CONFIG: Final = 11
SNP_VLEK_LOAD: Final = 12
SEV_MAX: Final = 13

SEV_USER_DATA_STATUS: Final = Layout(
    "sev_user_data_status",
    12,
    {
        "api_major": Field(0, "u8"),
        "api_minor": Field(1, "u8"),
        "state": Field(2, "u8"),
        "flags": Field(3, "u32"),
        "build": Field(7, "u8"),
        "guest_count": Field(8, "u32"),
    },
)
SEV_STATUS_FLAGS_OWNED: Final = 0x0001
SEV_STATUS_FLAGS_CONFIG_ES: Final = 0x0100

SEV_USER_DATA_PEK_CSR: Final = Layout(
    "sev_user_data_pek_csr", 12, {"address": Field(0, "u64"), "length": Field(8, "u32")}
)
SEV_USER_DATA_PDH_CERT_EXPORT: Final = Layout(
    "sev_user_data_pdh_cert_export",
    24,
    {
        "pdh_cert_address": Field(0, "u64"),
        "pdh_cert_len": Field(8, "u32"),
        "cert_chain_address": Field(12, "u64"),
        "cert_chain_len": Field(20, "u32"),
    },
)
SEV_USER_DATA_PEK_CERT_IMPORT: Final = Layout(
    "sev_user_data_pek_cert_import",
    24,
    {
        "pek_cert_address": Field(0, "u64"),
        "pek_cert_len": Field(8, "u32"),
        "oca_cert_address": Field(12, "u64"),
        "oca_cert_len": Field(20, "u32"),
    },
)
SEV_USER_DATA_GET_ID2: Final = Layout(
    "sev_user_data_get_id2", 12, {"address": Field(0, "u64"), "length": Field(8, "u32")}
)
SEV_USER_DATA_SNP_STATUS: Final = Layout(
    "sev_user_data_snp_status",
    32,
    {
        "api_major": Field(0, "u8"),
        "api_minor": Field(1, "u8"),
        "state": Field(2, "u8"),
        "is_rmp_initialized": Field(3, "u8"),
        "build_id": Field(4, "u32"),
        "flags": Field(8, "u32"),
        "guest_count": Field(12, "u32"),
        "current_tcb_version": Field(16, "u64"),
        "reported_tcb_version": Field(24, "u64"),
    },
)
SEV_USER_DATA_SNP_CONFIG: Final = Layout(
    "sev_user_data_snp_config",
    64,
    {"reported_tcb": Field(0, "u64"), "flags": Field(8, "u32"), "rsvd": Field(12, "u8", 52)},
)
SEV_USER_DATA_SNP_VLEK_LOAD: Final = Layout(
    "sev_user_data_snp_vlek_load",
    16,
    {
        "len": Field(0, "u32"),
        "vlek_wrapped_version": Field(4, "u8"),
        "rsvd": Field(5, "u8", 3),
        "vlek_wrapped_address": Field(8, "u64"),
    },
)
SEV_USER_DATA_SNP_WRAPPED_VLEK_HASHSTICK_BYTES: Final = 432
