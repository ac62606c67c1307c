/* The first thread ends before the others: the process and its memory go on. */
#include "client.h"

static int kvm, vm, vcpu;

static void *goes_on(void *unused)
{
	struct kvm_regs regs;
	char path[64], line[256];
	FILE *status;
	int zombie = 0;

	while (!zombie) {
		snprintf(path, sizeof(path), "/proc/%d/stat", getpid());
		status = fopen(path, "r");
		CHECK(status && fgets(line, sizeof(line), status));
		zombie = strstr(line, ") Z") != NULL;
		fclose(status);
	}
	for (int round = 0; round < 3; round++) {
		usleep(1000);
		CHECK(ioctl(vcpu, KVM_GET_REGS, &regs) == 0 && regs.rip == 0xfff0);
		CHECK(ioctl(vm, KVM_CREATE_VCPU, round + 1) >= 0);
	}
	printf("went on\n");
	fflush(stdout);
	_exit(6);
	return unused;
}

int main(void)
{
	pthread_t other;

	kvm = kvm_open();
	vm = vm_new(kvm);
	vcpu = vcpu_new(vm, 0);
	CHECK(pthread_create(&other, NULL, goes_on, NULL) == 0);
	pthread_exit(NULL);
}
