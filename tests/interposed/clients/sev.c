/* The life of an SEV-ES guest: launch, secrets of its memory, mirror, move between processes. */
#include "client.h"
#include <linux/psp-sev.h>

#ifndef KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM
#define KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM 206
#endif

static uint32_t error;

static int sev(int vm, int fd, uint32_t id, void *data)
{
	struct kvm_sev_cmd command = {.id = id, .data = (uint64_t)data, .error = 77, .sev_fd = fd};
	int result = ioctl(vm, KVM_MEMORY_ENCRYPT_OP, &command);

	error = command.error;
	return result;
}

static int psp(int fd, uint32_t cmd, void *data)
{
	struct sev_issue_cmd command = {.cmd = cmd, .data = (uint64_t)data};
	int result = ioctl(fd, SEV_ISSUE_CMD, &command);

	error = command.error;
	return result;
}

static int enable(int vm, uint32_t cap, uint64_t source)
{
	struct kvm_enable_cap command = {.cap = cap, .args = {source}};

	return ioctl(vm, KVM_ENABLE_CAP, &command);
}

static uint32_t state_of(int vm, int device)
{
	struct kvm_sev_guest_status status = {0};

	CHECK(sev(vm, device, KVM_SEV_GUEST_STATUS, &status) == 0);
	return status.state;
}

static uint32_t guest_count(int device)
{
	struct sev_user_data_status status;

	CHECK(psp(device, SEV_PLATFORM_STATUS, &status) == 0);
	return status.guest_count;
}

static void launch(int vm, int device, char *memory)
{
	struct kvm_sev_launch_start start = {.policy = 4};
	struct kvm_sev_launch_update_data load = {.uaddr = (uint64_t)memory, .len = 8192};
	struct kvm_enc_region region = {.addr = (uint64_t)memory, .size = 8192};
	struct kvm_sev_launch_measure measure = {0};
	char blob[48] = {0}, zeros[48] = {0};

	FAILS(EBADF, sev(vm, -1, KVM_SEV_LAUNCH_START, &start));
	FAILS(EBADF, sev(vm, vm, KVM_SEV_LAUNCH_START, &start));
	CHECK(sev(vm, device, KVM_SEV_LAUNCH_START, &start) == 0 && start.handle != 0);
	CHECK(state_of(vm, device) == 1 && guest_count(device) == 1);
	CHECK(ioctl(vm, KVM_MEMORY_ENCRYPT_REG_REGION, &region) == 0);
	CHECK(sev(vm, device, KVM_SEV_LAUNCH_UPDATE_DATA, &load) == 0);
	CHECK(memcmp(memory, "plain text", 10) != 0);
	load.uaddr = (uint64_t)memory + 2 * 4096; /* its second page is the hole */
	FAILS(ENOMEM, sev(vm, device, KVM_SEV_LAUNCH_UPDATE_DATA, &load));
	CHECK(sev(vm, device, KVM_SEV_LAUNCH_UPDATE_VMSA, NULL) == 0);
	FAILS(EIO, sev(vm, device, KVM_SEV_LAUNCH_MEASURE, &measure));
	CHECK(error == SEV_RET_INVALID_LEN && measure.len == sizeof(blob));
	measure.uaddr = (uint64_t)blob;
	CHECK(sev(vm, device, KVM_SEV_LAUNCH_MEASURE, &measure) == 0);
	CHECK(memcmp(blob, zeros, sizeof(blob)) != 0 && state_of(vm, device) == 2);
	CHECK(sev(vm, device, KVM_SEV_LAUNCH_FINISH, NULL) == 0 && state_of(vm, device) == 3);
}

static void look_inside(int vm, int device, char *memory)
{
	char seen[10];
	struct kvm_sev_dbg debug = {
		.src_uaddr = (uint64_t)memory, .dst_uaddr = (uint64_t)seen, .len = sizeof(seen)};

	CHECK(sev(vm, device, KVM_SEV_DBG_DECRYPT, &debug) == 0);
	CHECK(memcmp(seen, "plain text", 10) == 0);
}

/* A child has another address space: its parent's VM is closed to it, but it can take the guest. */
static void move_to_child(int kvm, int vm, int device)
{
	int status;
	pid_t child = fork();

	CHECK(child >= 0);
	if (child == 0) {
		int mine = vm_new(kvm);

		FAILS(EIO, ioctl(vm, KVM_CHECK_EXTENSION, 0));
		FAILS(EINVAL, enable(mine, KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM, vm));
		vcpu_new(mine, 0);
		CHECK(enable(mine, KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM, vm) == 0);
		CHECK(guest_count(device) == 1);
		_exit(0);
	}
	CHECK(waitpid(child, &status, 0) == child && status == 0);
	FAILS(EIO, ioctl(vm, KVM_CHECK_EXTENSION, 0));
	CHECK(guest_count(device) == 0);
}

int main(void)
{
	int kvm = kvm_open(), device = open("/dev/sev", O_RDONLY), writer = open("/dev/sev", O_RDWR);
	int vm = vm_new(kvm), mirror = vm_new(kvm);
	char *memory = mmap(NULL, 4 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(device >= 0 && writer >= 0 && memory != MAP_FAILED);
	FAILS(EPERM, psp(device, SEV_PDH_GEN, NULL));
	CHECK(psp(writer, SEV_PDH_GEN, NULL) == 0);
	close(writer);

	strcpy(memory, "plain text");
	munmap(memory + 3 * 4096, 4096);
	CHECK(sev(vm, 0, KVM_SEV_ES_INIT, NULL) == 0 && error == 0);
	FAILS(EINVAL, sev(vm, 0, KVM_SEV_ES_INIT, NULL));
	vcpu_new(vm, 0);
	launch(vm, device, memory);
	look_inside(vm, device, memory);

	FAILS(EBADF, enable(mirror, KVM_CAP_VM_COPY_ENC_CONTEXT_FROM, 99));
	FAILS(EBADF, enable(mirror, KVM_CAP_VM_COPY_ENC_CONTEXT_FROM, device));
	FAILS(EINVAL, enable(mirror, KVM_CAP_VM_COPY_ENC_CONTEXT_FROM, mirror));
	CHECK(enable(mirror, KVM_CAP_VM_COPY_ENC_CONTEXT_FROM, vm) == 0);
	look_inside(mirror, -1, memory);
	FAILS(EINVAL, sev(mirror, device, KVM_SEV_LAUNCH_FINISH, NULL));
	close(mirror);

	move_to_child(kvm, vm, device);
	return 0;
}
