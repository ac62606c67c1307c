/* A guest that halts, takes an interrupt for each signal of an irqfd, and answers by a write that
 * signals an ioeventfd. Runs on Linux's KVM as well. Prints how many exits there were. */
#include "client.h"

#include <poll.h>
#include <sys/eventfd.h>

#define BASE 0x1000
#define HANDLER 0x2000
#define RAM (1 << 20)
#define ROUNDS 200
#define LINE 5
#define PORT 0x90
#define OUT(port, value) 0xb0, value, 0xe6, port /* mov al, value; out port, al */

static const uint8_t code[] = {
	OUT(0x20, 0x11), OUT(0x21, 0x08), OUT(0x21, 0x04), OUT(0x21, 0x01), OUT(0x21, 0xdf),
	OUT(PORT, 1),	 0xfb,		  0xf4,		   0xeb,	    0xfd, /* sti; hlt; jmp hlt */
};
static const uint8_t handler[] = {OUT(PORT, 1), OUT(0x20, 0x20), 0xcf /* iret */};

static int vcpu, nr_exits;

static void *run(void *unused)
{
	while (ioctl(vcpu, KVM_RUN, 0) == 0)
		nr_exits++;
	return unused;
}

static void wait_for(int fd)
{
	struct pollfd poll_fd = {.fd = fd, .events = POLLIN};
	uint64_t count;

	CHECK(poll(&poll_fd, 1, 20000) == 1);
	CHECK(read(fd, &count, sizeof(count)) == sizeof(count) && count == 1);
}

int main(void)
{
	int kvm = kvm_open(), vm = vm_new(kvm);
	int line = eventfd(0, EFD_CLOEXEC), answer = eventfd(0, EFD_CLOEXEC);
	uint8_t *ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct kvm_userspace_memory_region region = {.memory_size = RAM, .userspace_addr = (uint64_t)ram};
	struct kvm_irqfd irqfd = {.fd = line, .gsi = LINE};
	struct kvm_ioeventfd ioeventfd = {
		.addr = PORT, .len = 1, .fd = answer, .flags = KVM_IOEVENTFD_FLAG_PIO};
	struct kvm_regs regs = {.rip = BASE, .rflags = 2, .rsp = 0x8000};
	struct kvm_sregs sregs;
	uint64_t one = 1;
	pthread_t thread;

	CHECK(ram != MAP_FAILED);
	memcpy(ram + BASE, code, sizeof(code));
	memcpy(ram + HANDLER, handler, sizeof(handler));
	*(uint32_t *)(ram + 4 * (8 + LINE)) = HANDLER;
	CHECK(ioctl(vm, KVM_CREATE_IRQCHIP, 0) == 0);
	CHECK(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
	vcpu = vcpu_new(vm, 0);
	CHECK(ioctl(vcpu, KVM_GET_SREGS, &sregs) == 0);
	sregs.cs.base = sregs.cs.selector = 0;
	CHECK(ioctl(vcpu, KVM_SET_SREGS, &sregs) == 0);
	CHECK(ioctl(vcpu, KVM_SET_REGS, &regs) == 0);
	CHECK(ioctl(vm, KVM_IRQFD, &irqfd) == 0);
	FAILS(EBUSY, ioctl(vm, KVM_IRQFD, &irqfd));
	CHECK(ioctl(vm, KVM_IOEVENTFD, &ioeventfd) == 0);
	FAILS(EEXIST, ioctl(vm, KVM_IOEVENTFD, &ioeventfd));
	CHECK(pthread_create(&thread, NULL, run, NULL) == 0);
	wait_for(answer); /* the guest is ready */
	for (int round = 0; round < ROUNDS; round++) {
		CHECK(write(line, &one, sizeof(one)) == sizeof(one));
		wait_for(answer);
	}
	printf("%d exits\n", nr_exits);
	fflush(stdout);
	_exit(0);
}
