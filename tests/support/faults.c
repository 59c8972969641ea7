// Calls of the system that fail on purpose: loaded before the C library (LD_PRELOAD), so that whatever writes meets the fault,
// in Python, C++ or Rust. fault_arm says which of the calls that write, rename or remove something below a folder fail, and how.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static int number, first = -1, last = -1, removals_too;
static volatile int calls;

// Fail calls FIRST to LAST (from 0) below FOLDER with the error NUMBER; with REMOVALS also those that remove. Counts from 0 again.
void fault_arm(const char *below, int error, int from, int to, int removals) {
    snprintf(folder, sizeof folder, "%s", below);
    number = error; first = from; last = to; removals_too = removals; calls = 0;
}

int fault_calls(void) { return calls; }

static int is_below(int at, const char *path) {
    char whole[PATH_MAX];
    if (!folder[0] || !path) return 0;
    if (path[0] != '/') {
        char link[64];
        ssize_t length;
        if (at == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
        else snprintf(link, sizeof link, "/proc/self/fd/%d", at);
        length = readlink(link, whole, sizeof whole - 1);
        if (length < 0) return 0;
        whole[length] = 0;
        if (strlen(whole) + strlen(path) + 2 > sizeof whole) return 0;
        strcat(strcat(whole, "/"), path);
        path = whole;
    }
    return strncmp(path, folder, strlen(folder)) == 0;
}

static int is_open_below(int descriptor) {
    char link[64], path[PATH_MAX];
    ssize_t length;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    length = folder[0] ? readlink(link, path, sizeof path - 1) : -1;
    if (length < 0) return 0;
    path[length] = 0;
    return strncmp(path, folder, strlen(folder)) == 0;
}

static int fails(int concerns, int removes) {
    int call;
    if (!concerns || (removes && !removals_too)) return 0;
    call = __sync_fetch_and_add(&calls, 1);
    if (call < first || call > last) return 0;
    errno = number;
    return 1;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRITES(flags) (((flags) & O_ACCMODE) != O_RDONLY || ((flags) & O_CREAT))
#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); }

int open(const char *path, int flags, ...) {
    MODE(flags)
    return fails(WRITES(flags) && is_below(AT_FDCWD, path), 0) ? -1 : NEXT(open)(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    MODE(flags)
    return fails(WRITES(flags) && is_below(AT_FDCWD, path), 0) ? -1 : NEXT(open64)(path, flags, mode);
}
int openat(int at, const char *path, int flags, ...) {
    MODE(flags)
    return fails(WRITES(flags) && is_below(at, path), 0) ? -1 : NEXT(openat)(at, path, flags, mode);
}
int openat64(int at, const char *path, int flags, ...) {
    MODE(flags)
    return fails(WRITES(flags) && is_below(at, path), 0) ? -1 : NEXT(openat64)(at, path, flags, mode);
}
FILE *fopen(const char *path, const char *mode) {
    return fails(strpbrk(mode, "wa+") && is_below(AT_FDCWD, path), 0) ? NULL : NEXT(fopen)(path, mode);
}
FILE *fopen64(const char *path, const char *mode) {
    return fails(strpbrk(mode, "wa+") && is_below(AT_FDCWD, path), 0) ? NULL : NEXT(fopen64)(path, mode);
}
ssize_t write(int descriptor, const void *content, size_t size) {
    return fails(is_open_below(descriptor), 0) ? -1 : NEXT(write)(descriptor, content, size);
}
ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    return fails(is_open_below(descriptor), 0) ? -1 : NEXT(writev)(descriptor, parts, count);
}
ssize_t pwrite64(int descriptor, const void *content, size_t size, off64_t offset) {
    return fails(is_open_below(descriptor), 0) ? -1 : NEXT(pwrite64)(descriptor, content, size, offset);
}
size_t fwrite(const void *content, size_t size, size_t count, FILE *file) {
    return fails(is_open_below(fileno(file)), 0) ? 0 : NEXT(fwrite)(content, size, count, file);
}
int fsync(int descriptor) { return fails(is_open_below(descriptor), 0) ? -1 : NEXT(fsync)(descriptor); }
int ftruncate64(int descriptor, off64_t size) {
    return fails(is_open_below(descriptor), 0) ? -1 : NEXT(ftruncate64)(descriptor, size);
}
int mkdir(const char *path, mode_t mode) {
    return fails(is_below(AT_FDCWD, path), 0) ? -1 : NEXT(mkdir)(path, mode);
}
int mkdirat(int at, const char *path, mode_t mode) {
    return fails(is_below(at, path), 0) ? -1 : NEXT(mkdirat)(at, path, mode);
}
int rename(const char *from, const char *to) {
    return fails(is_below(AT_FDCWD, to), 0) ? -1 : NEXT(rename)(from, to);
}
int renameat(int at, const char *from, int to_at, const char *to) {
    return fails(is_below(to_at, to), 0) ? -1 : NEXT(renameat)(at, from, to_at, to);
}
int link(const char *from, const char *to) { return fails(is_below(AT_FDCWD, to), 0) ? -1 : NEXT(link)(from, to); }
int symlink(const char *to, const char *path) { return fails(is_below(AT_FDCWD, path), 0) ? -1 : NEXT(symlink)(to, path); }
int utimensat(int at, const char *path, const struct timespec times[2], int flags) {
    return fails(is_below(at, path), 0) ? -1 : NEXT(utimensat)(at, path, times, flags);
}
int unlink(const char *path) { return fails(is_below(AT_FDCWD, path), 1) ? -1 : NEXT(unlink)(path); }
int unlinkat(int at, const char *path, int flags) {
    return fails(is_below(at, path), 1) ? -1 : NEXT(unlinkat)(at, path, flags);
}
int rmdir(const char *path) { return fails(is_below(AT_FDCWD, path), 1) ? -1 : NEXT(rmdir)(path); }
