/*
 * Loops to be timed, in 64-bit mode: a letter to the serial port, ROUNDS rounds of the loop LOOP,
 * another letter. Data is at 2 MiB and not executable: stores to pages that may hold code are slow
 * in QEMU and in what is made of it.
 */
#include "rom.h"
#include "long.h"
#define AREA 0x200000

	.macro letter
	movw	$SERIAL, %dx
	movb	$'.', %al
	outb	%al, %dx
	.endm

long_mode:
	orl	$0x80000000, TABLES + 0x2000 + 8 + 4	/* no execution from 2 to 4 MiB */
	movq	%cr3, %rax
	movq	%rax, %cr3
	movl	$AREA, %edi
	movl	$AREA + 0x8000, %esi
	movl	$1, %eax
	movl	$3, %ebx
	letter
	movl	$ROUNDS, %ecx
again:
#if LOOP == 0	/* arithmetic */
	addq	%rbx, %rax
	xorq	%rbx, %rax
	incq	%rbx
	rolq	$3, %rax
#elif LOOP == 1	/* memory */
	movq	(%rsi), %rax
	movq	%rax, (%rdi)
	addq	%rax, 8(%rdi)
	movq	%rbx, 16(%rsi)
#elif LOOP == 2	/* locked, within a line */
	lock xaddl %eax, (%rdi)
	incq	%rbx
#elif LOOP == 3	/* branches */
	testb	$1, %cl
	jz	1f
	incq	%rbx
1:	call	2f
	jmp	3f
2:	ret
3:
#endif
	decl	%ecx
	jnz	again
	letter
	end_with 0x10
	reset_vector start
