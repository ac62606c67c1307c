"""Memory encryption: commands of ``KVM_MEMORY_ENCRYPT_OP`` and their structures."""

from __future__ import annotations

from typing import Final

from kvmsim.abi.layout import Field, Layout

KVM_SEV_CMD: Final = Layout(
    "kvm_sev_cmd",
    24,
    {
        "id": Field(0, "u32"),
        "data": Field(8, "u64"),
        "error": Field(16, "u32"),
        "sev_fd": Field(20, "u32"),
    },
)

KVM_SEV_INIT_STRUCT: Final = Layout(
    "kvm_sev_init",
    48,
    {
        "vmsa_features": Field(0, "u64"),
        "flags": Field(8, "u32"),
        "ghcb_version": Field(12, "u16"),
        "pad1": Field(14, "u16"),
        "pad2": Field(16, "u32", 8),
    },
)


def _row(name: str, size_bytes: int, **members: tuple[int, str] | tuple[int, str, int]) -> Layout:
    return Layout(name, size_bytes, {member: Field(*where) for member, where in members.items()})


KVM_SEV_LAUNCH_START_STRUCT: Final = _row(
    "kvm_sev_launch_start",
    40,
    handle=(0, "u32"),
    policy=(4, "u32"),
    dh_uaddr=(8, "u64"),
    dh_len=(16, "u32"),
    session_uaddr=(24, "u64"),
    session_len=(32, "u32"),
)
KVM_SEV_LAUNCH_UPDATE_DATA_STRUCT: Final = _row(
    "kvm_sev_launch_update_data", 16, uaddr=(0, "u64"), len=(8, "u32")
)
KVM_SEV_LAUNCH_MEASURE_STRUCT: Final = _row(
    "kvm_sev_launch_measure", 16, uaddr=(0, "u64"), len=(8, "u32")
)


def _packet(name: str) -> Layout:
    """A header, a range of guest memory and what travels: three address and length pairs."""
    return _row(
        name,
        48,
        hdr_uaddr=(0, "u64"),
        hdr_len=(8, "u32"),
        guest_uaddr=(16, "u64"),
        guest_len=(24, "u32"),
        trans_uaddr=(32, "u64"),
        trans_len=(40, "u32"),
    )


KVM_SEV_LAUNCH_SECRET_STRUCT: Final = _packet("kvm_sev_launch_secret")
KVM_SEV_SEND_UPDATE_DATA_STRUCT: Final = _packet("kvm_sev_send_update_data")
KVM_SEV_RECEIVE_UPDATE_DATA_STRUCT: Final = _packet("kvm_sev_receive_update_data")
KVM_SEV_GUEST_STATUS_STRUCT: Final = _row(
    "kvm_sev_guest_status", 12, handle=(0, "u32"), policy=(4, "u32"), state=(8, "u32")
)
KVM_SEV_DBG_STRUCT: Final = _row(
    "kvm_sev_dbg", 24, src_uaddr=(0, "u64"), dst_uaddr=(8, "u64"), len=(16, "u32")
)
KVM_SEV_ATTESTATION_REPORT_STRUCT: Final = _row(
    "kvm_sev_attestation_report", 32, mnonce=(0, "u8", 16), uaddr=(16, "u64"), len=(24, "u32")
)
KVM_SEV_SEND_START_STRUCT: Final = _row(
    "kvm_sev_send_start",
    72,
    policy=(0, "u32"),
    pdh_cert_uaddr=(8, "u64"),
    pdh_cert_len=(16, "u32"),
    plat_certs_uaddr=(24, "u64"),
    plat_certs_len=(32, "u32"),
    amd_certs_uaddr=(40, "u64"),
    amd_certs_len=(48, "u32"),
    session_uaddr=(56, "u64"),
    session_len=(64, "u32"),
)
KVM_SEV_RECEIVE_START_STRUCT: Final = _row(
    "kvm_sev_receive_start",
    40,
    handle=(0, "u32"),
    policy=(4, "u32"),
    pdh_uaddr=(8, "u64"),
    pdh_len=(16, "u32"),
    session_uaddr=(24, "u64"),
    session_len=(32, "u32"),
)
KVM_SEV_SNP_LAUNCH_START_STRUCT: Final = _row(
    "kvm_sev_snp_launch_start",
    64,
    policy=(0, "u64"),
    gosvw=(8, "u8", 16),
    flags=(24, "u16"),
)
KVM_SEV_SNP_LAUNCH_UPDATE_STRUCT: Final = _row(
    "kvm_sev_snp_launch_update",
    64,
    gfn_start=(0, "u64"),
    uaddr=(8, "u64"),
    len=(16, "u64"),
    type=(24, "u8"),
    flags=(26, "u16"),
)
KVM_SEV_SNP_LAUNCH_FINISH_STRUCT: Final = _row(
    "kvm_sev_snp_launch_finish",
    88,
    id_block_uaddr=(0, "u64"),
    id_auth_uaddr=(8, "u64"),
    id_block_en=(16, "u8"),
    auth_key_en=(17, "u8"),
    vcek_disabled=(18, "u8"),
    host_data=(19, "u8", 32),
    flags=(54, "u16"),
)
KVM_ENC_REGION: Final = _row("kvm_enc_region", 16, addr=(0, "u64"), size=(8, "u64"))

KVM_SEV_INIT: Final = 0
KVM_SEV_ES_INIT: Final = 1
KVM_SEV_LAUNCH_START: Final = 2
KVM_SEV_LAUNCH_UPDATE_DATA: Final = 3
KVM_SEV_LAUNCH_UPDATE_VMSA: Final = 4
KVM_SEV_LAUNCH_SECRET: Final = 5
KVM_SEV_LAUNCH_MEASURE: Final = 6
KVM_SEV_LAUNCH_FINISH: Final = 7
KVM_SEV_SEND_START: Final = 8
KVM_SEV_SEND_UPDATE_DATA: Final = 9
KVM_SEV_SEND_UPDATE_VMSA: Final = 10
KVM_SEV_SEND_FINISH: Final = 11
KVM_SEV_RECEIVE_START: Final = 12
KVM_SEV_RECEIVE_UPDATE_DATA: Final = 13
KVM_SEV_RECEIVE_UPDATE_VMSA: Final = 14
KVM_SEV_RECEIVE_FINISH: Final = 15
KVM_SEV_GUEST_STATUS: Final = 16
KVM_SEV_DBG_DECRYPT: Final = 17
KVM_SEV_DBG_ENCRYPT: Final = 18
KVM_SEV_CERT_EXPORT: Final = 19
KVM_SEV_GET_ATTESTATION_REPORT: Final = 20
KVM_SEV_SEND_CANCEL: Final = 21
KVM_SEV_INIT2: Final = 22
KVM_SEV_SNP_LAUNCH_START: Final = 100
KVM_SEV_SNP_LAUNCH_UPDATE: Final = 101
KVM_SEV_SNP_LAUNCH_FINISH: Final = 102
#: Commands from here on are for SNP guests.
KVM_SEV_SNP_FIRST: Final = 100
#: Name of each command -> its number.
COMMANDS: Final = {
    "KVM_SEV_INIT": KVM_SEV_INIT,
    "KVM_SEV_ES_INIT": KVM_SEV_ES_INIT,
    "KVM_SEV_LAUNCH_START": KVM_SEV_LAUNCH_START,
    "KVM_SEV_LAUNCH_UPDATE_DATA": KVM_SEV_LAUNCH_UPDATE_DATA,
    "KVM_SEV_LAUNCH_UPDATE_VMSA": KVM_SEV_LAUNCH_UPDATE_VMSA,
    "KVM_SEV_LAUNCH_SECRET": KVM_SEV_LAUNCH_SECRET,
    "KVM_SEV_LAUNCH_MEASURE": KVM_SEV_LAUNCH_MEASURE,
    "KVM_SEV_LAUNCH_FINISH": KVM_SEV_LAUNCH_FINISH,
    "KVM_SEV_SEND_START": KVM_SEV_SEND_START,
    "KVM_SEV_SEND_UPDATE_DATA": KVM_SEV_SEND_UPDATE_DATA,
    "KVM_SEV_SEND_UPDATE_VMSA": KVM_SEV_SEND_UPDATE_VMSA,
    "KVM_SEV_SEND_FINISH": KVM_SEV_SEND_FINISH,
    "KVM_SEV_RECEIVE_START": KVM_SEV_RECEIVE_START,
    "KVM_SEV_RECEIVE_UPDATE_DATA": KVM_SEV_RECEIVE_UPDATE_DATA,
    "KVM_SEV_RECEIVE_UPDATE_VMSA": KVM_SEV_RECEIVE_UPDATE_VMSA,
    "KVM_SEV_RECEIVE_FINISH": KVM_SEV_RECEIVE_FINISH,
    "KVM_SEV_GUEST_STATUS": KVM_SEV_GUEST_STATUS,
    "KVM_SEV_DBG_DECRYPT": KVM_SEV_DBG_DECRYPT,
    "KVM_SEV_DBG_ENCRYPT": KVM_SEV_DBG_ENCRYPT,
    "KVM_SEV_CERT_EXPORT": KVM_SEV_CERT_EXPORT,
    "KVM_SEV_GET_ATTESTATION_REPORT": KVM_SEV_GET_ATTESTATION_REPORT,
    "KVM_SEV_SEND_CANCEL": KVM_SEV_SEND_CANCEL,
    "KVM_SEV_INIT2": KVM_SEV_INIT2,
    "KVM_SEV_SNP_LAUNCH_START": KVM_SEV_SNP_LAUNCH_START,
    "KVM_SEV_SNP_LAUNCH_UPDATE": KVM_SEV_SNP_LAUNCH_UPDATE,
    "KVM_SEV_SNP_LAUNCH_FINISH": KVM_SEV_SNP_LAUNCH_FINISH,
}
#: Command -> what its ``data`` points at; commands that take nothing have no entry.
PARAMETERS: Final = {
    KVM_SEV_LAUNCH_START: KVM_SEV_LAUNCH_START_STRUCT,
    KVM_SEV_LAUNCH_UPDATE_DATA: KVM_SEV_LAUNCH_UPDATE_DATA_STRUCT,
    KVM_SEV_LAUNCH_SECRET: KVM_SEV_LAUNCH_SECRET_STRUCT,
    KVM_SEV_LAUNCH_MEASURE: KVM_SEV_LAUNCH_MEASURE_STRUCT,
    KVM_SEV_SEND_START: KVM_SEV_SEND_START_STRUCT,
    KVM_SEV_SEND_UPDATE_DATA: KVM_SEV_SEND_UPDATE_DATA_STRUCT,
    KVM_SEV_RECEIVE_START: KVM_SEV_RECEIVE_START_STRUCT,
    KVM_SEV_RECEIVE_UPDATE_DATA: KVM_SEV_RECEIVE_UPDATE_DATA_STRUCT,
    KVM_SEV_GUEST_STATUS: KVM_SEV_GUEST_STATUS_STRUCT,
    KVM_SEV_DBG_DECRYPT: KVM_SEV_DBG_STRUCT,
    KVM_SEV_DBG_ENCRYPT: KVM_SEV_DBG_STRUCT,
    KVM_SEV_GET_ATTESTATION_REPORT: KVM_SEV_ATTESTATION_REPORT_STRUCT,
    KVM_SEV_INIT2: KVM_SEV_INIT_STRUCT,
    KVM_SEV_SNP_LAUNCH_START: KVM_SEV_SNP_LAUNCH_START_STRUCT,
    KVM_SEV_SNP_LAUNCH_UPDATE: KVM_SEV_SNP_LAUNCH_UPDATE_STRUCT,
    KVM_SEV_SNP_LAUNCH_FINISH: KVM_SEV_SNP_LAUNCH_FINISH_STRUCT,
}

KVM_SEV_SNP_PAGE_TYPE_NORMAL: Final = 1
KVM_SEV_SNP_PAGE_TYPE_ZERO: Final = 3
KVM_SEV_SNP_PAGE_TYPE_UNMEASURED: Final = 4
KVM_SEV_SNP_PAGE_TYPE_SECRETS: Final = 5
KVM_SEV_SNP_PAGE_TYPE_CPUID: Final = 6

#: Longest blob KVM copies for the firmware (Linux include/linux/psp-sev.h).
SEV_FW_BLOB_MAX_SIZE: Final = 0x4000
KVM_SEV_SNP_ID_BLOCK_SIZE: Final = 96
KVM_SEV_SNP_ID_AUTH_SIZE: Final = 4096

# Policy of a guest that is not SNP.
SEV_POLICY_NODBG: Final = 1 << 0
SEV_POLICY_NOKS: Final = 1 << 1
SEV_POLICY_ES: Final = 1 << 2
SEV_POLICY_NOSEND: Final = 1 << 3
SEV_POLICY_DOMAIN: Final = 1 << 4
SEV_POLICY_SEV: Final = 1 << 5

# Policy of an SNP guest; what Linux 6.12 lets through.
SNP_POLICY_SMT: Final = 1 << 16
SNP_POLICY_RESERVED_ONE: Final = 1 << 17
SNP_POLICY_DEBUG: Final = 1 << 19
SNP_POLICY_SINGLE_SOCKET: Final = 1 << 20
SNP_POLICY_VALID: Final = (
    0xFFFF | SNP_POLICY_SMT | SNP_POLICY_RESERVED_ONE | SNP_POLICY_DEBUG | SNP_POLICY_SINGLE_SOCKET
)

#: Bit of ``kvm_sev_init.vmsa_features``: debug registers are swapped on VMEXIT.
SVM_SEV_FEAT_DEBUG_SWAP: Final = 1 << 5
GHCB_VERSION_MAX: Final = 2
GHCB_VERSION_DEFAULT: Final = 2

#: Linux 6.16 arch/x86/include/uapi/asm/kvm.h; same request number as the SEV commands.
KVM_TDX_CMD: Final = Layout(
    "kvm_tdx_cmd",
    24,
    {
        "id": Field(0, "u32"),
        "flags": Field(4, "u32"),
        "data": Field(8, "u64"),
        "hw_error": Field(16, "u64"),
    },
)
KVM_TDX_INIT_VM: Final = 1
