/*
 * A client of the emulated KVM.
 *
 *     kvm version DEVICE MILLISECONDS      KVM_GET_API_VERSION over and over
 *     kvm run     DEVICE MILLISECONDS      KVM_RUN of one vCPU, whose guest stops at once
 *     kvm sev     DEVICE COUNT             make a VM, KVM_SEV_INIT2, close, COUNT times
 *     kvm objects DEVICE VMS VCPUS         make VMS VMs with VCPUS vCPUs each and hold them
 *
 * `version` and `run` print the median nanoseconds of one call: the time is taken over batches, so that
 * a clock reading costs nothing and a pre-empted batch does not count. `sev` prints nanoseconds per
 * turn. `objects` prints a line, waits for one, makes them, prints a line and waits for the next.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

enum { BATCH = 20, MOST_BATCHES = 1 << 16, SEV_VM = 2, SEV_INIT2 = 22 };

/* Newer than the headers of some systems: struct kvm_sev_cmd, struct kvm_sev_init. */
struct sev_init {
	__u64 vmsa_features;
	__u32 flags;
	__u16 ghcb_version;
	__u16 pad1;
	__u32 pad2[8];
};

struct sev_command {
	__u32 id;
	__u32 pad0;
	__u64 data;
	__u32 error;
	__u32 sev_fd;
};

static int device;

static int call(int fd, unsigned long request, unsigned long argument, const char *name)
{
	int result = ioctl(fd, request, argument);

	if (result < 0) {
		fprintf(stderr, "kvm: %s: %s\n", name, strerror(errno));
		exit(1);
	}
	return result;
}

static long now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000L + t.tv_nsec;
}

static int by_value(const void *a, const void *b)
{
	long x = *(const long *)a, y = *(const long *)b;

	return (x > y) - (x < y);
}

static void print_median(int fd, unsigned long request, const char *name, long milliseconds)
{
	static long batches[MOST_BATCHES];
	long start, end = now_ns(), deadline = end + milliseconds * 1000000L;
	int n = 0;

	while (end < deadline && n < MOST_BATCHES) {
		start = end;
		for (int i = 0; i < BATCH; i++)
			call(fd, request, 0, name);
		end = now_ns();
		batches[n++] = end - start;
	}
	qsort(batches, n, sizeof(*batches), by_value);
	printf("%ld\n", batches[n / 2] / BATCH);
}

static void run_vcpu(long milliseconds)
{
	int vm = call(device, KVM_CREATE_VM, 0, "KVM_CREATE_VM");
	int vcpu = call(vm, KVM_CREATE_VCPU, 0, "KVM_CREATE_VCPU");

	print_median(vcpu, KVM_RUN, "KVM_RUN", milliseconds);
}

static void churn(int sev, long count)
{
	long start = now_ns();

	for (long i = 0; i < count; i++) {
		struct sev_init init = { 0 };
		struct sev_command command = {
			.id = SEV_INIT2, .data = (unsigned long)&init, .sev_fd = sev,
		};
		int vm = call(device, KVM_CREATE_VM, SEV_VM, "KVM_CREATE_VM");

		call(vm, KVM_MEMORY_ENCRYPT_OP, (unsigned long)&command, "KVM_SEV_INIT2");
		close(vm);
	}
	printf("%ld\n", (now_ns() - start) / count);
}

static void await_line(const char *said)
{
	puts(said);
	fflush(stdout);
	while (getchar() != '\n' && !feof(stdin))
		;
}

static void hold(long vms, long vcpus)
{
	struct rlimit descriptors;

	getrlimit(RLIMIT_NOFILE, &descriptors);
	descriptors.rlim_cur = descriptors.rlim_max;
	setrlimit(RLIMIT_NOFILE, &descriptors);
	await_line("ready");
	for (long i = 0; i < vms; i++) {
		int vm = call(device, KVM_CREATE_VM, 0, "KVM_CREATE_VM");

		for (long j = 0; j < vcpus; j++)
			call(vm, KVM_CREATE_VCPU, j, "KVM_CREATE_VCPU");
	}
	await_line("made");
}

int main(int argc, char **argv)
{
	const char *what = argc > 3 ? argv[1] : "";

	if (argc > 3) {
		device = open(argv[2], O_RDWR | O_CLOEXEC);
		if (device < 0) {
			fprintf(stderr, "kvm: %s: %s\n", argv[2], strerror(errno));
			return 1;
		}
	}
	if (argc == 4 && !strcmp(what, "version"))
		print_median(device, KVM_GET_API_VERSION, "KVM_GET_API_VERSION", atol(argv[3]));
	else if (argc == 4 && !strcmp(what, "run"))
		run_vcpu(atol(argv[3]));
	else if (argc == 4 && !strcmp(what, "sev"))
		churn(open("/dev/sev", O_RDWR | O_CLOEXEC), atol(argv[3]));
	else if (argc == 5 && !strcmp(what, "objects"))
		hold(atol(argv[3]), atol(argv[4]));
	else {
		fprintf(stderr, "usage: kvm version|run|sev|objects DEVICE NUMBER...\n");
		return 64;
	}
	return 0;
}
