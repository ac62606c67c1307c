/* The vCPU's descriptor is closed while another thread is in KVM_RUN. */
#include "client.h"

static int kvm, vm, vcpu, outcome;

static void handler(int number)
{
	(void)number;
}

static void *runs(void *unused)
{
	outcome = ioctl(vcpu, KVM_RUN, 0) ? errno : 0;
	return unused;
}

int main(void)
{
	struct sigaction action = {.sa_handler = handler};
	pthread_t other;

	kvm = kvm_open();
	vm = vm_new(kvm);
	CHECK(sev_init(vm) == 0);
	CHECK(ioctl(vm, KVM_CREATE_IRQCHIP, 0) == 0);
	vcpu = vcpu_new(vm, 0);
	CHECK(sigaction(SIGUSR1, &action, NULL) == 0);
	CHECK(pthread_create(&other, NULL, runs, NULL) == 0);
	usleep(30000);
	close(vm);
	close(vcpu);
	usleep(30000);
	CHECK(!asid_free(kvm));
	pthread_kill(other, SIGUSR1);
	CHECK(pthread_join(other, NULL) == 0);
	CHECK(outcome == EINTR);
	CHECK(asid_free(kvm));
	return 0;
}
