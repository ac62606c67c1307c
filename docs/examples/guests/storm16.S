/*
 * A storm of bus locks in 16-bit real mode: LOCKS of them, or without end if that is 0. Built with
 * -DOPERAND=ALIGNED it is the same code without a bus lock.
 */
#include "rom.h"
#include "real.h"
#ifndef LOCKS
#define LOCKS 1000
#endif
#ifndef OPERAND
#define OPERAND SPLIT
#endif

	.code16
	.text
start:
	enter_real
	movl	$0, %es:OPERAND
#if LOCKS
	movl	$LOCKS, %ecx
#endif
again:	lock incl %es:OPERAND
#if LOCKS
	decl	%ecx
	jnz	again
#else
	jmp	again
#endif
	movl	%es:OPERAND, %eax
	call	print_number
	say	locked
	end_with 0x10

	real_mode_routines
locked:	.asciz " locked increments\n"
	reset_vector start
