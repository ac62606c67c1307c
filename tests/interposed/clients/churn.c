/* One VM after the other, on a host that has room for one. */
#include "client.h"

int main(int argc, char **argv)
{
	int kvm = kvm_open(), rounds = argc > 1 ? atoi(argv[1]) : 1000;

	for (int round = 0; round < rounds; round++) {
		int vm = vm_new(kvm);

		CHECK(sev_init(vm) == 0);
		CHECK(close(vm) == 0);
	}
	return 0;
}
