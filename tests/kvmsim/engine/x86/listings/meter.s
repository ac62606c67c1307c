    mov eax, edx
    sub qword ptr [rcx], rax
    js at_e
    cmp dword ptr [rcx+0x8], 0x0
    jne at_e
    ret
at_e:
    jmp qword ptr [rcx+0x10]
