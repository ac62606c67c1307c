/* Memory that the supervisor shares: memory KIND, where KIND is anonymous, memfd or shared. */
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
	int kvm = kvm_open(), vm = vm_new(kvm), fd = -1, flags = MAP_PRIVATE | MAP_ANONYMOUS;
	struct kvm_userspace_memory_region region = {.memory_size = SIZE};
	pthread_t other;
	char *memory;

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
	strcpy(memory + 3 * 4096, "from the client");
	CHECK(pthread_create(&other, NULL, writer, NULL) == 0);
	usleep(2000);
	region.userspace_addr = (uint64_t)memory;
	/* The test writes "from the supervisor" at 1 MiB once it has the memory. */
	CHECK(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
	usleep(2000);
	stop = 1;
	CHECK(pthread_join(other, NULL) == 0);
	/* Replacing the pages answers the call, so the write may come after it. */
	for (int turn = 0; turn < 5000 && memory[(1 << 20) + 18] == 0; turn++)
		usleep(1000);
	CHECK(strcmp(memory + (1 << 20), "from the supervisor") == 0);
	CHECK(strcmp(memory + 3 * 4096, "from the client") == 0);
	for (uint64_t value = written > 5000 ? written - 4999 : 1; value <= written; value++)
		CHECK(words[value % 5000] == value);
	strcpy(memory + (2 << 20), "once more");
	memory[0] = 0x77;
	CHECK(fcntl(9, F_GETFD) == -1);
	/* The test looks at it during this call. */
	CHECK(ioctl(kvm, KVM_GET_API_VERSION, 0) == 12);
	return 0;
}
