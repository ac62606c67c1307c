/*
 * A VMM for the guests in guests/: RAM, a ROM at the top of 4 GiB and below 1 MiB, a serial port, and
 * a port that ends it all. It says how many bus locks KVM told it about.
 *
 *   usage: board ROM
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef KVM_CAP_X86_BUS_LOCK_EXIT /* headers before Linux 5.12 */
#define KVM_CAP_X86_BUS_LOCK_EXIT 193
#define KVM_BUS_LOCK_DETECTION_EXIT 2
#define KVM_EXIT_X86_BUS_LOCK 33
#endif
#ifndef KVM_RUN_X86_BUS_LOCK
#define KVM_RUN_X86_BUS_LOCK 2
#endif

#define RAM_SIZE 0xa0000
#define ROM_SIZE 0x10000
#define SERIAL 0x3f8
#define EXIT_PORT 0xf4

static int call(const char *name, int fd, unsigned long request, void *argument)
{
	int result = ioctl(fd, request, argument);

	if (result < 0) {
		fprintf(stderr, "board: %s: %s\n", name, strerror(errno));
		exit(1);
	}
	return result;
}

static void *memory(int vm, unsigned int slot, unsigned long long gpa, size_t size, void *at)
{
	struct kvm_userspace_memory_region region = {
		.slot = slot, .flags = slot ? KVM_MEM_READONLY : 0,
		.guest_phys_addr = gpa, .memory_size = size,
	};

	if (!at)
		at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (at == MAP_FAILED) {
		perror("board: mmap");
		exit(1);
	}
	region.userspace_addr = (unsigned long)at;
	call("KVM_SET_USER_MEMORY_REGION", vm, KVM_SET_USER_MEMORY_REGION, &region);
	return at;
}

static void load(void *at, const char *name)
{
	int file = open(name, O_RDONLY);

	if (file < 0 || read(file, at, ROM_SIZE) != ROM_SIZE) {
		fprintf(stderr, "board: %s is no ROM of 64 KiB\n", name);
		exit(1);
	}
	close(file);
}

static void give_cpuid(int kvm, int vcpu)
{
	static struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[256];
	} table = { .head.nent = 256 };

	call("KVM_GET_SUPPORTED_CPUID", kvm, KVM_GET_SUPPORTED_CPUID, &table);
	call("KVM_SET_CPUID2", vcpu, KVM_SET_CPUID2, &table);
}

int main(int argc, char **argv)
{
	struct kvm_enable_cap cap = {
		.cap = KVM_CAP_X86_BUS_LOCK_EXIT, .args = { KVM_BUS_LOCK_DETECTION_EXIT },
	};
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), vm, vcpu;
	unsigned long bus_locks = 0;
	struct kvm_run *run;
	void *rom;

	if (kvm < 0 || argc != 2) {
		fprintf(stderr, "board: %s\n", argc == 2 ? "no /dev/kvm" : "usage: board ROM");
		return 1;
	}
	vm = call("KVM_CREATE_VM", kvm, KVM_CREATE_VM, 0);
	if (ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_X86_BUS_LOCK_EXIT) > 0)
		call("KVM_ENABLE_CAP", vm, KVM_ENABLE_CAP, &cap);
	memory(vm, 0, 0, RAM_SIZE, NULL);
	rom = memory(vm, 1, 0xf0000, ROM_SIZE, NULL);
	memory(vm, 2, 0xffff0000, ROM_SIZE, rom);
	load(rom, argv[1]);
	vcpu = call("KVM_CREATE_VCPU", vm, KVM_CREATE_VCPU, 0);
	give_cpuid(kvm, vcpu);
	run = mmap(NULL, call("KVM_GET_VCPU_MMAP_SIZE", kvm, KVM_GET_VCPU_MMAP_SIZE, 0),
		   PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED) {
		perror("board: mmap");
		return 1;
	}
	for (;;) {
		if (ioctl(vcpu, KVM_RUN, 0) < 0) {
			if (errno == EINTR)
				continue;
			perror("board: KVM_RUN");
			return 1;
		}
		if (run->flags & KVM_RUN_X86_BUS_LOCK)
			bus_locks++; /* an exit of its own, or riding on another */
		if (run->exit_reason == KVM_EXIT_X86_BUS_LOCK)
			continue;
		if (run->exit_reason == KVM_EXIT_IO && run->io.direction == KVM_EXIT_IO_OUT) {
			if (run->io.port == SERIAL)
				fwrite((char *)run + run->io.data_offset, run->io.size, run->io.count, stdout);
			if (run->io.port != EXIT_PORT)
				continue;
			printf("%lu bus lock exits\n", bus_locks);
			return 0;
		}
		printf("exit %u, which this VMM does not know\n", run->exit_reason);
		return 1;
	}
}
