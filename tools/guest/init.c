/*
 * The whole user space of the guest that tests and the demo move: writes numbered records to /dev/vda without pause,
 * each durable before its number is reported on the console.
 *
 * Record n (from 1) fills slot (n - 1) % slots of 4096 bytes. Its 512 little-endian words are
 *     0  magic      1  n      2, 3  the boot id      4...  n * 512 + index, so that a torn record shows
 * On the console: "boot ID", "slots N", then "durable N ID" after the fdatasync of record N.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define RECORD 4096
#define WORDS (RECORD / 8)
#define MAGIC 0x64726f6365727066ull /* "fprecord" */

static void say(const char *text)
{
    size_t left = strlen(text);
    while (left) {
        ssize_t n = write(1, text, left);
        if (n < 0)
            _exit(1);
        text += n;
        left -= n;
    }
}

/* Ends the guest: a kernel whose init has gone panics, which the host sees. */
static void fail(const char *what)
{
    char line[160];
    snprintf(line, sizeof line, "failed %s: %s\n", what, strerror(errno));
    say(line);
    for (;;)
        pause();
}

static void pause_ms(long ms)
{
    struct timespec time = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&time, NULL);
}

static void load_modules(void)
{
    for (int i = 1;; i++) {
        char path[32];
        snprintf(path, sizeof path, "/modules/%d.ko", i);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            return;
        if (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST)
            fail(path);
        close(fd);
    }
}

static int open_disk(void)
{
    for (int tries = 0; tries < 1000; tries++) {
        int fd = open("/dev/vda", O_RDWR | O_DIRECT | O_CLOEXEC);
        if (fd >= 0)
            return fd;
        pause_ms(10);
    }
    fail("/dev/vda");
    return -1;
}

int main(void)
{
    static uint64_t record[WORDS] __attribute__((aligned(RECORD)));
    static char id[40], line[160];
    uint64_t boot[2] = {0, 0}, size = 0, slots;
    int fd, digits = 0;

    setbuf(stdout, NULL);
    if (mount("proc", "/proc", "proc", 0, NULL) || mount("dev", "/dev", "devtmpfs", 0, NULL))
        fail("mount");
    fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    if (fd < 0 || read(fd, id, 36) != 36)
        fail("boot_id");
    close(fd);
    for (const char *at = id; *at; at++) {
        if (*at != '-') {
            char digit[2] = {*at, 0};
            boot[digits / 16] = boot[digits / 16] << 4 | strtoul(digit, NULL, 16);
            digits++;
        }
    }
    load_modules();
    fd = open_disk();
    if (ioctl(fd, BLKGETSIZE64, &size))
        fail("BLKGETSIZE64");
    slots = size / RECORD;
    snprintf(line, sizeof line, "boot %s\nslots %llu\n", id, (unsigned long long)slots);
    say(line);

    for (uint64_t n = 1;; n++) {
        record[0] = MAGIC;
        record[1] = n;
        record[2] = boot[0];
        record[3] = boot[1];
        for (int i = 4; i < WORDS; i++)
            record[i] = n * WORDS + i;
        if (pwrite(fd, record, RECORD, (n - 1) % slots * RECORD) != RECORD)
            fail("write");
        if (fdatasync(fd))
            fail("fdatasync");
        snprintf(line, sizeof line, "durable %llu %.8s\n", (unsigned long long)n, id);
        say(line);
    }
}
