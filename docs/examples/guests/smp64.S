/*
 * Two processors in 64-bit mode count up the same number, ROUNDS times each, under a spin lock that
 * crosses a cache line: every try to take it is a bus lock. The first processor starts the second
 * by INIT and SIPI. Built with -DUNLOCKED they do without the spin lock and count by locked increments
 * across the line, so that the number of bus locks is known: two for each round.
 */
#include "rom.h"
#include "long.h"
#ifndef ROUNDS
#define ROUNDS 1000
#endif
#define AP_PAGE 0x8000
#ifdef UNLOCKED
#define TOTAL SPLIT
#else
#define TOTAL 0x2900
#endif
#define FINISHED 0x2908
#define STARTED 0x2910
#define SPIN_LOCK SPLIT

long_mode:
	movl	$1, %eax
	lock xaddl %eax, STARTED
	movl	%eax, %ebp	/* 0 in the first, 1 in the second */
	testl	%ebp, %ebp
	jnz	second
	/* The second starts in real mode on a page below 1 MiB: a far jump to ap_start. */
	movb	$0xea, AP_PAGE
	movw	$ap_start, AP_PAGE + 1
	movw	$ROM_SEGMENT, AP_PAGE + 3
	movl	$APIC, %ebx
	movl	$0x0c4500, 0x300(%rbx)	/* INIT to all but self */
	movl	$0x0c4600 | AP_PAGE >> 12, 0x300(%rbx)
	jmp	work
second:
	movl	$STACK - 0x800, %esp
work:
	movl	$ROUNDS, %ecx
round:
#ifdef UNLOCKED
	lock incl TOTAL
#else
	movl	$1, %eax
	xchgl	%eax, SPIN_LOCK
	testl	%eax, %eax
	jz	mine
taken:	/* to look costs nothing: try again when it is free */
	pause
	cmpl	$0, SPIN_LOCK
	jne	taken
	jmp	round
mine:
	incl	TOTAL	/* no LOCK: it is the spin lock that makes this right */
	movl	$0, SPIN_LOCK
#endif
	decl	%ecx
	jnz	round
	lock incl FINISHED
	testl	%ebp, %ebp
	jnz	idle
wait:
	pause
	cmpl	$2, FINISHED
	jne	wait
	movl	TOTAL, %eax
	call	print_number
	say	counted
	end_with 0x10
idle:	/* no HLT: under a local APIC of its own, QEMU 7.2 lets nobody else run then */
	pause
	jmp	idle

counted: .asciz " counted by two processors\n"
	.code16
ap_start:
	cli
	movw	%cs, %ax
	movw	%ax, %ds
	xorw	%ax, %ax
	movw	%ax, %ss
	jmp	enter_long
	reset_vector start
