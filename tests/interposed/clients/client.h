/* What the client programs of the tests share. A failed check prints its line and ends with 1. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(condition)                                                                        \
	do {                                                                                    \
		if (!(condition)) {                                                             \
			printf("%s:%d: %s (errno %d %s)\n", __FILE__, __LINE__, #condition,     \
			       errno, strerror(errno));                                         \
			fflush(stdout);                                                         \
			_exit(1);                                                               \
		}                                                                               \
	} while (0)

/* The call fails with exactly this errno. */
#define FAILS(error, call)                                                                      \
	do {                                                                                    \
		errno = 0;                                                                      \
		long value_ = (call);                                                           \
		if (value_ != -1 || errno != (error)) {                                         \
			printf("%s:%d: %s: %ld, errno %d, not %s\n", __FILE__, __LINE__, #call, \
			       value_, errno, #error);                                          \
			fflush(stdout);                                                         \
			_exit(1);                                                               \
		}                                                                               \
	} while (0)

static inline int kvm_open(void)
{
	int fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);

	CHECK(fd >= 0);
	return fd;
}

static inline int vm_new(int kvm)
{
	int fd = ioctl(kvm, KVM_CREATE_VM, 0);

	CHECK(fd >= 0);
	return fd;
}

static inline int vcpu_new(int vm, int id)
{
	int fd = ioctl(vm, KVM_CREATE_VCPU, id);

	CHECK(fd >= 0);
	return fd;
}

static inline struct kvm_run *run_page(int vcpu)
{
	void *page = mmap(NULL, 3 * 4096, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);

	CHECK(page != MAP_FAILED);
	return page;
}

/* KVM_SEV_INIT: takes an ASID. 0 or a negative errno. */
static inline int sev_init(int vm)
{
	struct {
		uint32_t id, pad;
		uint64_t data;
		uint32_t error, sev_fd;
	} command = {0};

	return ioctl(vm, KVM_MEMORY_ENCRYPT_OP, &command) ? -errno : 0;
}

/* Whether an ASID is free, when the host has only one. */
static inline int asid_free(int kvm)
{
	int vm = vm_new(kvm), result = sev_init(vm);

	CHECK(result == 0 || result == -EBUSY);
	close(vm);
	return result == 0;
}

static inline double seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec + now.tv_nsec / 1e9;
}
