/* Guests of real code: code CASE. Every case makes a VM, runs it and checks what came of it. */
#include "client.h"

#include <sys/syscall.h>

#define BASE 0x1000
#define RAM (1 << 20)
#define CAP_BUS_LOCK_EXIT 193
#define EXIT_BUS_LOCK 33

struct vm {
	int kvm, vm;
	uint8_t *ram;
	int vcpu[4];
	struct kvm_run *run[4];
};

static void slot(struct vm *vm, int number, uint64_t gpa, uint64_t size, void *memory, int flags)
{
	struct kvm_userspace_memory_region region = {
		.slot = number,
		.flags = flags,
		.guest_phys_addr = gpa,
		.memory_size = size,
		.userspace_addr = (uint64_t)memory,
	};

	CHECK(ioctl(vm->vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
}

static void vcpu(struct vm *vm, int id)
{
	vm->vcpu[id] = vcpu_new(vm->vm, id);
	vm->run[id] = run_page(vm->vcpu[id]);
}

/* Real mode, at BASE in segment 0, with BX as given. */
static void start(struct vm *vm, int id, uint64_t bx)
{
	struct kvm_sregs sregs;
	struct kvm_regs regs = {.rip = BASE, .rflags = 2, .rbx = bx, .rsp = 0x8000};

	CHECK(ioctl(vm->vcpu[id], KVM_GET_SREGS, &sregs) == 0);
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	CHECK(ioctl(vm->vcpu[id], KVM_SET_SREGS, &sregs) == 0);
	CHECK(ioctl(vm->vcpu[id], KVM_SET_REGS, &regs) == 0);
}

/* What has to be said before there is a vCPU. */
static int detects, encrypts;

static struct vm make(const void *code, size_t size)
{
	struct vm vm = {.kvm = kvm_open()};

	struct kvm_enable_cap cap = {.cap = CAP_BUS_LOCK_EXIT, .args = {2}};

	vm.vm = vm_new(vm.kvm);
	if (detects)
		CHECK(ioctl(vm.vm, KVM_ENABLE_CAP, &cap) == 0);
	if (encrypts)
		sev_init(vm.vm);
	vm.ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(vm.ram != MAP_FAILED);
	memcpy(vm.ram + BASE, code, size);
	slot(&vm, 0, 0, RAM, vm.ram, 0);
	vcpu(&vm, 0);
	start(&vm, 0, 0);
	return vm;
}

#define MAKE(code) make(code, sizeof(code) - 1)

static int run(struct vm *vm, int id)
{
	CHECK(ioctl(vm->vcpu[id], KVM_RUN, 0) == 0);
	return vm->run[id]->exit_reason;
}

static struct kvm_regs regs(struct vm *vm, int id)
{
	struct kvm_regs regs;

	CHECK(ioctl(vm->vcpu[id], KVM_GET_REGS, &regs) == 0);
	return regs;
}

static uint8_t *io_data(struct vm *vm, int id)
{
	return (uint8_t *)vm->run[id] + vm->run[id]->io.data_offset;
}

static const char SPIN[] = "\xf0\xff\x06\x00\x20" /* lock inc word [0x2000] */
			   "\xeb\xf9";		   /* jmp start */

/* Ports, memory that is not there, memory that is, and HLT. */
static void basics(void)
{
	static const char code[] = "\xb0\x41\xe6\x10"		 /* mov al,'A'; out 0x10,al */
				   "\xe4\x11\x04\x01\xe6\x12"	 /* in al,0x11; add al,1; out 0x12,al */
				   "\xb8\x00\xf0\x8e\xd8"	 /* mov ax,0xf000; mov ds,ax */
				   "\xc6\x06\x00\x10\x5a"	 /* mov byte [0x1000],0x5a: 0xf1000 */
				   "\xb8\xff\xff\x8e\xd8"	 /* mov ax,0xffff; mov ds,ax */
				   "\xc7\x06\x10\x10\x34\x12"	 /* mov word [0x1010],0x1234: 0x101000 */
				   "\xa1\x20\x10"		 /* mov ax,[0x1020]: 0x101010 */
				   "\xf4";			 /* hlt */
	struct vm vm = MAKE(code);
	struct kvm_run *page = vm.run[0];

	CHECK(run(&vm, 0) == KVM_EXIT_IO);
	CHECK(page->io.direction == KVM_EXIT_IO_OUT && page->io.port == 0x10);
	CHECK(page->io.size == 1 && page->io.count == 1 && *io_data(&vm, 0) == 'A');
	CHECK(run(&vm, 0) == KVM_EXIT_IO);
	CHECK(page->io.direction == KVM_EXIT_IO_IN && page->io.port == 0x11);
	*io_data(&vm, 0) = 0x30;
	CHECK(run(&vm, 0) == KVM_EXIT_IO);
	CHECK(page->io.port == 0x12 && *io_data(&vm, 0) == 0x31);
	CHECK(run(&vm, 0) == KVM_EXIT_MMIO);
	CHECK(page->mmio.is_write && page->mmio.phys_addr == 0x101000 && page->mmio.len == 2);
	CHECK(page->mmio.data[0] == 0x34 && page->mmio.data[1] == 0x12);
	CHECK(vm.ram[0xf1000] == 0x5a);
	CHECK(run(&vm, 0) == KVM_EXIT_MMIO);
	CHECK(!page->mmio.is_write && page->mmio.phys_addr == 0x101010 && page->mmio.len == 2);
	memcpy(page->mmio.data, "\xcd\xab", 2);
	CHECK(run(&vm, 0) == KVM_EXIT_HLT);
	CHECK((regs(&vm, 0).rax & 0xffff) == 0xabcd);
	CHECK(regs(&vm, 0).rip == BASE + sizeof(code) - 1);
}

/* What the client writes between two exits is what the guest executes and reads. */
static void seen(void)
{
	static const char code[] = "\xa1\x00\x20\xe7\x10\xf4"; /* mov ax,[0x2000]; out 0x10,ax; hlt */
	static const char other[] = "\xb8\x11\x11\xe7\x10\xf4"; /* mov ax,0x1111; ... */
	struct vm vm = MAKE(code);

	for (int turn = 1; turn <= 20; turn++) {
		*(uint16_t *)(vm.ram + 0x2000) = turn;
		start(&vm, 0, 0);
		CHECK(run(&vm, 0) == KVM_EXIT_IO && *(uint16_t *)io_data(&vm, 0) == turn);
	}
	memcpy(vm.ram + BASE, other, sizeof(other) - 1);
	start(&vm, 0, 0);
	CHECK(run(&vm, 0) == KVM_EXIT_IO && *(uint16_t *)io_data(&vm, 0) == 0x1111);
}

static void *run_until_hlt(void *of)
{
	struct vm *vm = ((void **)of)[0];
	int id = (intptr_t)((void **)of)[1];

	for (;;) {
		if (ioctl(vm->vcpu[id], KVM_RUN, 0) == 0) {
			CHECK(vm->run[id]->exit_reason == KVM_EXIT_HLT);
			return NULL;
		}
		CHECK(errno == EINTR);
	}
}

/* Two vCPUs add to one word under a spinlock made with XCHG. */
static void spinlock(void)
{
	static const char code[] = "\xb9\xe8\x03"		/* mov cx,1000 */
				   "\xb0\x01"			/* again: mov al,1 */
				   "\x86\x06\x00\x20"		/* xchg al,[0x2000] */
				   "\x84\xc0\x75\xf6"		/* test al,al; jnz again */
				   "\xa1\x02\x20\x40"		/* mov ax,[0x2002]; inc ax */
				   "\xa3\x02\x20"		/* mov [0x2002],ax */
				   "\xc6\x06\x00\x20\x00"	/* mov byte [0x2000],0 */
				   "\xe2\xe8\xf4";		/* loop again; hlt */
	struct vm vm = MAKE(code);
	pthread_t threads[2];
	void *of[2][2] = {{&vm, (void *)0}, {&vm, (void *)1}};

	vcpu(&vm, 1);
	start(&vm, 1, 0);
	for (int id = 0; id < 2; id++)
		CHECK(pthread_create(&threads[id], NULL, run_until_hlt, of[id]) == 0);
	for (int id = 0; id < 2; id++)
		CHECK(pthread_join(threads[id], NULL) == 0);
	CHECK(*(uint16_t *)(vm.ram + 0x2002) == 2000);
}

/* Both vCPUs wait for the other one again and again: neither may be starved. */
static void pingpong(void)
{
	static const char code[] = "\xb9\x32\x00"		/* mov cx,50 */
				   "\x38\x1e\x00\x20\x75\xfa"	/* again: cmp [0x2000],bl; jne again */
				   "\x88\x3e\x00\x20"		/* mov [0x2000],bh */
				   "\xe2\xf4\xf4";		/* loop again; hlt */
	struct vm vm = MAKE(code);
	pthread_t threads[2];
	void *of[2][2] = {{&vm, (void *)0}, {&vm, (void *)1}};

	vcpu(&vm, 1);
	start(&vm, 0, 0x0100);
	start(&vm, 1, 0x0001);
	for (int id = 0; id < 2; id++)
		CHECK(pthread_create(&threads[id], NULL, run_until_hlt, of[id]) == 0);
	for (int id = 0; id < 2; id++)
		CHECK(pthread_join(threads[id], NULL) == 0);
}

/* Bus locks: every one is an exit, none is missed, none comes twice. */
static void locks(int wanted, const char *kind)
{
	static const char split[] = "\x66\xf0\xff\x06\x3e\x20\xeb\xf8";	  /* lock inc dword [0x203e] */
	static const char aligned[] = "\x66\xf0\xff\x06\x40\x20\xeb\xf8"; /* lock inc dword [0x2040] */
	int crosses = strcmp(kind, "split") == 0;
	uint32_t counted;
	struct vm vm;
	int exits = 0;

	detects = 1;
	vm = crosses ? MAKE(split) : MAKE(aligned);
	if (!crosses) {
		/* Nothing else ends it: a timer does. */
		struct itimerval soon = {.it_value = {.tv_usec = 500000}};

		CHECK(setitimer(ITIMER_REAL, &soon, NULL) == 0);
		FAILS(EINTR, ioctl(vm.vcpu[0], KVM_RUN, 0));
		CHECK(*(uint32_t *)(vm.ram + 0x2040) > 1000);
		return;
	}
	while (exits < wanted) {
		CHECK(run(&vm, 0) == EXIT_BUS_LOCK);
		CHECK(vm.run[0]->flags == 1 << 1);
		exits++;
	}
	memcpy(&counted, vm.ram + 0x203e, 4);
	/* Faults come before the instruction, traps behind it. */
	CHECK(counted == (uint32_t)wanted - (regs(&vm, 0).rip == BASE));
	printf("%d\n", exits);
}

static void on_signal(int number)
{
	(void)number;
}

/* A guest that does nothing else is interrupted by a signal, at the right place each time. */
static void signalled(void)
{
	struct vm vm = MAKE(SPIN);
	struct itimerval soon = {.it_value = {.tv_usec = 20000}};
	uint16_t before = 0;

	for (int turn = 0; turn < 10;) {
		CHECK(setitimer(ITIMER_REAL, &soon, NULL) == 0);
		FAILS(EINTR, ioctl(vm.vcpu[0], KVM_RUN, 0));
		CHECK(vm.run[0]->exit_reason == KVM_EXIT_INTR);
		CHECK(regs(&vm, 0).rip == BASE || regs(&vm, 0).rip == BASE + 5);
		/* On a busy machine the signal may come before the guest has begun. */
		turn += *(uint16_t *)(vm.ram + 0x2000) != before;
		before = *(uint16_t *)(vm.ram + 0x2000);
	}
}

/* Where the descriptor or the VM goes away under it, the call fails: its errno. */
static void *spin(void *of)
{
	struct vm *vm = of;

	return (void *)(intptr_t)(ioctl(vm->vcpu[0], KVM_RUN, 0) ? errno : 0);
}

/* Calls of other threads are answered while a guest spins; microseconds of the slowest. */
static void answered(void)
{
	struct vm vm = MAKE(SPIN);
	struct vm other = MAKE("\xe6\x10\xeb\xfc"); /* out 0x10,al; jmp */
	double slowest = 0, began, all;
	pthread_t thread;

	CHECK(pthread_create(&thread, NULL, spin, &vm) == 0);
	usleep(20000);
	for (int turn = 0; turn < 1000; turn++) {
		began = seconds();
		CHECK(ioctl(vm.kvm, KVM_GET_API_VERSION, 0) == 12);
		if (seconds() - began > slowest)
			slowest = seconds() - began;
	}
	all = seconds();
	for (int turn = 0; turn < 1000; turn++)
		CHECK(run(&other, 0) == KVM_EXIT_IO);
	printf("slowest %.0f us, exit %.0f us\n", slowest * 1e6, (seconds() - all) * 1e3);
	fflush(stdout);
	_exit(0);
}

/* The memory of a guest that executes is replaced under it. */
static void changed(void)
{
	static const char code[] = "\xa1\x00\x80\x83\xf8\x07" /* mov ax,[0x8000]; cmp ax,7 */
				   "\x75\xf8\xe7\x10\xeb\xf4"; /* jne; out 0x10,ax; jmp */
	struct vm vm = MAKE(code);
	uint8_t *other = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	pthread_t thread;

	slot(&vm, 0, 0, 0, vm.ram, 0);
	slot(&vm, 0, 0, 0x8000, vm.ram, 0);
	slot(&vm, 1, 0x8000, 4096, vm.ram + 0x8000, 0);
	*(uint16_t *)other = 7;
	CHECK(pthread_create(&thread, NULL, spin, &vm) == 0);
	usleep(50000);
	CHECK(vm.run[0]->exit_reason == 0);
	slot(&vm, 1, 0x8000, 0, vm.ram + 0x8000, 0);
	CHECK(pthread_join(thread, NULL) == 0);
	CHECK(vm.run[0]->exit_reason == KVM_EXIT_MMIO && vm.run[0]->mmio.phys_addr == 0x8000);
	memcpy(vm.run[0]->mmio.data, "\x06\x00", 2);
	slot(&vm, 1, 0x8000, 4096, vm.ram + 0x8000, 0);
	CHECK(pthread_create(&thread, NULL, spin, &vm) == 0);
	usleep(50000);
	slot(&vm, 1, 0x8000, 0, vm.ram + 0x8000, 0);
	CHECK(pthread_join(thread, NULL) == 0);
	memcpy(vm.run[0]->mmio.data, "\x06\x00", 2);
	slot(&vm, 1, 0x8000, 4096, other, 0);
	CHECK(run(&vm, 0) == KVM_EXIT_IO && *(uint16_t *)io_data(&vm, 0) == 7);
}

/* Read-only memory, the same pages at two places, a slot that moves, memory of all kinds. */
static void kinds(void)
{
	static const char code[] = "\xb8\x00\x10\x8e\xd8"	/* mov ax,0x1000; mov ds,ax */
				   "\xa1\x00\x00\xe7\x10"	/* mov ax,[0]: 0x10000; out 0x10,ax */
				   "\xa3\x00\x00"		/* mov [0],ax */
				   "\xa1\x00\x10\xe7\x10"	/* mov ax,[0x1000]: 0x11000; out 0x10,ax */
				   "\xc7\x06\x00\x10\x99\x00"	/* mov word [0x1000],0x99 */
				   "\xa1\x00\x20\xe7\x10\xf4";	/* mov ax,[0x2000]: 0x12000; out; hlt */
	struct vm vm = MAKE(code);
	int fd = memfd_create("ram", 0);
	uint8_t *shared;

	CHECK(ftruncate(fd, 16384) == 0);
	shared = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 8192);
	CHECK(shared != MAP_FAILED);
	slot(&vm, 0, 0, 0, vm.ram, 0);
	slot(&vm, 0, 0, 0x10000, vm.ram, 0);
	slot(&vm, 1, 0x10000, 4096, vm.ram + 0x20000, KVM_MEM_READONLY);
	slot(&vm, 2, 0x11000, 4096, shared + 4096, 0);
	slot(&vm, 3, 0x19000, 4096, shared + 4096, 0);
	slot(&vm, 3, 0x12000, 4096, shared + 4096, 0);
	*(uint16_t *)(vm.ram + 0x20000) = 0x77;
	*(uint16_t *)(shared + 4096) = 0x88;
	CHECK(run(&vm, 0) == KVM_EXIT_IO && *(uint16_t *)io_data(&vm, 0) == 0x77);
	CHECK(run(&vm, 0) == KVM_EXIT_MMIO && vm.run[0]->mmio.is_write);
	CHECK(vm.run[0]->mmio.phys_addr == 0x10000 && vm.run[0]->mmio.data[0] == 0x77);
	CHECK(run(&vm, 0) == KVM_EXIT_IO && *(uint16_t *)io_data(&vm, 0) == 0x88);
	CHECK(run(&vm, 0) == KVM_EXIT_IO && *(uint16_t *)io_data(&vm, 0) == 0x99);
	CHECK(*(uint16_t *)(shared + 4096) == 0x99);
	CHECK(run(&vm, 0) == KVM_EXIT_HLT);
}

/* Pages the guest writes are in the log, once, also while it spins. */
static void logged(void)
{
	static const char code[] = "\xc6\x06\x00\x50\x01"	  /* mov byte [0x5000],1 */
				   "\xe6\x10"			  /* out 0x10,al */
				   "\xff\x06\x00\x70\xeb\xfa"; /* spin: inc word [0x7000]; jmp */
	struct vm vm = MAKE(code);
	uint64_t bits[4] = {0};
	struct kvm_dirty_log log = {.slot = 0, .dirty_bitmap = bits};
	pthread_t thread;

	slot(&vm, 0, 0, RAM, vm.ram, KVM_MEM_LOG_DIRTY_PAGES);
	CHECK(run(&vm, 0) == KVM_EXIT_IO);
	CHECK(ioctl(vm.vm, KVM_GET_DIRTY_LOG, &log) == 0);
	CHECK(bits[0] == 1 << 5 && !bits[1] && !bits[2] && !bits[3]);
	CHECK(ioctl(vm.vm, KVM_GET_DIRTY_LOG, &log) == 0);
	CHECK(!bits[0]);
	CHECK(pthread_create(&thread, NULL, spin, &vm) == 0);
	for (int turn = 0; turn < 20; turn++) {
		do {
			usleep(1000);
			CHECK(ioctl(vm.vm, KVM_GET_DIRTY_LOG, &log) == 0);
		} while (!bits[0]);
		CHECK(bits[0] == 1 << 7);
	}
	pthread_kill(thread, SIGALRM);
	CHECK(pthread_join(thread, NULL) == 0);
	CHECK(vm.ram[0x5000] == 1);
}

/* The guest spins until the client is ended from outside, or ends with it. */
static void forever(const char *how)
{
	pthread_t thread;
	struct vm vm;
	void *error;

	encrypts = 1;
	vm = MAKE(SPIN);
	CHECK(pthread_create(&thread, NULL, spin, &vm) == 0);
	usleep(50000);
	if (strcmp(how, "exit") == 0)
		_exit(0);
	if (strcmp(how, "kill") == 0)
		kill(getpid(), SIGKILL);
	if (strcmp(how, "close") == 0) {
		/* The call holds the file, as on Linux; a signal ends it. */
		close(vm.vm);
		close(vm.vcpu[0]);
		pthread_kill(thread, SIGALRM);
		CHECK(pthread_join(thread, NULL) == 0);
		return;
	}
	printf("spins %d\n", getpid());
	fflush(stdout);
	CHECK(pthread_join(thread, &error) == 0);
	printf("errno %d\n", (int)(intptr_t)error);
	fflush(stdout);
	pause();
}

int main(int argc, char **argv)
{
	struct sigaction action = {.sa_handler = on_signal};

	CHECK(argc >= 2);
	CHECK(sigaction(SIGALRM, &action, NULL) == 0);
	if (strcmp(argv[1], "basics") == 0)
		basics();
	else if (strcmp(argv[1], "seen") == 0)
		seen();
	else if (strcmp(argv[1], "spinlock") == 0)
		spinlock();
	else if (strcmp(argv[1], "pingpong") == 0)
		pingpong();
	else if (strcmp(argv[1], "locks") == 0)
		locks(atoi(argv[2]), argv[3]);
	else if (strcmp(argv[1], "signalled") == 0)
		signalled();
	else if (strcmp(argv[1], "answered") == 0)
		answered();
	else if (strcmp(argv[1], "changed") == 0)
		changed();
	else if (strcmp(argv[1], "kinds") == 0)
		kinds();
	else if (strcmp(argv[1], "logged") == 0)
		logged();
	else if (strcmp(argv[1], "forever") == 0)
		forever(argv[2]);
	else
		return 2;
	return 0;
}
