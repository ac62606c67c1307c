/*
 * What a supervisor of trapped system calls could do at best: a loop that receives a notification and
 * answers it.
 *
 *     answer PROGRAM ARGUMENT...
 *
 * Runs PROGRAM with every ioctl of KVM's type trapped, as `kvmsim run` does, and answers each of them
 * with 12, which is right for KVM_GET_API_VERSION. Ends with PROGRAM's exit status.
 */
#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/kvm.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef SECCOMP_IOCTL_NOTIF_SET_FLAGS
#define SECCOMP_IOCTL_NOTIF_SET_FLAGS SECCOMP_IOW(4, __u64)
#define SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP 1
#endif

#define FIELD(name) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, name))
#define UNLESS(value, skip) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, skip)

static void die(const char *what)
{
	fprintf(stderr, "answer: %s: %s\n", what, strerror(errno));
	exit(1);
}

static int install_filter(void)
{
	struct sock_filter code[] = {
		FIELD(arch), UNLESS(AUDIT_ARCH_X86_64, 6),
		FIELD(nr), UNLESS(__NR_ioctl, 4),
		FIELD(args[1]), BPF_STMT(BPF_ALU | BPF_AND | BPF_K, 0xff00), UNLESS(KVMIO << 8, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { .len = sizeof(code) / sizeof(*code), .filter = code };

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
		die("PR_SET_NO_NEW_PRIVS");
	return syscall(__NR_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER,
		       &program);
}

union control {
	struct cmsghdr header;
	char space[CMSG_SPACE(sizeof(int))];
};

static struct msghdr message(struct iovec *byte, union control *control)
{
	struct msghdr message = {
		.msg_iov = byte, .msg_iovlen = 1,
		.msg_control = control, .msg_controllen = sizeof(*control),
	};

	return message;
}

static void send_descriptor(int channel, int fd)
{
	char nothing = 0;
	struct iovec byte = { &nothing, 1 };
	union control control;
	struct msghdr out = message(&byte, &control);

	memset(&control, 0, sizeof(control));
	control.header.cmsg_level = SOL_SOCKET;
	control.header.cmsg_type = SCM_RIGHTS;
	control.header.cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(&control.header), &fd, sizeof(int));
	if (sendmsg(channel, &out, 0) != 1)
		die("sendmsg");
}

static int received_descriptor(int channel)
{
	char nothing;
	struct iovec byte = { &nothing, 1 };
	union control control;
	struct msghdr in = message(&byte, &control);
	int fd;

	if (recvmsg(channel, &in, MSG_CMSG_CLOEXEC) != 1 || in.msg_controllen == 0)
		die("no listener");
	memcpy(&fd, CMSG_DATA(&control.header), sizeof(int));
	return fd;
}

static void serve(int listener)
{
	struct pollfd ready = { .fd = listener, .events = POLLIN };

	while (poll(&ready, 1, -1) == 1 && (ready.revents & POLLIN)) {
		struct seccomp_notif call = { 0 };
		struct seccomp_notif_resp answer = { .val = 12 };

		if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &call) != 0)
			continue;
		answer.id = call.id;
		ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &answer);
	}
}

int main(int argc, char **argv)
{
	int channel[2], listener, status;
	pid_t child;

	if (argc < 2) {
		fprintf(stderr, "usage: answer PROGRAM ARGUMENT...\n");
		return 64;
	}
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, channel) != 0)
		die("socketpair");
	child = fork();
	if (child < 0)
		die("fork");
	if (child == 0) {
		listener = install_filter();
		if (listener < 0)
			die("seccomp");
		send_descriptor(channel[1], listener);
		close(listener);
		execv(argv[1], argv + 1);
		die(argv[1]);
	}
	close(channel[1]);
	listener = received_descriptor(channel[0]);
	/* Absent before Linux 6.6. */
	ioctl(listener, SECCOMP_IOCTL_NOTIF_SET_FLAGS, SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP);
	serve(listener);
	if (waitpid(child, &status, 0) < 0)
		die("waitpid");
	return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}
