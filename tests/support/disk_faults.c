/* The system's calls that write, with an error in the place of one of them: what a full or broken disk, or its server, does.

   A process in which this library is preloaded counts the calls that change something below one folder, notes each in a file and
   lets one of them fail, or that one and all later ones. Python, PyTorch's C++ and safetensors' Rust all come through here. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static char folder[PATH_MAX];
static size_t length;
static int notes = -1, failing, error_number, lasts, only_rank;
static atomic_int calls;

/* From now on the call number `nth` (from 1; 0: none) below `below` fails with `number`, and all later ones if `for_good`;
   in the process of rank `of_rank` alone, if that is not negative. What is called is noted in the file `log`. */
void disk_faults_arm(const char *below, const char *log, int nth, int number, int for_good, int of_rank) {
    snprintf(folder, sizeof folder, "%s", below);
    failing = nth, error_number = number, lasts = for_good, only_rank = of_rank;
    notes = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    atomic_store(&calls, 0);
    length = strlen(folder);
}

static int is_below(const char *path) {
    return length && !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

static int is_of_rank(void) {
    const char *rank = getenv("RANK");
    return only_rank < 0 || (rank && atoi(rank) == only_rank);
}

/* A full disk still lets files be removed, renamed and cut. */
static int needs_room(const char *kind) {
    return strcmp(kind, "unlink") && strcmp(kind, "rmdir") && strcmp(kind, "rename") && strcmp(kind, "truncate");
}

static int fails(const char *kind, const char *path) {
    char line[PATH_MAX + 64];
    int number, size, is_failing;
    if (!is_below(path) || !is_of_rank()) return 0;
    number = atomic_fetch_add(&calls, 1) + 1;
    is_failing = failing && (number == failing || (lasts && number > failing &&
                             ((error_number != ENOSPC && error_number != EDQUOT) || needs_room(kind))));
    size = snprintf(line, sizeof line, "%s %s\n", kind, path);
    syscall(SYS_write, notes, line, size);
    if (is_failing) errno = error_number;
    return is_failing;
}

static int fails_at(const char *kind, int descriptor, const char *path) {
    char link[64], absolute[2 * PATH_MAX];
    ssize_t size;
    if (!length) return 0;
    if (path[0] == '/') return fails(kind, path);
    snprintf(link, sizeof link, descriptor == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", descriptor);
    size = readlink(link, absolute, PATH_MAX);
    if (size < 0) return 0;
    snprintf(absolute + size, sizeof absolute - size, "/%s", path);
    return fails(kind, absolute);
}

static int fails_on(const char *kind, int descriptor) {
    char link[64], path[PATH_MAX];
    ssize_t size;
    if (!length) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return fails(kind, path);
}

static int writes(int flags) {
    return (flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)) != 0;
}

#define MODE(flags, mode) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { \
        va_list more; \
        va_start(more, flags); \
        mode = va_arg(more, mode_t); \
        va_end(more); \
    }

int open(const char *path, int flags, ...) {
    MODE(flags, mode)
    return writes(flags) && fails_at("open", AT_FDCWD, path) ? -1 : REAL(open)(path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    MODE(flags, mode)
    return writes(flags) && fails_at("open", AT_FDCWD, path) ? -1 : REAL(open64)(path, flags, mode);
}

int openat(int at, const char *path, int flags, ...) {
    MODE(flags, mode)
    return writes(flags) && fails_at("open", at, path) ? -1 : REAL(openat)(at, path, flags, mode);
}

int openat64(int at, const char *path, int flags, ...) {
    MODE(flags, mode)
    return writes(flags) && fails_at("open", at, path) ? -1 : REAL(openat64)(at, path, flags, mode);
}

FILE *fopen(const char *path, const char *mode) {
    return strpbrk(mode, "wa+") && fails_at("open", AT_FDCWD, path) ? NULL : REAL(fopen)(path, mode);
}

FILE *fopen64(const char *path, const char *mode) {
    return strpbrk(mode, "wa+") && fails_at("open", AT_FDCWD, path) ? NULL : REAL(fopen64)(path, mode);
}

ssize_t write(int to, const void *bytes, size_t size) {
    return fails_on("write", to) ? -1 : REAL(write)(to, bytes, size);
}

ssize_t pwrite(int to, const void *bytes, size_t size, off_t offset) {
    return fails_on("write", to) ? -1 : REAL(pwrite)(to, bytes, size, offset);
}

ssize_t pwrite64(int to, const void *bytes, size_t size, off64_t offset) {
    return fails_on("write", to) ? -1 : REAL(pwrite64)(to, bytes, size, offset);
}

ssize_t writev(int to, const struct iovec *parts, int count) {
    return fails_on("write", to) ? -1 : REAL(writev)(to, parts, count);
}

ssize_t sendfile(int to, int from, off_t *offset, size_t size) {
    return fails_on("write", to) ? -1 : ((ssize_t(*)(int, int, off_t *, size_t))dlsym(RTLD_NEXT, "sendfile"))(to, from, offset, size);
}

ssize_t sendfile64(int to, int from, off64_t *offset, size_t size) {
    return fails_on("write", to)
               ? -1
               : ((ssize_t(*)(int, int, off64_t *, size_t))dlsym(RTLD_NEXT, "sendfile64"))(to, from, offset, size);
}

ssize_t copy_file_range(int from, off64_t *here, int to, off64_t *there, size_t size, unsigned int flags) {
    return fails_on("write", to) ? -1 : REAL(copy_file_range)(from, here, to, there, size, flags);
}

int fsync(int of) {
    return fails_on("fsync", of) ? -1 : REAL(fsync)(of);
}

int fdatasync(int of) {
    return fails_on("fsync", of) ? -1 : REAL(fdatasync)(of);
}

int ftruncate(int of, off_t size) {
    return fails_on("truncate", of) ? -1 : REAL(ftruncate)(of, size);
}

int ftruncate64(int of, off64_t size) {
    return fails_on("truncate", of) ? -1 : REAL(ftruncate64)(of, size);
}

int rename(const char *from, const char *to) {
    return fails_at("rename", AT_FDCWD, to) ? -1 : REAL(rename)(from, to);
}

int renameat(int at, const char *from, int there, const char *to) {
    return fails_at("rename", there, to) ? -1 : REAL(renameat)(at, from, there, to);
}

int unlink(const char *path) {
    return fails_at("unlink", AT_FDCWD, path) ? -1 : REAL(unlink)(path);
}

int unlinkat(int at, const char *path, int flags) {
    return fails_at(flags & AT_REMOVEDIR ? "rmdir" : "unlink", at, path) ? -1 : REAL(unlinkat)(at, path, flags);
}

int rmdir(const char *path) {
    return fails_at("rmdir", AT_FDCWD, path) ? -1 : REAL(rmdir)(path);
}

int mkdir(const char *path, mode_t mode) {
    return fails_at("mkdir", AT_FDCWD, path) ? -1 : REAL(mkdir)(path, mode);
}

int mkdirat(int at, const char *path, mode_t mode) {
    return fails_at("mkdir", at, path) ? -1 : REAL(mkdirat)(at, path, mode);
}

int link(const char *from, const char *to) {
    return fails_at("link", AT_FDCWD, to) ? -1 : REAL(link)(from, to);
}

int linkat(int at, const char *from, int there, const char *to, int flags) {
    return fails_at("link", there, to) ? -1 : REAL(linkat)(at, from, there, to, flags);
}

int symlink(const char *target, const char *path) {
    return fails_at("link", AT_FDCWD, path) ? -1 : REAL(symlink)(target, path);
}
