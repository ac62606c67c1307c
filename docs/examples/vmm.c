/*
 * The smallest VMM: one vCPU, no guest code, and an exit handler that says what it was told.
 * It works on any /dev/kvm; what its guest does is the business of whoever provides that.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#ifndef KVM_CAP_X86_BUS_LOCK_EXIT /* headers before Linux 5.12 */
#define KVM_CAP_X86_BUS_LOCK_EXIT 193
#define KVM_BUS_LOCK_DETECTION_EXIT 2
#define KVM_EXIT_X86_BUS_LOCK 33
#endif
#ifndef KVM_RUN_X86_BUS_LOCK
#define KVM_RUN_X86_BUS_LOCK 2
#endif

static int call(const char *name, int fd, unsigned long request, void *argument)
{
	int result = ioctl(fd, request, argument);

	if (result < 0) {
		fprintf(stderr, "vmm: %s: %s\n", name, strerror(errno));
		exit(1);
	}
	return result;
}

static int handle(const struct kvm_run *run) /* returns whether the guest goes on */
{
	if (run->flags & KVM_RUN_X86_BUS_LOCK)
		printf("[bus lock] "); /* with an exit of its own, or riding on any other */
	switch (run->exit_reason) {
	case KVM_EXIT_X86_BUS_LOCK:
		printf("nothing else\n");
		return 1;
	case KVM_EXIT_IO:
		printf("io port %#x, %u byte(s)\n", run->io.port, run->io.size * run->io.count);
		return 1;
	case KVM_EXIT_MMIO:
		printf("mmio %s %#llx, %u byte(s)\n", run->mmio.is_write ? "write to" : "read of",
		       (unsigned long long)run->mmio.phys_addr, run->mmio.len);
		return 1;
	case KVM_EXIT_HLT:
		printf("halted\n");
		return 0;
	case KVM_EXIT_SHUTDOWN:
		printf("triple fault\n");
		return 0;
	case KVM_EXIT_INTERNAL_ERROR:
		printf("KVM gives up, suberror %u\n", run->internal.suberror);
		return 0;
	default:
		printf("exit %u, which this VMM does not know\n", run->exit_reason);
		return 0;
	}
}

int main(void)
{
	struct kvm_enable_cap cap = {
		.cap = KVM_CAP_X86_BUS_LOCK_EXIT, .args = { KVM_BUS_LOCK_DETECTION_EXIT },
	};
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), vm, vcpu, size;
	struct kvm_run *run;

	setlinebuf(stdout);
	if (kvm < 0) {
		perror("vmm: /dev/kvm");
		return 1;
	}
	vm = call("KVM_CREATE_VM", kvm, KVM_CREATE_VM, 0);
	call("KVM_ENABLE_CAP", vm, KVM_ENABLE_CAP, &cap);
	vcpu = call("KVM_CREATE_VCPU", vm, KVM_CREATE_VCPU, 0);
	size = call("KVM_GET_VCPU_MMAP_SIZE", kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED) {
		perror("vmm: mmap");
		return 1;
	}
	do {
		while (ioctl(vcpu, KVM_RUN, 0) < 0) {
			if (errno != EINTR) {
				perror("vmm: KVM_RUN");
				return 1;
			}
			printf("interrupted\n");
		}
	} while (handle(run));
	return 0;
}
