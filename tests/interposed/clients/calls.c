/* From open() to the first exit. */
#include "client.h"

int main(void)
{
	int kvm = kvm_open(), vm, vcpu;
	struct kvm_regs regs;
	struct kvm_run *run;

	CHECK(ioctl(kvm, KVM_GET_API_VERSION, 0) == 12);
	FAILS(EINVAL, ioctl(kvm, KVM_GET_API_VERSION, 1));
	CHECK(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0) == 3 * 4096);
	vm = vm_new(kvm);
	CHECK(fcntl(vm, F_GETFD) == FD_CLOEXEC);
	vcpu = vcpu_new(vm, 0);
	CHECK(fcntl(vcpu, F_GETFD) == FD_CLOEXEC);
	FAILS(EEXIST, ioctl(vm, KVM_CREATE_VCPU, 0));
	FAILS(EINVAL, ioctl(kvm, 0xaeff, 0));
	FAILS(ENOTTY, ioctl(vm, 0xaeff, 0));
	FAILS(EINVAL, ioctl(vcpu, 0xaeff, 0));
	FAILS(EBADF, ioctl(999, KVM_GET_API_VERSION, 0));
	FAILS(ENOTTY, ioctl(open("/dev/null", O_RDWR), KVM_GET_API_VERSION, 0));

	CHECK(ioctl(vcpu, KVM_GET_REGS, &regs) == 0);
	CHECK(regs.rip == 0xfff0 && regs.rdx == 0x600);
	regs.rax = 0x1234567890abcdef;
	CHECK(ioctl(vcpu, KVM_SET_REGS, &regs) == 0);
	regs.rax = 0;
	CHECK(ioctl(vcpu, KVM_GET_REGS, &regs) == 0 && regs.rax == 0x1234567890abcdef);

	run = run_page(vcpu);
	for (int i = 0; i < 2; i++) {
		CHECK(ioctl(vcpu, KVM_RUN, 0) == 0);
		CHECK(run->exit_reason == KVM_EXIT_IO && run->io.port == 0x3f8);
		CHECK(*((char *)run + run->io.data_offset) == "hi"[i]);
	}
	FAILS(EINVAL, ioctl(vcpu, KVM_RUN, 1));
	run->immediate_exit = 1;
	FAILS(EINTR, ioctl(vcpu, KVM_RUN, 0));
	CHECK(run->exit_reason == KVM_EXIT_IO);
	printf("done\n");
	return 7;
}
