/* KVM_RUN of a guest that halts for ever, in a VM with an in-kernel APIC. */
#include "client.h"

static volatile sig_atomic_t handled;
static struct kvm_run *run;
static int vcpu;

static void handler(int number)
{
	handled = number;
}

static void leave(int number)
{
	handled = number;
	run->immediate_exit = 1;
}

static void install(void (*function)(int), int flags)
{
	struct sigaction action = {.sa_handler = function, .sa_flags = flags};

	CHECK(sigaction(SIGALRM, &action, NULL) == 0);
}

static void alarm_in(int microseconds)
{
	struct itimerval timer = {.it_value.tv_usec = microseconds};

	handled = 0;
	CHECK(setitimer(ITIMER_REAL, &timer, NULL) == 0);
}

static void *kick(void *thread)
{
	usleep(20000);
	pthread_kill(*(pthread_t *)thread, SIGALRM);
	return NULL;
}

static void *get_regs(void *result)
{
	struct kvm_regs regs;

	*(int *)result = ioctl(vcpu, KVM_GET_REGS, &regs) == 0 ? 1 : -errno;
	return NULL;
}

int main(void)
{
	int kvm = kvm_open(), vm = vm_new(kvm), result = 0;
	pthread_t self = pthread_self(), other;
	struct kvm_mp_state state;
	sigset_t alarms, old;

	CHECK(ioctl(vm, KVM_CREATE_IRQCHIP, 0) == 0);
	vcpu = vcpu_new(vm, 0);
	run = run_page(vcpu);

	/* Without SA_RESTART, with it, and leaving by immediate_exit as QEMU does. */
	install(handler, 0);
	alarm_in(30000);
	FAILS(EINTR, ioctl(vcpu, KVM_RUN, 0));
	CHECK(handled && run->exit_reason == KVM_EXIT_INTR);
	CHECK(ioctl(vcpu, KVM_GET_MP_STATE, &state) == 0 && state.mp_state == KVM_MP_STATE_HALTED);
	install(handler, SA_RESTART);
	alarm_in(30000);
	FAILS(EINTR, ioctl(vcpu, KVM_RUN, 0));
	CHECK(handled);
	install(leave, 0);
	alarm_in(30000);
	FAILS(EINTR, ioctl(vcpu, KVM_RUN, 0));
	CHECK(handled && run->immediate_exit);
	FAILS(EINTR, ioctl(vcpu, KVM_RUN, 0));
	run->immediate_exit = 0;

	/* A signal for this very thread; a short wait each time. */
	install(handler, 0);
	for (int round = 0; round < 3; round++) {
		handled = 0;
		CHECK(pthread_create(&other, NULL, kick, &self) == 0);
		FAILS(EINTR, ioctl(vcpu, KVM_RUN, 0));
		CHECK(pthread_join(other, NULL) == 0 && handled);
	}

	/* A blocked or ignored signal does not count; the next one does. */
	sigemptyset(&alarms);
	sigaddset(&alarms, SIGALRM);
	CHECK(sigprocmask(SIG_BLOCK, &alarms, &old) == 0);
	CHECK(kill(getpid(), SIGALRM) == 0);
	CHECK(signal(SIGUSR1, handler) != SIG_ERR);
	if (fork() == 0) {
		usleep(50000);
		kill(getppid(), SIGUSR1);
		_exit(0);
	}
	handled = 0;
	FAILS(EINTR, ioctl(vcpu, KVM_RUN, 0));
	CHECK(handled == SIGUSR1);
	CHECK(sigprocmask(SIG_SETMASK, &old, NULL) == 0);
	CHECK(handled == SIGALRM);

	/* Blocked outside, let in by KVM: it stays pending until user space takes it. */
	struct {
		struct kvm_signal_mask head;
		uint64_t set;
	} __attribute__((packed)) mask = {{.len = 8}, 0};

	CHECK(ioctl(vcpu, KVM_SET_SIGNAL_MASK, &mask) == 0);
	CHECK(sigprocmask(SIG_BLOCK, &alarms, &old) == 0);
	handled = 0;
	CHECK(kill(getpid(), SIGALRM) == 0);
	FAILS(EINTR, ioctl(vcpu, KVM_RUN, 0));
	FAILS(EINTR, ioctl(vcpu, KVM_RUN, 0));
	CHECK(!handled);
	CHECK(sigwaitinfo(&alarms, NULL) == SIGALRM);
	CHECK(sigprocmask(SIG_SETMASK, &old, NULL) == 0);
	CHECK(ioctl(vcpu, KVM_SET_SIGNAL_MASK, NULL) == 0);

	/* Another thread's call for the vCPU waits for the end of KVM_RUN. */
	alarm_in(50000);
	CHECK(pthread_create(&other, NULL, get_regs, &result) == 0);
	FAILS(EINTR, ioctl(vcpu, KVM_RUN, 0));
	CHECK(pthread_join(other, NULL) == 0 && result == 1);
	wait(NULL);
	return 0;
}
