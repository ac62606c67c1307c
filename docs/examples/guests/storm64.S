/*
 * A storm of bus locks in 64-bit mode, in ring 0: LOCKS of them, or without end if that is 0. Built
 * with -DOPERAND=ALIGNED it is the same code without a bus lock.
 */
#include "rom.h"
#include "long.h"
#ifndef LOCKS
#define LOCKS 1000
#endif
#ifndef OPERAND
#define OPERAND SPLIT
#endif

long_mode:
	movl	$OPERAND, %edi
	movq	$0, (%rdi)
#if LOCKS
	movl	$LOCKS, %ecx
#endif
again:	lock incq (%rdi)
#if LOCKS
	decl	%ecx
	jnz	again
#else
	jmp	again
#endif
	movq	(%rdi), %rax
	call	print_number
	say	locked
	end_with 0x10

locked:	.asciz " locked increments\n"
	reset_vector start
