/* The one ASID of the host is taken exactly as long as something refers to the VM. */
#include "client.h"

static void send_fd(int socket, int fd)
{
	char byte = 0, control[CMSG_SPACE(sizeof(int))] = {0};
	struct iovec iov = {&byte, 1};
	struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
				 .msg_controllen = sizeof(control)};
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);

	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(header), &fd, sizeof(int));
	CHECK(sendmsg(socket, &message, 0) == 1);
}

static int sev_vm(int kvm)
{
	int vm = vm_new(kvm);

	CHECK(sev_init(vm) == 0);
	return vm;
}

static void duplicates(int kvm)
{
	int vm = sev_vm(kvm), copy = dup(vm);

	CHECK(!asid_free(kvm));
	close(vm);
	CHECK(!asid_free(kvm));
	CHECK(ioctl(copy, KVM_CHECK_EXTENSION, KVM_CAP_NR_MEMSLOTS) > 0);
	close(copy);
	CHECK(asid_free(kvm));
}

static void reused_number(int kvm)
{
	int vm = sev_vm(kvm), other = vm_new(kvm);

	CHECK(dup2(other, vm) == vm);
	CHECK(asid_free(kvm));
	CHECK(ioctl(vm, KVM_CREATE_VCPU, 0) >= 0);
	FAILS(EEXIST, ioctl(other, KVM_CREATE_VCPU, 0));
	close(vm);
	close(other);
}

static void vcpus(int kvm)
{
	int vm = vm_new(kvm), vcpu;
	struct kvm_run *run;

	CHECK(sev_init(vm) == 0);
	vcpu = vcpu_new(vm, 0);
	close(vm);
	CHECK(!asid_free(kvm));
	run = run_page(vcpu);
	close(vcpu);
	CHECK(!asid_free(kvm));
	CHECK(munmap(run, 3 * 4096) == 0);
	CHECK(asid_free(kvm));
}

static void children(int kvm)
{
	int vm = sev_vm(kvm), pipes[2];
	pid_t child;
	char byte;

	CHECK(pipe(pipes) == 0);
	child = fork();
	if (child == 0) {
		close(pipes[1]);
		read(pipes[0], &byte, 1);
		_exit(0);
	}
	close(vm);
	CHECK(!asid_free(kvm));
	close(pipes[1]);
	CHECK(waitpid(child, NULL, 0) == child);
	CHECK(asid_free(kvm));
	close(pipes[0]);
}

static void in_flight(int kvm)
{
	int vm = sev_vm(kvm), sockets[2];

	CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) == 0);
	send_fd(sockets[0], vm);
	close(vm);
	CHECK(!asid_free(kvm));
	close(sockets[0]);
	CHECK(!asid_free(kvm));
	close(sockets[1]);
	CHECK(asid_free(kvm));
}

static void killed(int kvm)
{
	int ready[2], status;
	pid_t child;
	char byte;

	CHECK(pipe(ready) == 0);
	child = fork();
	if (child == 0) {
		int vm = sev_vm(kvm), vcpu;

		CHECK(ioctl(vm, KVM_CREATE_IRQCHIP, 0) == 0);
		vcpu = vcpu_new(vm, 0);
		run_page(vcpu);
		CHECK(write(ready[1], "x", 1) == 1);
		ioctl(vcpu, KVM_RUN, 0); /* halts for ever */
		_exit(0);
	}
	CHECK(read(ready[0], &byte, 1) == 1);
	usleep(20000);
	CHECK(!asid_free(kvm));
	kill(child, SIGKILL);
	CHECK(waitpid(child, &status, 0) == child && WIFSIGNALED(status));
	CHECK(asid_free(kvm));
}

static void executed(int kvm, char *self)
{
	int vm = sev_vm(kvm), status;
	pid_t child = fork();

	if (child == 0) {
		char number[16];

		snprintf(number, sizeof(number), "%d", kvm);
		fcntl(kvm, F_SETFD, 0);
		close(vm);
		vm = vm_new(kvm);
		/* Close-on-exec: the program it becomes holds nothing. */
		execl(self, self, number, NULL);
		_exit(1);
	}
	CHECK(waitpid(child, &status, 0) == child && status == 0);
	CHECK(!asid_free(kvm));
	close(vm);
	CHECK(asid_free(kvm));
}

int main(int argc, char **argv)
{
	int kvm;

	if (argc > 1)
		return ioctl(atoi(argv[1]), KVM_GET_API_VERSION, 0) == 12 ? 0 : 1;
	kvm = kvm_open();
	CHECK(asid_free(kvm));
	duplicates(kvm);
	reused_number(kvm);
	vcpus(kvm);
	children(kvm);
	in_flight(kvm);
	killed(kvm);
	executed(kvm, argv[0]);
	return 0;
}
