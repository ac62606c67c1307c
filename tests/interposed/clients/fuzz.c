/* Random requests with random arguments on every kind of descriptor: fuzz SEED CALLS. */
#include "client.h"

#define KINDS 10
#define BUFFER (64 * 1024)

static uint64_t state;
static int fds[KINDS];
static char *buffer, *read_only;

static uint64_t next(void)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state;
}

static uint32_t below(uint32_t limit)
{
	return (next() >> 20) % limit;
}

static void handler(int number)
{
	(void)number;
}

static unsigned int request(void)
{
	static const unsigned int known[] = {
		KVM_CREATE_VM, KVM_CREATE_VCPU, KVM_CREATE_VCPU, KVM_RUN, KVM_GET_REGS,
		KVM_SET_REGS, KVM_GET_SREGS, KVM_SET_SREGS, KVM_GET_MSRS, KVM_SET_MSRS,
		KVM_SET_CPUID2, KVM_GET_CPUID2, KVM_GET_SUPPORTED_CPUID, KVM_GET_MSR_INDEX_LIST,
		KVM_SET_USER_MEMORY_REGION, KVM_ENABLE_CAP, KVM_CHECK_EXTENSION,
		KVM_MEMORY_ENCRYPT_OP, KVM_MEMORY_ENCRYPT_OP, KVM_MEMORY_ENCRYPT_REG_REGION,
		KVM_GET_MP_STATE, KVM_SET_MP_STATE, KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS,
		KVM_SET_GUEST_DEBUG, KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS, KVM_SET_SIGNAL_MASK,
		KVM_CREATE_IRQCHIP, KVM_CREATE_PIT2, KVM_IRQ_LINE, KVM_GET_DIRTY_LOG, KVM_TRANSLATE,
		KVM_GET_XSAVE, KVM_SET_XSAVE, KVM_GET_LAPIC, KVM_SET_LAPIC, KVM_IOEVENTFD,
		KVM_IRQFD, KVM_SET_GSI_ROUTING, KVM_CREATE_DEVICE, KVM_HAS_DEVICE_ATTR,
		KVM_GET_DEVICE_ATTR, KVM_SET_DEVICE_ATTR, KVM_GET_STATS_FD, KVM_INTERRUPT,
		KVM_SET_TSC_KHZ, KVM_NMI, KVM_X86_SETUP_MCE, KVM_SET_BOOT_CPU_ID, 0xc0105300,
	};

	switch (below(4)) {
	case 0:
		return 0xae00 | below(256);
	case 1:
		return ((uint32_t)next() & 0xffff00ff) | 0xae00;
	default:
		return known[below(sizeof(known) / sizeof(known[0]))];
	}
}

static void randomize(void)
{
	uint32_t *words = (uint32_t *)buffer;

	for (int i = 0; i < 64; i++)
		words[i] = below(3) ? below(8) : (uint32_t)next();
	/* Pointers inside structures: to the buffer, mostly. */
	if (below(2))
		((uint64_t *)buffer)[1 + below(4)] = (uint64_t)buffer + below(BUFFER);
}

static unsigned long argument(void)
{
	switch (below(8)) {
	case 0:
		return below(8);
	case 1:
		return next();
	case 2:
		return (unsigned long)buffer + BUFFER - below(256);
	case 3:
		return (unsigned long)read_only;
	default:
		return (unsigned long)buffer;
	}
}

static void keep(int fd)
{
	int slot = 4 + below(KINDS - 4);

	close(fds[slot]);
	fds[slot] = fd;
}

int main(int argc, char **argv)
{
	int calls = argc > 2 ? atoi(argv[2]) : 1000;
	struct sigaction action = {.sa_handler = handler};
	struct itimerval timer = {{0, 3000}, {0, 3000}};
	int children = 0;

	state = (argc > 1 ? strtoull(argv[1], NULL, 0) : 1) * 0x9e3779b97f4a7c15ULL | 1;
	fds[0] = kvm_open();
	fds[1] = open("/dev/sev", O_RDWR);
	fds[2] = vm_new(fds[0]);
	fds[3] = vcpu_new(fds[2], 0);
	for (int i = 4; i < KINDS; i++)
		fds[i] = memfd_create("other", 0);
	buffer = mmap(NULL, BUFFER + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	read_only = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(mprotect(buffer + BUFFER, 4096, PROT_NONE) == 0);
	CHECK(sigaction(SIGALRM, &action, NULL) == 0);
	CHECK(setitimer(ITIMER_REAL, &timer, NULL) == 0);
	for (int call = 0; call < calls; call++) {
		int fd = below(50) ? fds[below(3) ? below(4) : below(KINDS)] : (int)below(64), result;
		unsigned int number = request();

		if (below(64) == 0) {
			close(fds[2]);
			close(fds[3]);
			fds[2] = ioctl(fds[0], KVM_CREATE_VM, (unsigned long)below(5));
			if (below(2))
				sev_init(fds[2]);
			if (below(2))
				ioctl(fds[2], KVM_CREATE_IRQCHIP, 0UL);
			fds[3] = ioctl(fds[2], KVM_CREATE_VCPU, 0UL);
		}
		randomize();
		if (number == KVM_CREATE_VCPU || number == KVM_CREATE_VM)
			result = ioctl(fd, number, (unsigned long)below(6));
		else if (number == KVM_RUN)
			result = ioctl(fd, number, 0UL);
		else
			result = ioctl(fd, number, argument());
		/* Any result above 2 could be a descriptor. */
		if (result > 2 && fcntl(result, F_GETFD) == FD_CLOEXEC)
			keep(result);
		if (below(200) == 0) {
			keep(dup(fds[below(KINDS)]));
		} else if (below(500) == 0 && children < 20) {
			pid_t child = fork();

			children++;
			if (child == 0) {
				/* Goes on alone for a while, then dies at some point. */
				calls = call + 200;
				state ^= getpid();
				setitimer(ITIMER_REAL, &timer, NULL);
				children = 20;
			} else if (below(2)) {
				usleep(below(3000));
				kill(child, SIGKILL);
			}
		}
	}
	signal(SIGALRM, SIG_IGN);
	while (wait(NULL) > 0)
		;
	return 0;
}
