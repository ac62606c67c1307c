/* VMs and vCPUs belong to the address space that made the VM. */
#include "client.h"
#include <spawn.h>

static void *thread(void *vm)
{
	int vcpu = vcpu_new((int)(long)vm, 1);
	struct kvm_regs regs;

	CHECK(ioctl(vcpu, KVM_GET_REGS, &regs) == 0);
	close(vcpu);
	return NULL;
}

static int after_exec(char **argv)
{
	int vm = atoi(argv[1]), vcpu = atoi(argv[2]), kvm = atoi(argv[3]);
	struct kvm_regs regs;

	FAILS(EIO, ioctl(vm, KVM_CHECK_EXTENSION, 0));
	FAILS(EIO, ioctl(vm, 0xaeff, 0));
	FAILS(EIO, ioctl(vcpu, KVM_GET_REGS, &regs));
	FAILS(EIO, ioctl(vcpu, KVM_RUN, 0));
	CHECK(ioctl(kvm, KVM_GET_API_VERSION, 0) == 12);
	vm = vm_new(kvm);
	vcpu = vcpu_new(vm, 0);
	CHECK(ioctl(vcpu, KVM_GET_REGS, &regs) == 0);
	return 0;
}

static void wait_for(pid_t child)
{
	int status;

	CHECK(waitpid(child, &status, 0) == child);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

int main(int argc, char **argv)
{
	int kvm, vm, vcpu;
	char numbers[3][16];
	struct kvm_regs regs;
	pthread_t other;
	pid_t child;

	if (argc > 1)
		return after_exec(argv);
	kvm = kvm_open();
	vm = vm_new(kvm);
	vcpu = vcpu_new(vm, 0);

	/* A thread shares it. */
	CHECK(pthread_create(&other, NULL, thread, (void *)(long)vm) == 0);
	CHECK(pthread_join(other, NULL) == 0);

	/* A child does not, and may make its own. */
	child = fork();
	if (child == 0) {
		FAILS(EIO, ioctl(vm, KVM_CHECK_EXTENSION, 0));
		FAILS(EIO, ioctl(vcpu, KVM_GET_REGS, &regs));
		FAILS(EIO, ioctl(vcpu, KVM_GET_REGS, NULL));
		vm = vm_new(kvm);
		CHECK(ioctl(vcpu_new(vm, 0), KVM_GET_REGS, &regs) == 0);
		_exit(0);
	}
	wait_for(child);
	CHECK(ioctl(vcpu, KVM_GET_REGS, &regs) == 0);

	/* A vfork child does, until it executes. */
	fcntl(vm, F_SETFD, 0);
	fcntl(vcpu, F_SETFD, 0);
	fcntl(kvm, F_SETFD, 0);
	snprintf(numbers[0], sizeof(numbers[0]), "%d", vm);
	snprintf(numbers[1], sizeof(numbers[1]), "%d", vcpu);
	snprintf(numbers[2], sizeof(numbers[2]), "%d", kvm);
	child = vfork();
	if (child == 0) {
		if (ioctl(vcpu, KVM_GET_REGS, &regs))
			_exit(2);
		execl(argv[0], argv[0], numbers[0], numbers[1], numbers[2], NULL);
		_exit(3);
	}
	wait_for(child);
	CHECK(ioctl(vcpu, KVM_GET_REGS, &regs) == 0);

	/* Nor does the program it becomes itself. */
	execl(argv[0], argv[0], numbers[0], numbers[1], numbers[2], NULL);
	return 4;
}
