"""vCPUs that execute real x86 code: KVM's rules on one side, the engine on the other."""
