/*
 * What the guests share: where a ROM is, how its first instruction is reached, and how a guest says
 * something.
 *
 * A ROM is 64 KiB at the top of 4 GiB, and a second time below 1 MiB. The processor starts in its
 * last 16 bytes, in real mode; the jump there goes to the copy below 1 MiB, where 16-bit code can
 * be. Memory from 0 to 640 KiB is RAM.
 *
 *   gcc -nostdlib -static -no-pie -Wl,-Ttext=0,-e0,--build-id=none,--oformat=binary -o X.rom X.S
 */
#define ROM_SEGMENT 0xf000
#define ROM_BASE 0xf0000
#define SERIAL 0x3f8 /* the data register of COM1 */
#define EXIT 0xf4    /* QEMU's isa-debug-exit */

/* The operand of the bus locks: its last byte is in the next cache line. */
#define LINE 0x2000
#define SPLIT (LINE + 61)
#define ALIGNED (LINE + 64)

#define STACK 0x7000
#define TABLES 0x10000 /* page tables of long mode, six pages */

	/* \code is left; the low bits say how: QEMU's exit status is 2 * \code + 1. */
	.macro end_with code
	movb	$\code, %al
	outb	%al, $EXIT
9:	hlt
	jmp	9b
	.endm

	/* Ends every ROM. */
	.macro reset_vector start
	.code16
	.org	0xfff0
	ljmp	$ROM_SEGMENT, $\start
	.org	0x10000
	.endm
