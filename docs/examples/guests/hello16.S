/*
 * 16-bit real mode, as a boot sector would do it: one bus lock of each kind, a locked access that
 * is none, and what came of it.
 */
#include "rom.h"
#include "real.h"

	.code16
	.text
start:
	enter_real
	say	greeting
	movl	$0, %es:SPLIT
	lock incl %es:SPLIT	/* the usual one: read, change, write */
	movl	$41, %eax
	lock xaddl %eax, %es:SPLIT
	xchgl	%eax, %es:SPLIT	/* locked without the prefix; EAX was 1 */
	movl	%eax, %ecx	/* 42 */
	xorl	%eax, %eax	/* is not 1, so it fails, and writes all the same */
	lock cmpxchgl %ecx, %es:SPLIT
	movw	$SPLIT - 4, %di
	movl	$32, %eax
	lock btsl %eax, %es:(%di) /* bit 32 from 4 bytes lower is bit 0 from here */
	lock incl %es:ALIGNED	/* within one line: no bus lock */
	say	five
	movl	%ecx, %eax
	call	print_number
	say	newline
	end_with 0x10

	real_mode_routines
greeting: .asciz "hello from real mode\n"
five:	.asciz "took 5 bus locks, and the answer is "
newline: .asciz "\n"
	reset_vector start
