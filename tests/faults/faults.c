/* Makes the n-th write-like call below a folder fail, or write only half of what it says.

   cc -shared -fPIC -o faults.so faults.c -ldl;  LD_PRELOAD=faults.so python ...

   faults_arm(folder, mode, n) and faults_disarm() are for ctypes; both give the number of calls
   since the last arming. Modes: 0 counts all calls, 1 fails the n-th, 2 fails the n-th and all after
   it (a disk that is full), 3 counts the calls that write data, and truncates the n-th. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static atomic_int armed, mode, wanted, calls;

int faults_disarm(void) {
    atomic_store(&armed, 0);
    return atomic_load(&calls);
}

int faults_arm(const char *path, int new_mode, int n) {
    int before = faults_disarm();
    snprintf(folder, sizeof folder, "%s", path);
    atomic_store(&mode, new_mode);
    atomic_store(&wanted, n);
    atomic_store(&calls, 0);
    atomic_store(&armed, 1);
    return before;
}

static int below(const char *path) {
    return atomic_load(&armed) && path && strncmp(path, folder, strlen(folder)) == 0;
}

static int below_fd(int fd) {
    char link[64], path[PATH_MAX];
    if (!atomic_load(&armed)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return below(path);
}

/* Whether this call is the one; `data` says whether it writes data. */
static int hit(int data) {
    int how = atomic_load(&mode);
    if (how == 3 && !data) return 0;
    int n = atomic_fetch_add(&calls, 1) + 1, at = atomic_load(&wanted);
    return how == 2 ? n >= at : how != 0 && n == at;
}

static int fails(int data) {
    if (!hit(data) || atomic_load(&mode) == 3) return 0;
    errno = ENOSPC;
    return 1;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = dlsym(RTLD_NEXT, #name)

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        va_list more; va_start(more, flags); mode_t m = va_arg(more, mode_t); va_end(more); \
        if ((flags & O_CREAT) && below(path) && fails(0)) return -1; \
        return real(path, flags, m); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int at, const char *path, int flags, ...) { \
        REAL(name); \
        va_list more; va_start(more, flags); mode_t m = va_arg(more, mode_t); va_end(more); \
        if ((flags & O_CREAT) && below(path) && fails(0)) return -1; \
        return real(at, path, flags, m); \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void *buffer, size_t size) {
    REAL(write);
    if (!below_fd(fd) || !hit(1)) return real(fd, buffer, size);
    if (atomic_load(&mode) != 3) { errno = ENOSPC; return -1; }
    real(fd, buffer, size / 2);
    return size;
}

#define PWRITE(name, offset_type) \
    ssize_t name(int fd, const void *buffer, size_t size, offset_type offset) { \
        REAL(name); \
        if (!below_fd(fd) || !hit(1)) return real(fd, buffer, size, offset); \
        if (atomic_load(&mode) != 3) { errno = ENOSPC; return -1; } \
        real(fd, buffer, size / 2, offset); \
        return size; \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    if (!below_fd(fd) || !hit(1)) return real(fd, parts, count);
    if (atomic_load(&mode) != 3) { errno = ENOSPC; return -1; }
    ssize_t size = 0;
    for (int i = 0; i < count; i++) size += parts[i].iov_len;
    ssize_t left = size / 2;
    for (int i = 0; i < count && left > 0; i++) {
        size_t part = parts[i].iov_len < (size_t)left ? parts[i].iov_len : (size_t)left;
        struct iovec one = {parts[i].iov_base, part};
        real(fd, &one, 1);
        left -= part;
    }
    return size;
}

#define WITH_FD(name, more, arguments) \
    int name more { REAL(name); if (below_fd(fd) && fails(0)) return -1; return real arguments; }
WITH_FD(fsync, (int fd), (fd))
WITH_FD(fdatasync, (int fd), (fd))
WITH_FD(ftruncate, (int fd, off_t size), (fd, size))
WITH_FD(ftruncate64, (int fd, off64_t size), (fd, size))

#define WITH_PATH(name, path, more, arguments) \
    int name more { REAL(name); if (below(path) && fails(0)) return -1; return real arguments; }
WITH_PATH(mkdir, path, (const char *path, mode_t m), (path, m))
WITH_PATH(mkdirat, path, (int at, const char *path, mode_t m), (at, path, m))
WITH_PATH(rename, to, (const char *from, const char *to), (from, to))
WITH_PATH(renameat, to, (int a, const char *from, int b, const char *to), (a, from, b, to))
WITH_PATH(renameat2, to, (int a, const char *from, int b, const char *to, unsigned flags),
          (a, from, b, to, flags))
WITH_PATH(link, to, (const char *from, const char *to), (from, to))
