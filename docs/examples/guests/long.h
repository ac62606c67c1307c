/*
 * From the reset vector to 64-bit code with page tables, for guests in long mode. The first 512 MiB
 * are mapped one to one, for ring 3 as well, and so is the local APIC's page, uncached.
 *
 * Include it first in .text; the guest begins at the label long_mode, with its stack at STACK.
 */
#define CODE64 0x08
#define DATA 0x10
#define USER_DATA (0x18 | 3)
#define USER_CODE (0x20 | 3)
#define TSS_SELECTOR 0x28
#define GDT 0x3000 /* in RAM: a processor marks the TSS in it as busy */
#define GDT_BYTES 0x38
#define TSS 0x3100
#define IDT 0x4000
#define RING0_STACK 0x6000
#define APIC 0xfee00000

	.code16
	.text
start:	/* the first processor; others go to enter_long, in real mode, when tables are there */
	cli
	cld
	movw	%cs, %ax
	movw	%ax, %ds
	xorw	%ax, %ax
	movw	%ax, %es
	movw	%ax, %ss
	movw	$STACK, %sp

	movw	$GDT, %di	/* the GDT goes to RAM */
	movw	$gdt, %si
	movw	$GDT_BYTES, %cx
	rep movsb

	movw	$TABLES >> 4, %ax /* six pages of tables, all zero at first */
	movw	%ax, %es
	xorw	%di, %di
	xorl	%eax, %eax
	movw	$0x6000 / 4, %cx
	rep stosl
	movl	$TABLES + 0x1007, %es:0		/* level 4 -> level 3 */
	movl	$TABLES + 0x2007, %es:0x1000	/* level 3 -> first GiB */
	movl	$TABLES + 0x3007, %es:0x1018	/* level 3 -> fourth GiB */
	movl	$0x87, %eax			/* pages of 2 MiB: user, writable, present */
	movw	$0x2000, %di
	movw	$256, %cx
1:	movl	%eax, %es:(%di)
	addl	$0x200000, %eax
	addw	$8, %di
	loop	1b
	movl	$APIC + 0x9b, %es:0x3fb8	/* uncached, for ring 0 */

enter_long:
	movl	$0x620, %eax	/* PAE, and SSE for whoever wants it */
	movl	%eax, %cr4
	movl	$TABLES, %eax
	movl	%eax, %cr3
	movl	$0xc0000080, %ecx /* EFER: LME, NXE */
	movl	$0x900, %eax
	xorl	%edx, %edx
	wrmsr
	xorw	%ax, %ax
	movw	%ax, %es
	lgdtl	%cs:gdt_pointer
	movl	$0x80000011, %eax
	movl	%eax, %cr0
	ljmpl	$CODE64, $ROM_BASE + in_long_mode

	/* Accessed bits are set, so that nothing has to be written when a segment is loaded. */
	.balign	8
gdt:	.quad	0
	.quad	0x00af9b000000ffff	/* ring 0 code, 64 bits */
	.quad	0x00cf93000000ffff	/* data */
	.quad	0x00cff3000000ffff	/* ring 3 data */
	.quad	0x00affb000000ffff	/* ring 3 code, 64 bits */
	.quad	0x0000890000000067 | (TSS & 0xffff) << 16
	.quad	0
gdt_pointer:
	.word	GDT_BYTES - 1
	.long	GDT

	.code64
in_long_mode:
	movl	$DATA, %eax
	movl	%eax, %ds
	movl	%eax, %es
	movl	%eax, %ss
	xorl	%eax, %eax
	movl	%eax, %fs
	movl	%eax, %gs
	jmp	long_mode

	.macro say text
	leaq	\text(%rip), %rsi
	call	print
	.endm

print:	/* the text at RSI, which a zero ends */
	movw	$SERIAL, %dx
1:	lodsb
	testb	%al, %al
	jz	2f
	outb	%al, %dx
	jmp	1b
2:	ret

print_number: /* RAX, in decimal */
	movl	$10, %ebx
	xorl	%ecx, %ecx
1:	xorl	%edx, %edx
	divq	%rbx
	pushq	%rdx
	incl	%ecx
	testq	%rax, %rax
	jnz	1b
	movw	$SERIAL, %dx
2:	popq	%rax
	addb	$'0', %al
	outb	%al, %dx
	decl	%ecx
	jnz	2b
	ret

print_hex: /* the low 16 bits of RAX */
	movl	%eax, %ebx
	movl	$4, %ecx
	movw	$SERIAL, %dx
1:	rolw	$4, %bx
	movl	%ebx, %eax
	andb	$15, %al
	addb	$'0', %al
	cmpb	$'9', %al
	jbe	2f
	addb	$'a' - '0' - 10, %al
2:	outb	%al, %dx
	decl	%ecx
	jnz	1b
	ret

	/* A gate to ring 0 code of this ROM; ring 3 may call it. */
	.macro gate vector, target
	leaq	\target(%rip), %rax
	movw	%ax, IDT + 16 * \vector
	movw	$CODE64, IDT + 16 * \vector + 2
	movw	$0xee00, IDT + 16 * \vector + 4
	shrq	$16, %rax
	movw	%ax, IDT + 16 * \vector + 6
	shrq	$16, %rax
	movl	%eax, IDT + 16 * \vector + 8
	movl	$0, IDT + 16 * \vector + 12
	.endm

	/* Make ring 3, exceptions and system calls by INT possible. */
	.macro enter_tables
	movq	$RING0_STACK, TSS + 4
	movw	$0x68, TSS + 102 /* no port bitmap: ports are for ring 0 */
	movl	$TSS_SELECTOR, %eax
	ltr	%ax
	lidt	idt_pointer(%rip)
	jmp	9f
idt_pointer:
	.word	0xfff
	.quad	IDT
9:
	.endm

	/* Go on in ring 3, with ports as in ring 0 (IOPL 3) if flags say so. */
	.macro enter_ring_3 target, flags=0x2
	pushq	$USER_DATA
	pushq	$STACK
	pushq	$\flags
	pushq	$USER_CODE
	leaq	\target(%rip), %rax
	pushq	%rax
	iretq
	.endm
