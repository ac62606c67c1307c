/* 16-bit code that says something, for guests that stay in real mode. */

	.macro say text
	movw	$\text, %si
	call	print
	.endm

	/* Start of the guest: DS is the ROM, ES and SS are the RAM below 64 KiB. */
	.macro enter_real
	cli
	cld
	movw	%cs, %ax
	movw	%ax, %ds
	xorw	%ax, %ax
	movw	%ax, %es
	movw	%ax, %ss
	movw	$STACK, %sp
	.endm

	.macro real_mode_routines
print:	/* the text at DS:SI, which a zero ends */
	movw	$SERIAL, %dx
1:	lodsb
	testb	%al, %al
	jz	2f
	outb	%al, %dx
	jmp	1b
2:	ret

print_number: /* EAX, in decimal */
	movl	$10, %ebx
	xorw	%cx, %cx
1:	xorl	%edx, %edx
	divl	%ebx
	pushw	%dx
	incw	%cx
	testl	%eax, %eax
	jnz	1b
	movw	$SERIAL, %dx
2:	popw	%ax
	addb	$'0', %al
	outb	%al, %dx
	loop	2b
	ret
	.endm
