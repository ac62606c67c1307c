/* Addresses that are no good. */
#include "client.h"

int main(void)
{
	int kvm = kvm_open(), vm = vm_new(kvm), vcpu = vcpu_new(vm, 0);
	size_t page = 4096;
	char *memory = mmap(NULL, 3 * page, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct kvm_regs *edge;

	CHECK(memory != MAP_FAILED);
	memset(memory, 0x55, 3 * page);
	FAILS(EFAULT, ioctl(vcpu, KVM_GET_REGS, NULL));
	FAILS(EFAULT, ioctl(vcpu, KVM_SET_REGS, NULL));
	FAILS(EFAULT, ioctl(vcpu, KVM_GET_REGS, -1L));
	FAILS(EFAULT, ioctl(vcpu, KVM_GET_REGS, 1UL << 63));
	FAILS(EFAULT, ioctl(vcpu, KVM_GET_REGS, 0xffff800000000000UL));
	FAILS(EFAULT, ioctl(vcpu, KVM_GET_REGS, (1UL << 47) - 8));

	/* Read-only: can be read from, not written to. */
	CHECK(mprotect(memory + page, page, PROT_READ) == 0);
	CHECK(ioctl(vcpu, KVM_SET_REGS, memory + page) == 0);
	FAILS(EFAULT, ioctl(vcpu, KVM_GET_REGS, memory + page));
	CHECK(memory[page] == 0x55);

	/* The second half is not there. */
	CHECK(munmap(memory + 2 * page, page) == 0);
	CHECK(mprotect(memory + page, page, PROT_READ | PROT_WRITE) == 0);
	edge = (struct kvm_regs *)(memory + 2 * page - sizeof(*edge) / 2);
	FAILS(EFAULT, ioctl(vcpu, KVM_GET_REGS, edge));
	FAILS(EFAULT, ioctl(vcpu, KVM_SET_REGS, edge));
	/* Across two pages that are. */
	edge = (struct kvm_regs *)(memory + page - 64);
	CHECK(ioctl(vcpu, KVM_GET_REGS, edge) == 0);
	CHECK(ioctl(vcpu, KVM_SET_REGS, edge) == 0);

	CHECK(mprotect(memory, page, PROT_NONE) == 0);
	FAILS(EFAULT, ioctl(vcpu, KVM_SET_REGS, memory));
	return 0;
}
