/*
 * 64-bit mode with a program in ring 3: the bus lock #DB. Ring 0 turns it on where CPUID has it;
 * ring 3 takes LOCKS bus locks; the handler counts those whose DR6 says that a bus lock was it.
 */
#include "rom.h"
#include "long.h"
#ifndef LOCKS
#define LOCKS 100
#endif
#define DEBUGCTL 0x1d9
#define BUS_LOCK_DETECT (1 << 2)  /* of DEBUGCTL */
#define BUS_LOCK (1 << 11)        /* of DR6, where it is zero when there was one */
#define DR6_INITIAL 0xffff0ff0
#define COUNT 0x2800

long_mode:
	enter_tables
	gate	1, debug_exception
	gate	0x80, finish
	movl	$0, COUNT
	movl	$SPLIT, %edi
	movq	$0, (%rdi)

	movl	$7, %eax
	xorl	%ecx, %ecx
	cpuid
	testl	$1 << 24, %ecx
	jz	without
	movl	$DR6_INITIAL, %eax
	movq	%rax, %dr6
	movl	$DEBUGCTL, %ecx
	movl	$BUS_LOCK_DETECT, %eax
	xorl	%edx, %edx
	wrmsr
	lock incq (%rdi)	/* in ring 0 there is no exception */
	jmp	user
without:
	say	no_feature
user:
	enter_ring_3 program

program:
	movl	$LOCKS, %ecx
1:	lock incq SPLIT
	decl	%ecx
	jnz	1b
	int	$0x80

debug_exception: /* a trap: RIP is behind the locked instruction */
	pushq	%rax
	movq	%dr6, %rax
	testl	$BUS_LOCK, %eax
	jnz	1f
	incl	COUNT
1:	movl	$DR6_INITIAL, %eax /* the processor sets bits of DR6, and never clears them */
	movq	%rax, %dr6
	popq	%rax
	iretq

finish:
	movl	COUNT, %eax
	call	print_number
	say	result
	end_with 0x10

no_feature: .asciz "this processor has no bus lock #DB\n"
result:	.asciz " bus lock #DBs\n"
	reset_vector start
