/* Private memory that becomes a guest's while the client uses it: remap CASE. */
#include "client.h"

#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/time.h>

#define BASE 0x1000
#define RAM (64 << 10)
#define HIGH 0x80000
#define ROUNDS 40
#define EXIT_MEMORY_FAULT 39

/* mov ax,0x8000; mov ds,ax; mov al,[0]; out 0x10,al; hlt */
static const char CODE[] = "\xb8\x00\x80\x8e\xd8\xa0\x00\x00\xe6\x10\xf4";

static int vm, vcpu;
static struct kvm_run *run;
static uint8_t *ram;

static uint8_t *pages(int protection)
{
	uint8_t *made = mmap(NULL, RAM, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(made != MAP_FAILED);
	return made;
}

static void slot(int number, uint64_t gpa, uint64_t size, void *memory)
{
	struct kvm_userspace_memory_region region = {
		.slot = number,
		.guest_phys_addr = gpa,
		.memory_size = size,
		.userspace_addr = (uint64_t)memory,
	};

	CHECK(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
}

static void start(void)
{
	struct kvm_sregs sregs;
	struct kvm_regs regs = {.rip = BASE, .rflags = 2};

	CHECK(ioctl(vcpu, KVM_GET_SREGS, &sregs) == 0);
	sregs.cs.base = sregs.cs.selector = 0;
	CHECK(ioctl(vcpu, KVM_SET_SREGS, &sregs) == 0);
	CHECK(ioctl(vcpu, KVM_SET_REGS, &regs) == 0);
}

static void make(void)
{
	vm = vm_new(kvm_open());
	vcpu = vcpu_new(vm, 0);
	run = run_page(vcpu);
	ram = pages(PROT_READ | PROT_WRITE);
	memcpy(ram + BASE, CODE, sizeof(CODE) - 1);
	slot(0, 0, RAM, ram);
	start();
}

/* As a VMM does it: a signal on the way is no failure. */
static int enter(void)
{
	int result;

	do
		result = ioctl(vcpu, KVM_RUN, 0);
	while (result == -1 && errno == EINTR);
	CHECK(result == 0);
	return run->exit_reason;
}

/* An instruction is completed with immediate_exit while there is a new slot: the exit stays. */
static void completed(void)
{
	uint8_t *more = pages(PROT_READ | PROT_WRITE);

	make();
	slot(1, HIGH, RAM, more);
	CHECK(enter() == KVM_EXIT_IO);
	slot(2, 2 * HIGH, RAM, pages(PROT_READ | PROT_WRITE));
	run->immediate_exit = 1;
	CHECK(ioctl(vcpu, KVM_RUN, 0) == -1 && errno == EINTR);
	CHECK(run->exit_reason == KVM_EXIT_IO);
	run->immediate_exit = 0;
	CHECK(enter() == KVM_EXIT_HLT);
}

/* Memory of a guest that is code of its client, too. */
static void executable(void)
{
	static const char code[] = "\xb8\x2a\x00\x00\x00\xc3"; /* mov eax,42; ret */
	uint8_t *more = pages(PROT_READ | PROT_WRITE | PROT_EXEC);
	int (*function)(void);

	make();
	memcpy(more, code, sizeof(code) - 1);
	memcpy(&function, &more, sizeof(more));
	slot(1, HIGH, RAM, more);
	CHECK(enter() == KVM_EXIT_IO);
	CHECK(function() == 42);
}

/* A slot whose memory is not to be touched: KVM_RUN fails until it is. */
static void torn(void)
{
	uint8_t *more = pages(PROT_NONE);

	make();
	slot(1, HIGH, RAM, more);
	for (int turn = 0; turn < 2; turn++) {
		FAILS(EFAULT, ioctl(vcpu, KVM_RUN, 0));
		CHECK(run->exit_reason == EXIT_MEMORY_FAULT);
		CHECK(((uint64_t *)run)[5] == HIGH);
	}
	CHECK(mprotect(more, RAM, PROT_READ | PROT_WRITE) == 0);
	more[0] = 7;
	CHECK(enter() == KVM_EXIT_IO && ((uint8_t *)run)[run->io.data_offset] == 7);
	CHECK(enter() == KVM_EXIT_HLT);
}

static uint8_t *shared;

static void *in_other(void *unused)
{
	(void)unused;
	usleep(20000);
	make();
	slot(1, HIGH, RAM, shared);
	CHECK(enter() == KVM_EXIT_IO);
	CHECK(((uint8_t *)run)[run->io.data_offset] == 9);
	puts("done");
	exit(0);
}

/* The first thread of the client has ended. */
static void leaderless(void)
{
	pthread_t other;

	shared = pages(PROT_READ | PROT_WRITE);
	shared[0] = 9;
	CHECK(pthread_create(&other, NULL, in_other, NULL) == 0);
	pthread_exit(NULL);
}

/* Two VMs have the same memory: both and the client see the same. */
static void twice(void)
{
	int first_vcpu;
	struct kvm_run *first_run;

	shared = pages(PROT_READ | PROT_WRITE);
	make();
	slot(1, HIGH, RAM, shared);
	shared[0] = 1;
	CHECK(enter() == KVM_EXIT_IO && ((uint8_t *)run)[run->io.data_offset] == 1);
	CHECK(enter() == KVM_EXIT_HLT);
	first_vcpu = vcpu;
	first_run = run;
	make();
	slot(1, HIGH, RAM, shared);
	shared[0] = 2;
	CHECK(enter() == KVM_EXIT_IO && ((uint8_t *)run)[run->io.data_offset] == 2);
	vcpu = first_vcpu;
	run = first_run;
	start();
	shared[0] = 3;
	CHECK(enter() == KVM_EXIT_IO && ((uint8_t *)run)[run->io.data_offset] == 3);
}

static volatile sig_atomic_t nr_alarms;
static atomic_int nr_queued, stop;

static void on_alarm(int number)
{
	(void)number;
	nr_alarms++;
}

static void on_queued(int number, siginfo_t *info, void *context)
{
	(void)number;
	(void)context;
	nr_queued += info->si_value.sival_int;
}

/* Counts in pages that are a guest's. */
static void *count(void *of)
{
	volatile uint64_t *words = of;

	for (uint64_t turn = 1; !stop; turn++) {
		words[turn % 1000 + 8] = turn;
		CHECK(words[turn % 1000 + 8] == turn);
		CHECK(turn < 1001 || words[(turn + 1) % 1000 + 8] == turn - 999);
	}
	return NULL;
}

/* Passes bytes to itself. */
static void *talk(void *unused)
{
	int ends[2];
	char data[64];

	CHECK(pipe(ends) == 0);
	for (unsigned turn = 0; !stop; turn++) {
		struct pollfd ready = {.fd = ends[0], .events = POLLIN};

		snprintf(data, sizeof(data), "%u", turn);
		CHECK(write(ends[1], data, sizeof(data)) == sizeof(data));
		memset(data, 0, sizeof(data));
		while (poll(&ready, 1, 1000) == -1)
			CHECK(errno == EINTR);
		CHECK(read(ends[0], data, sizeof(data)) == sizeof(data));
		CHECK((unsigned)atoi(data) == turn);
	}
	return unused;
}

/* Maps and unmaps pages, so that addresses are another's a moment later. */
static void *churn(void *unused)
{
	while (!stop) {
		uint8_t *mine = pages(PROT_READ | PROT_WRITE);

		memset(mine, 0x77, RAM);
		usleep(50);
		for (int at = 0; at < RAM; at++)
			CHECK(mine[at] == 0x77);
		CHECK(munmap(mine, RAM) == 0);
	}
	return unused;
}

/* Slots come and go while seven threads are busy and signals come every millisecond. */
static void busy(void)
{
	struct itimerval timer = {{0, 1000}, {0, 1000}};
	struct sigaction alarmed = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};
	struct sigaction queued = {.sa_sigaction = on_queued, .sa_flags = SA_SIGINFO | SA_RESTART};
	pthread_t others[7];
	int sent = 0;

	make();
	CHECK(sigaction(SIGALRM, &alarmed, NULL) == 0);
	CHECK(sigaction(SIGRTMIN, &queued, NULL) == 0);
	for (int i = 0; i < 3; i++)
		CHECK(pthread_create(&others[i], NULL, count, ram + 0x4000 * (i + 1)) == 0);
	for (int i = 3; i < 5; i++)
		CHECK(pthread_create(&others[i], NULL, talk, NULL) == 0);
	for (int i = 5; i < 7; i++)
		CHECK(pthread_create(&others[i], NULL, churn, NULL) == 0);
	CHECK(setitimer(ITIMER_REAL, &timer, NULL) == 0);
	for (int turn = 0; turn < ROUNDS; turn++) {
		uint8_t *more = pages(PROT_READ | PROT_WRITE);

		more[0] = turn;
		slot(1, HIGH, RAM, more);
		for (int i = 0; i < 7; i++, sent++)
			CHECK(pthread_sigqueue(others[i], SIGRTMIN, (union sigval){.sival_int = 1}) == 0);
		start();
		CHECK(enter() == KVM_EXIT_IO);
		CHECK(((uint8_t *)run)[run->io.data_offset] == turn);
		CHECK(enter() == KVM_EXIT_HLT);
		slot(1, HIGH, 0, more);
		CHECK(munmap(more, RAM) == 0);
	}
	stop = 1;
	for (int i = 0; i < 7; i++)
		CHECK(pthread_join(others[i], NULL) == 0);
	CHECK(nr_queued == sent);
	CHECK(nr_alarms > 0);
}

int main(int argc, char **argv)
{
	CHECK(argc == 2);
	if (strcmp(argv[1], "completed") == 0)
		completed();
	else if (strcmp(argv[1], "executable") == 0)
		executable();
	else if (strcmp(argv[1], "leaderless") == 0)
		leaderless();
	else if (strcmp(argv[1], "torn") == 0)
		torn();
	else if (strcmp(argv[1], "twice") == 0)
		twice();
	else if (strcmp(argv[1], "busy") == 0)
		busy();
	else
		CHECK(!"known case");
	return 0;
}
