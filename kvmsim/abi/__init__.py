"""The KVM ABI as tables: numbers, layouts, bit names. No behaviour."""
