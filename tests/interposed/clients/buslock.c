/* Bus locks of a guest in 64-bit mode, one by one: what Linux's own test of them (6.16 and later)
 * asserts. 100 locked additions across a cache line; each is an exit, and what is in memory then
 * tells whether it was before the addition (AMD) or behind it (Intel). The vendor is KVM's, not
 * that of the CPU this runs on.
 *
 * Arguments: how many, and how far from a line's end the four bytes begin (2: they are split).
 * Ends with 4 where KVM has no bus lock exits.
 */
#include "client.h"

#define CODE 0x1000
#define GDT 0x2000
#define TABLES 0x3000
#define DATA 0x8000
#define SIZE 0x10000
#define UCALL_PORT 0x1000

/* again: lock add dword [rdi], 1; dec ecx; jnz again; mov dx, UCALL_PORT; in al, dx; hlt */
static const uint8_t code[] = {0xf0, 0x83, 0x07, 0x01, 0xff, 0xc9, 0x75, 0xf8,
			       0x66, 0xba, 0x00, 0x10, 0xec, 0xf4};
static uint8_t *memory;

static int is_intel(int kvm)
{
	struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[100];
	} cpuid = {.head.nent = 100};

	CHECK(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid) == 0);
	CHECK(cpuid.entries[0].function == 0);
	return cpuid.entries[0].ebx == 0x756e6547; /* Genu */
}

static void set_cpuid(int kvm, int vcpu)
{
	struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[100];
	} cpuid = {.head.nent = 100};

	CHECK(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid) == 0);
	CHECK(ioctl(vcpu, KVM_SET_CPUID2, &cpuid) == 0);
}

static void put(uint64_t at, uint64_t value)
{
	memcpy(memory + at, &value, sizeof(value));
}

static void fill_memory(void)
{
	memcpy(memory + CODE, code, sizeof(code));
	put(TABLES, (TABLES + 0x1000) | 7);
	put(TABLES + 0x1000, (TABLES + 0x2000) | 7);
	put(TABLES + 0x2000, 0x87); /* the first 2 MiB */
	put(GDT + 8, 0x00af9b000000ffff);
	put(GDT + 16, 0x00cf93000000ffff);
}

static void set_long_mode(int vcpu)
{
	struct kvm_segment cs = {.limit = -1, .selector = 8, .type = 11, .present = 1, .s = 1,
				 .l = 1, .g = 1};
	struct kvm_segment ds = {.limit = -1, .selector = 16, .type = 3, .present = 1, .s = 1,
				 .db = 1, .g = 1};
	struct kvm_sregs sregs;

	CHECK(ioctl(vcpu, KVM_GET_SREGS, &sregs) == 0);
	sregs.cs = cs;
	sregs.ds = sregs.es = sregs.ss = sregs.fs = sregs.gs = ds;
	sregs.gdt.base = GDT;
	sregs.gdt.limit = 0x17;
	sregs.cr0 = 0x80000021;
	sregs.cr3 = TABLES;
	sregs.cr4 = 0x220;
	sregs.efer = 0xd00;
	CHECK(ioctl(vcpu, KVM_SET_SREGS, &sregs) == 0);
}

int main(int argc, char **argv)
{
	int count = argc > 1 ? atoi(argv[1]) : 100, before = argc > 2 ? atoi(argv[2]) : 2;
	int kvm = kvm_open(), vm, vcpu, exits = 0, first = is_intel(kvm);
	uint64_t at = DATA + 64 - before;
	struct kvm_enable_cap exits_on = {.cap = KVM_CAP_X86_BUS_LOCK_EXIT,
					  .args = {KVM_BUS_LOCK_DETECTION_EXIT}};
	struct kvm_userspace_memory_region region = {.memory_size = SIZE};
	struct kvm_regs regs = {.rip = CODE, .rflags = 2, .rdi = at, .rcx = count};
	struct kvm_run *run;
	uint32_t value;

	if (ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_X86_BUS_LOCK_EXIT) == 0)
		return 4;
	memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(memory != MAP_FAILED);
	region.userspace_addr = (uint64_t)memory;
	fill_memory();
	vm = vm_new(kvm);
	CHECK(ioctl(vm, KVM_ENABLE_CAP, &exits_on) == 0);
	CHECK(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
	vcpu = vcpu_new(vm, 0);
	run = run_page(vcpu);
	set_cpuid(kvm, vcpu);
	set_long_mode(vcpu);
	CHECK(ioctl(vcpu, KVM_SET_REGS, &regs) == 0);
	for (;; exits++) {
		CHECK(ioctl(vcpu, KVM_RUN, 0) == 0);
		if (run->exit_reason == KVM_EXIT_IO)
			break;
		CHECK(run->exit_reason == KVM_EXIT_X86_BUS_LOCK);
		CHECK(run->flags == KVM_RUN_X86_BUS_LOCK);
		memcpy(&value, memory + at, sizeof(value));
		CHECK(value == (uint32_t)(exits + first));
	}
	CHECK(run->io.port == UCALL_PORT && run->flags == 0);
	memcpy(&value, memory + at, sizeof(value));
	CHECK(value == (uint32_t)count);
	printf("%d\n", exits);
	return 0;
}
