/* What a container runtime asks of /sys/fs/cgroup. */
#include "client.h"
#include <linux/bpf.h>
#include <linux/magic.h>
#include <sys/statfs.h>
#include <sys/syscall.h>

static long bpf(int command, union bpf_attr *attr)
{
	return syscall(SYS_bpf, command, attr, sizeof(*attr));
}

int main(void)
{
	struct statfs status;
	union bpf_attr attr;
	uint32_t programs[4];
	int directory, other;

	CHECK(statfs("/sys/fs/cgroup", &status) == 0);
	CHECK(status.f_type == CGROUP2_SUPER_MAGIC && status.f_namelen == 255);
	CHECK(statfs("/sys/fs/cgroup/child", &status) == 0);
	CHECK(status.f_type == CGROUP2_SUPER_MAGIC);
	FAILS(ENOENT, statfs("/sys/fs/cgroup/none", &status));
	FAILS(EFAULT, statfs("/sys/fs/cgroup", (struct statfs *)8));
	FAILS(EFAULT, statfs((char *)8, &status));
	CHECK(statfs("/proc", &status) == 0 && status.f_type == PROC_SUPER_MAGIC);

	directory = open("/sys/fs/cgroup/child", O_PATH | O_DIRECTORY);
	CHECK(directory >= 0 && fstatfs(directory, &status) == 0);
	CHECK(status.f_type == CGROUP2_SUPER_MAGIC);
	CHECK(fchdir(directory) == 0 && statfs("..", &status) == 0);
	CHECK(status.f_type == CGROUP2_SUPER_MAGIC);
	other = open("/proc", O_RDONLY | O_DIRECTORY);
	CHECK(fstatfs(other, &status) == 0 && status.f_type == PROC_SUPER_MAGIC);
	FAILS(EBADF, fstatfs(999, &status));

	memset(&attr, 0, sizeof(attr));
	attr.query.target_fd = directory;
	attr.query.attach_type = BPF_CGROUP_DEVICE;
	attr.query.prog_ids = (uint64_t)programs;
	attr.query.prog_cnt = 4;
	CHECK(bpf(BPF_PROG_QUERY, &attr) == 0 && attr.query.prog_cnt == 0);
	memset(&attr, 0, sizeof(attr));
	attr.target_fd = directory;
	attr.attach_type = BPF_CGROUP_DEVICE;
	CHECK(bpf(BPF_PROG_ATTACH, &attr) == 0);
	CHECK(bpf(BPF_PROG_DETACH, &attr) == 0);
	attr.target_fd = other;
	CHECK(bpf(BPF_PROG_ATTACH, &attr) == -1);
	FAILS(EFAULT, bpf(BPF_PROG_ATTACH, (union bpf_attr *)8));
	return 0;
}
