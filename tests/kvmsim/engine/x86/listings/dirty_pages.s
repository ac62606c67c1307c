    sub rdx, qword ptr [r9]
    mov r10, qword ptr [r9+0x8]
    mov ecx, ecx
    lea rax, [rdx+rcx-0x1]
    shr rdx, 0xc
    shr rax, 0xc
    mov byte ptr [r10+rdx], 0x1
    mov byte ptr [r10+rax], 0x1
    ret
