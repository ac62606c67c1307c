/*
 * 64-bit mode: the last branches. Where the processor has the facility (IA32_PERF_CAPABILITIES
 * names a format), it is turned on, a known piece of code runs, and what was recorded is printed,
 * SHOWN of them, newest first: from and to, as offsets in this ROM.
 */
#include "rom.h"
#include "long.h"
#define PERF_CAPABILITIES 0x345
#define DEBUGCTL 0x1d9
#define LBR_SELECT 0x1c8
#define LBR_TOS 0x1c9
#define LBR_FROM 0x680
#define LBR_TO 0x6c0
#define DEPTH 32
#ifndef FILTER
#define FILTER 0 /* of LBR_SELECT: each bit leaves out a kind of branch */
#endif
#ifndef ROUNDS
#define ROUNDS 2
#endif
#ifndef SHOWN
#define SHOWN 6
#endif

	.macro read msr
	movl	$\msr, %ecx
	rdmsr
	.endm
	.macro write msr, value
	movl	$\msr, %ecx
	movl	$\value, %eax
	xorl	%edx, %edx
	wrmsr
	.endm

long_mode:
	movl	$1, %eax
	cpuid
	testl	$1 << 15, %ecx	/* PDCM: there is IA32_PERF_CAPABILITIES */
	jz	without
	read	PERF_CAPABILITIES
	testl	$0x3f, %eax
	jz	without
	write	LBR_SELECT, FILTER
	write	DEBUGCTL, 1

	movl	$ROUNDS, %ebp
	leaq	landed(%rip), %rbx
the_call:
	call	routine
returned:
	decl	%ebp
the_jcc:
	jnz	the_call
	write	DEBUGCTL, 0

	read	LBR_TOS
	movl	%eax, %r8d	/* the newest */
	movl	$SHOWN, %r9d
next:
	leal	LBR_FROM(%r8), %ecx
	rdmsr
	call	print_hex
	say	arrow
	leal	LBR_TO(%r8), %ecx
	rdmsr
	call	print_hex
	say	newline
	decl	%r8d
	andl	$DEPTH - 1, %r8d
	decl	%r9d
	jnz	next
	end_with 0x10
without:
	say	no_feature
	end_with 0x10

routine:
the_jump:
	jmp	over
	nop
over:
the_indirect:
	jmp	*%rbx
	nop
landed:
the_return:
	ret

arrow:	.asciz " -> "
newline: .asciz "\n"
no_feature: .asciz "this processor records no branches\n"
	reset_vector start
