/* What calls return once nobody answers them: orphan runs|asks. Says "ready" first. */
#include "client.h"

int main(int argc, char **argv)
{
	int kvm = kvm_open(), vm = vm_new(kvm), vcpu;

	CHECK(argc == 2);
	CHECK(ioctl(vm, KVM_CREATE_IRQCHIP, 0) == 0);
	vcpu = vcpu_new(vm, 0);
	printf("ready %d\n", getpid());
	fflush(stdout);
	if (strcmp(argv[1], "runs") == 0) {
		CHECK(ioctl(vcpu, KVM_RUN, 0) == -1);
	} else {
		while (ioctl(kvm, KVM_GET_API_VERSION, 0) == 12)
			;
	}
	printf("errno %d\n", errno);
	return 0;
}
