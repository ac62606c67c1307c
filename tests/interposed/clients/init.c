// The first program of a Linux guest: takes split locks, uses the system a little, and reboots.
// LOCKS: how many bus locks.
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef LOCKS
#define LOCKS 1000
#endif
#define CHILDREN 8

static char line[128] __attribute__((aligned(64)));

static void add(uint32_t *counter, int times)
{
    for (int i = 0; i < times; i++)
        __asm__ volatile("lock incl %0" : "+m"(*counter) : : "memory", "cc");
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

static int children(void)
{
    int well = 0;
    for (int i = 0; i < CHILDREN; i++) {
        int status;
        pid_t child = fork();
        if (!child)
            _exit(i);
        waitpid(child, &status, 0);
        well += WIFEXITED(status) && WEXITSTATUS(status) == i;
    }
    return well;
}

int main(void)
{
    int console = open("/dev/console", O_RDWR);
    for (int fd = 0; fd < 3; fd++)
        dup2(console, fd);
    setvbuf(stdout, NULL, _IONBF, 0);
    mkdir("/sys", 0755);
    mount("sysfs", "/sys", "sysfs", 0, NULL);

    double began = now();
    struct timespec fifth = {0, 200000000};
    nanosleep(&fifth, NULL);
    double slept = now() - began;
    printf("init: slept %s\n", slept >= 0.2 && slept < 2 ? "well" : "badly");

    uint32_t *split = (uint32_t *)(line + 62), *whole = (uint32_t *)line;
    add(split, LOCKS);
    printf("init: %u split\n", *split);
    add(whole, LOCKS);
    printf("init: %u whole\n", *whole & 0xffff);
    printf("init: %d of %d children ended well\n", children(), CHILDREN);
    printf("init: %ld processors\n", sysconf(_SC_NPROCESSORS_ONLN));
    sync();
    reboot(RB_AUTOBOOT);
    return 1;
}
