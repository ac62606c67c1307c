/* Memory that is shared with the supervisor while somebody writes to it: memory KIND, where KIND is
   anonymous, memfd or shared. */
#include "client.h"

#define SIZE (4 << 20)

static volatile uint64_t *words;
static volatile int stop;
static uint64_t written;

/* Writes all the time, also while the pages are replaced. */
static void *writer(void *unused)
{
	while (!stop) {
		written++;
		words[written % 5000] = written;
	}
	return unused;
}

int main(int argc, char **argv)
{
	/* mov al,[0x3000]; mov [0x4000],al; hlt */
	static const char code[] = "\xa0\x00\x30\xa2\x00\x40\xf4";
	int kvm = kvm_open(), vm = vm_new(kvm), fd = -1, flags = MAP_PRIVATE | MAP_ANONYMOUS;
	struct kvm_userspace_memory_region region = {.memory_size = SIZE};
	struct kvm_regs regs = {.rip = 0x1000, .rflags = 2};
	struct kvm_sregs sregs;
	struct kvm_run *run;
	pthread_t other;
	char *memory;
	int vcpu;

	CHECK(argc == 2);
	if (strcmp(argv[1], "shared") == 0) {
		flags = MAP_SHARED | MAP_ANONYMOUS;
	} else if (strcmp(argv[1], "memfd") == 0) {
		flags = MAP_SHARED;
		fd = memfd_create("ram", 0);
		CHECK(ftruncate(fd, 2 * SIZE) == 0);
	}
	memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, flags, fd, fd < 0 ? 0 : SIZE);
	CHECK(memory != MAP_FAILED);
	words = (uint64_t *)(memory + (3 << 20));
	strcpy(memory + 0x3000, "from the client");
	memcpy(memory + 0x1000, code, sizeof(code) - 1);
	region.userspace_addr = (uint64_t)memory;
	CHECK(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
	vcpu = vcpu_new(vm, 0);
	run = run_page(vcpu);
	CHECK(ioctl(vcpu, KVM_GET_SREGS, &sregs) == 0);
	sregs.cs.base = sregs.cs.selector = 0;
	CHECK(ioctl(vcpu, KVM_SET_SREGS, &sregs) == 0);
	CHECK(ioctl(vcpu, KVM_SET_REGS, &regs) == 0);
	CHECK(pthread_create(&other, NULL, writer, NULL) == 0);
	usleep(2000);
	CHECK(ioctl(vcpu, KVM_RUN, 0) == 0);
	CHECK(run->exit_reason == KVM_EXIT_HLT);
	CHECK(memory[0x4000] == 'f');
	usleep(2000);
	stop = 1;
	CHECK(pthread_join(other, NULL) == 0);
	CHECK(strcmp(memory + 0x3000, "from the client") == 0);
	for (uint64_t value = written > 5000 ? written - 4999 : 1; value <= written; value++)
		CHECK(words[value % 5000] == value);
	/* The same pages from here on. */
	memory[0x3000] = 0x77;
	CHECK(ioctl(vcpu, KVM_SET_REGS, &regs) == 0);
	CHECK(ioctl(vcpu, KVM_RUN, 0) == 0);
	CHECK(memory[0x4000] == 0x77);
	CHECK(fcntl(9, F_GETFD) == -1);
	return 0;
}
