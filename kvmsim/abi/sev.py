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

KVM_SEV_INIT: Final = 0
KVM_SEV_ES_INIT: Final = 1
KVM_SEV_INIT2: Final = 22
#: Commands from here on are for SNP guests.
KVM_SEV_SNP_FIRST: Final = 100

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
