/* The statistics file of a vCPU: for reading only, up to date after each exit. */
#include "client.h"

static uint64_t counter(int fd, const char *name)
{
	struct kvm_stats_header header;

	CHECK(pread(fd, &header, sizeof(header), 0) == sizeof(header));
	for (uint32_t i = 0; i < header.num_desc; i++) {
		size_t size = sizeof(struct kvm_stats_desc) + header.name_size;
		struct kvm_stats_desc *desc = calloc(1, size);
		uint64_t value;

		CHECK(pread(fd, desc, size, header.desc_offset + i * size) == (ssize_t)size);
		if (strcmp(desc->name, name) == 0) {
			off_t offset = header.data_offset + desc->offset;

			CHECK(pread(fd, &value, sizeof(value), offset) == sizeof(value));
			free(desc);
			return value;
		}
		free(desc);
	}
	printf("no %s\n", name);
	exit(1);
}

int main(void)
{
	int kvm = kvm_open(), vm = vm_new(kvm), vcpu = vcpu_new(vm, 0);
	int stats = ioctl(vcpu, KVM_GET_STATS_FD, 0);
	uint64_t before;
	char byte;

	CHECK(stats >= 0 && fcntl(stats, F_GETFD) == FD_CLOEXEC);
	FAILS(EBADF, write(stats, "x", 1));
	CHECK(pread(stats, &byte, 1, 1 << 24) == 0);
	before = counter(stats, "exits");
	CHECK(ioctl(vcpu, KVM_RUN, 0) == 0);
	CHECK(counter(stats, "exits") == before + 1);
	close(vcpu);
	close(vm);
	CHECK(counter(stats, "exits") == before + 1);
	return 0;
}
