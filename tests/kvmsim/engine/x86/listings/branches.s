    mov r8, qword ptr [rcx]
    mov rax, qword ptr [rcx+0x58]
    cmp r8, qword ptr [rcx+0x50]
    jne at_2c
    cmp qword ptr [rax], rsi
    jne at_2c
    cmp dword ptr [rax+0x10], edx
    jne at_2c
    mov r10, qword ptr [rcx+0x28]
    mov r10d, dword ptr [r10]
    xor r10d, dword ptr [rcx+0x60]
    test r10b, 0x3
    je at_cd
at_2c:
    mov rax, rsi
    shr rax, 0x5
    xor eax, esi
    and eax, 0x3fff
    shl eax, 0x5
    add rax, qword ptr [rcx+0x38]
    cmp qword ptr [rax], rsi
    jne at_127
    cmp dword ptr [rax+0x10], edx
    jne at_127
    test r8, r8
    je at_b6
    mov r9d, dword ptr [r8+0x14]
    test r9d, r9d
    js at_127
    je at_b6
    mov r10d, dword ptr [r8+0x10]
    add r10, qword ptr [r8]
    cmp r10, rsi
    jne at_82
    mov r10d, dword ptr [r8+0x18]
    test r10d, r10d
    js at_127
    je at_b6
at_82:
    mov r10, qword ptr [rcx+0x28]
    mov r10d, dword ptr [r10]
    mov r11d, dword ptr [rcx+0x10]
    test r10b, 0x3
    je at_97
    mov r11d, dword ptr [rcx+0x14]
at_97:
    test r11d, r9d
    jne at_c1
    shr r11d, 0x10
    test r11d, r9d
    je at_b6
    mov r10, qword ptr [rcx+0x18]
    mov r11, qword ptr [r10]
    dec r11
    and r11, qword ptr [rcx+0x20]
    mov qword ptr [r10], r11
at_b6:
    mov qword ptr [rcx], rax
    mov edx, edx
    add qword ptr [rcx+0x8], rdx
    jmp at_116
at_c1:
    mov qword ptr [rcx+0x50], r8
    mov qword ptr [rcx+0x58], rax
    mov dword ptr [rcx+0x60], r10d
at_cd:
    mov r10, qword ptr [rcx+0x18]
    mov r11, qword ptr [r10]
    inc r11
    and r11, qword ptr [rcx+0x20]
    mov qword ptr [r10], r11
    lea r10, [r10+r11*8+0x8]
    mov r8, qword ptr [r8+0x8]
    mov qword ptr [r10], r8
    mov qword ptr [r10+0x100], rsi
    mov r8, qword ptr [rcx+0x8]
    shr r8, 0x2
    mov r9d, 0xffff
    cmp r8, r9
    cmova r8, r9
    mov qword ptr [r10+0x200], r8
    mov qword ptr [rcx], rax
    mov edx, edx
    mov qword ptr [rcx+0x8], rdx
at_116:
    mov r8, qword ptr [rcx+0x40]
    test r8, r8
    je at_126
    mov rcx, qword ptr [rcx+0x48]
    jmp r8
at_126:
    ret
at_127:
    jmp qword ptr [rcx+0x30]
