/* A disk that fails: loaded with LD_PRELOAD, it counts the calls that write below some folders, and fails one of them.

   What it does stands in a file of `struct control`, whose path is in DISK_FAULT and which every process maps: a test
   writes it before a command and reads the counts after it, whatever processes there were between. A call is counted
   when its kind is in `counted`; the n-th fails with `error`, and with `forever` so do all later ones whose kind is in
   `later`. With DISK_LOG every counted call is noted there: its number, its name, its path. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>
#include <utime.h>

enum { DATA = 1, MAKE = 2, RENAME = 4, SYNC = 8, REMOVE = 16, MARK = 32, OPEN = 64 };

#define PATHS 8
#define LENGTH 1024

struct control {
    int32_t armed;
    int32_t error;
    int32_t forever;
    int32_t counted;
    int32_t later;
    int32_t half; /* the n-th write, where it is one of data, writes half of its bytes first */
    int64_t nth;
    int64_t count;
    int64_t failed;
    char call[32];
    char path[LENGTH];
    char under[PATHS][LENGTH];
    char beside[PATHS][LENGTH]; /* folders below those that are not meant */
};

static struct control *control;
static int journal = -1;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("DISK_FAULT");
    if (!path) return;
    int fd = syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC);
    if (fd < 0) return;
    void *mapped = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    syscall(SYS_close, fd);
    if (mapped != MAP_FAILED) control = mapped;
    const char *log = getenv("DISK_LOG");
    if (!log) return;
    int low = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND, 0644);
    journal = fcntl(low, F_DUPFD_CLOEXEC, 900); /* out of the way of what a program closes and opens */
    syscall(SYS_close, low);
}

static int below(const char *path, char folders[PATHS][LENGTH]) {
    for (int i = 0; i < PATHS && folders[i][0]; i++) {
        size_t length = strlen(folders[i]);
        if (!strncmp(path, folders[i], length) && (!path[length] || path[length] == '/' || path[length] == ' ')) return 1;
    }
    return 0;
}

/* Whether this call is to fail; errno is set then. */
static int fails_at(int kind, const char *call, const char *path, int *chosen) {
    if (chosen) *chosen = 0;
    if (!control || !control->armed || !below(path, control->under) || below(path, control->beside)) return 0;
    int64_t number = 0;
    if (control->counted & kind) {
        number = __atomic_add_fetch(&control->count, 1, __ATOMIC_SEQ_CST);
        if (journal >= 0) {
            char line[2 * LENGTH];
            int length = snprintf(line, sizeof line, "%ld %s %s\n", (long)number, call, path);
            syscall(SYS_write, journal, line, length);
        }
    }
    int now = number && number == control->nth;
    int after = control->forever && control->nth && control->count > control->nth && (control->later & kind);
    if (!now && !after) return 0;
    if (now) {
        strncpy(control->call, call, sizeof control->call - 1);
        strncpy(control->path, path, LENGTH - 1);
        if (chosen) *chosen = 1;
    }
    __atomic_add_fetch(&control->failed, 1, __ATOMIC_SEQ_CST);
    errno = control->error;
    return 1;
}

static int whole(int folder, const char *path, char *out) {
    char base[LENGTH / 2];
    if (!path) return 0;
    if (path[0] == '/') {
        snprintf(out, LENGTH, "%s", path);
        return 1;
    }
    if (folder == AT_FDCWD) {
        if (syscall(SYS_getcwd, base, sizeof base) < 0) return 0;
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, base, sizeof base - 1);
        if (length < 0) return 0;
        base[length] = 0;
    }
    snprintf(out, LENGTH, "%s/%s", base, path);
    return 1;
}

static int fails_fd(int kind, const char *call, int fd, int *chosen) {
    char link[64], path[LENGTH];
    if (!control || !control->armed) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return fails_at(kind, call, path, chosen);
}

static int fails_path(int kind, const char *call, int folder, const char *path) {
    char out[LENGTH];
    if (!control || !control->armed || !whole(folder, path, out)) return 0;
    return fails_at(kind, call, out, NULL);
}

/* Of what is there already a system says so first. */
static int is_there(int folder, const char *path) { return syscall(SYS_faccessat, folder, path, F_OK) == 0; }

static int fails_open(const char *call, int folder, const char *path, int flags) {
    if (!control || !control->armed) return 0;
    int writes = (flags & O_ACCMODE) != O_RDONLY;
    int temporary = (flags & O_TMPFILE) == O_TMPFILE;
    if (!writes && !(flags & (O_CREAT | O_TRUNC))) return 0;
    int makes = temporary || ((flags & O_CREAT) && !is_there(folder, path));
    return fails_path(makes ? MAKE : OPEN, call, folder, path);
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define MODE \
    mode_t mode = 0; \
    if ((flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE) { \
        va_list more; \
        va_start(more, flags); \
        mode = va_arg(more, mode_t); \
        va_end(more); \
    }

int open(const char *path, int flags, ...) {
    REAL(open);
    MODE
    return fails_open("open", AT_FDCWD, path, flags) ? -1 : real(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    REAL(open64);
    MODE
    return fails_open("open64", AT_FDCWD, path, flags) ? -1 : real(path, flags, mode);
}
int openat(int folder, const char *path, int flags, ...) {
    REAL(openat);
    MODE
    return fails_open("openat", folder, path, flags) ? -1 : real(folder, path, flags, mode);
}
int openat64(int folder, const char *path, int flags, ...) {
    REAL(openat64);
    MODE
    return fails_open("openat64", folder, path, flags) ? -1 : real(folder, path, flags, mode);
}
int creat(const char *path, mode_t mode) {
    REAL(creat);
    return fails_open("creat", AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC) ? -1 : real(path, mode);
}
int creat64(const char *path, mode_t mode) {
    REAL(creat64);
    return fails_open("creat64", AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC) ? -1 : real(path, mode);
}

static int flags_of(const char *mode) {
    int plus = strchr(mode, '+') != NULL;
    if (mode[0] == 'r') return plus ? O_RDWR : O_RDONLY;
    return (plus ? O_RDWR : O_WRONLY) | O_CREAT | (mode[0] == 'w' ? O_TRUNC : O_APPEND);
}
FILE *fopen(const char *path, const char *mode) {
    REAL(fopen);
    return fails_open("fopen", AT_FDCWD, path, flags_of(mode)) ? NULL : real(path, mode);
}
FILE *fopen64(const char *path, const char *mode) {
    REAL(fopen64);
    return fails_open("fopen64", AT_FDCWD, path, flags_of(mode)) ? NULL : real(path, mode);
}

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    int chosen;
    if (!fails_fd(DATA, "write", fd, &chosen)) return real(fd, data, size);
    int kept = errno;
    if (chosen && control->half && size > 1) syscall(SYS_write, fd, data, size / 2); /* a line that is cut off */
    errno = kept;
    return -1;
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    REAL(pwrite);
    return fails_fd(DATA, "pwrite", fd, NULL) ? -1 : real(fd, data, size, at);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    REAL(pwrite64);
    return fails_fd(DATA, "pwrite64", fd, NULL) ? -1 : real(fd, data, size, at);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    return fails_fd(DATA, "writev", fd, NULL) ? -1 : real(fd, parts, count);
}
ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t at) {
    REAL(pwritev);
    return fails_fd(DATA, "pwritev", fd, NULL) ? -1 : real(fd, parts, count, at);
}
ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t at) {
    REAL(pwritev64);
    return fails_fd(DATA, "pwritev64", fd, NULL) ? -1 : real(fd, parts, count, at);
}
size_t fwrite(const void *data, size_t size, size_t count, FILE *file) {
    REAL(fwrite);
    return fails_fd(DATA, "fwrite", fileno(file), NULL) ? 0 : real(data, size, count, file);
}
ssize_t sendfile(int out, int in, off_t *at, size_t size) {
    REAL(sendfile);
    return fails_fd(DATA, "sendfile", out, NULL) ? -1 : real(out, in, at, size);
}
ssize_t sendfile64(int out, int in, off64_t *at, size_t size) {
    REAL(sendfile64);
    return fails_fd(DATA, "sendfile64", out, NULL) ? -1 : real(out, in, at, size);
}
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    REAL(copy_file_range);
    return fails_fd(DATA, "copy_file_range", out, NULL) ? -1 : real(in, from, out, to, size, flags);
}
int ftruncate(int fd, off_t size) {
    REAL(ftruncate);
    return fails_fd(DATA, "ftruncate", fd, NULL) ? -1 : real(fd, size);
}
int ftruncate64(int fd, off64_t size) {
    REAL(ftruncate64);
    return fails_fd(DATA, "ftruncate64", fd, NULL) ? -1 : real(fd, size);
}
int truncate(const char *path, off_t size) {
    REAL(truncate);
    return fails_path(DATA, "truncate", AT_FDCWD, path) ? -1 : real(path, size);
}
int truncate64(const char *path, off64_t size) {
    REAL(truncate64);
    return fails_path(DATA, "truncate64", AT_FDCWD, path) ? -1 : real(path, size);
}
int fallocate(int fd, int mode, off_t at, off_t size) {
    REAL(fallocate);
    return fails_fd(DATA, "fallocate", fd, NULL) ? -1 : real(fd, mode, at, size);
}
int fallocate64(int fd, int mode, off64_t at, off64_t size) {
    REAL(fallocate64);
    return fails_fd(DATA, "fallocate64", fd, NULL) ? -1 : real(fd, mode, at, size);
}
int posix_fallocate(int fd, off_t at, off_t size) {
    REAL(posix_fallocate);
    return fails_fd(DATA, "posix_fallocate", fd, NULL) ? errno : real(fd, at, size);
}
int posix_fallocate64(int fd, off64_t at, off64_t size) {
    REAL(posix_fallocate64);
    return fails_fd(DATA, "posix_fallocate64", fd, NULL) ? errno : real(fd, at, size);
}
void *mmap(void *where, size_t size, int protection, int flags, int fd, off_t at) {
    REAL(mmap);
    int writes = fd >= 0 && (flags & MAP_SHARED) && (protection & PROT_WRITE);
    return writes && fails_fd(DATA, "mmap", fd, NULL) ? MAP_FAILED : real(where, size, protection, flags, fd, at);
}
void *mmap64(void *where, size_t size, int protection, int flags, int fd, off64_t at) {
    REAL(mmap64);
    int writes = fd >= 0 && (flags & MAP_SHARED) && (protection & PROT_WRITE);
    return writes && fails_fd(DATA, "mmap64", fd, NULL) ? MAP_FAILED : real(where, size, protection, flags, fd, at);
}

int fsync(int fd) {
    REAL(fsync);
    return fails_fd(SYNC, "fsync", fd, NULL) ? -1 : real(fd);
}
int fdatasync(int fd) {
    REAL(fdatasync);
    return fails_fd(SYNC, "fdatasync", fd, NULL) ? -1 : real(fd);
}
int msync(void *where, size_t size, int flags) {
    REAL(msync);
    return real(where, size, flags);
}

int rename(const char *from, const char *to) {
    REAL(rename);
    return fails_path(RENAME, "rename", AT_FDCWD, to) ? -1 : real(from, to);
}
int renameat(int in, const char *from, int folder, const char *to) {
    REAL(renameat);
    return fails_path(RENAME, "renameat", folder, to) ? -1 : real(in, from, folder, to);
}
int renameat2(int in, const char *from, int folder, const char *to, unsigned flags) {
    REAL(renameat2);
    return fails_path(RENAME, "renameat2", folder, to) ? -1 : real(in, from, folder, to, flags);
}
int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    return !is_there(AT_FDCWD, path) && fails_path(MAKE, "mkdir", AT_FDCWD, path) ? -1 : real(path, mode);
}
int mkdirat(int folder, const char *path, mode_t mode) {
    REAL(mkdirat);
    return !is_there(folder, path) && fails_path(MAKE, "mkdirat", folder, path) ? -1 : real(folder, path, mode);
}
int link(const char *from, const char *to) {
    REAL(link);
    return fails_path(MAKE, "link", AT_FDCWD, to) ? -1 : real(from, to);
}
int linkat(int in, const char *from, int folder, const char *to, int flags) {
    REAL(linkat);
    return fails_path(MAKE, "linkat", folder, to) ? -1 : real(in, from, folder, to, flags);
}
int symlink(const char *from, const char *to) {
    REAL(symlink);
    return fails_path(MAKE, "symlink", AT_FDCWD, to) ? -1 : real(from, to);
}
int symlinkat(const char *from, int folder, const char *to) {
    REAL(symlinkat);
    return fails_path(MAKE, "symlinkat", folder, to) ? -1 : real(from, folder, to);
}

int unlink(const char *path) {
    REAL(unlink);
    return is_there(AT_FDCWD, path) && fails_path(REMOVE, "unlink", AT_FDCWD, path) ? -1 : real(path);
}
int unlinkat(int folder, const char *path, int flags) {
    REAL(unlinkat);
    return is_there(folder, path) && fails_path(REMOVE, "unlinkat", folder, path) ? -1 : real(folder, path, flags);
}
int rmdir(const char *path) {
    REAL(rmdir);
    return fails_path(REMOVE, "rmdir", AT_FDCWD, path) ? -1 : real(path);
}
int remove(const char *path) {
    REAL(remove);
    return fails_path(REMOVE, "remove", AT_FDCWD, path) ? -1 : real(path);
}

int chmod(const char *path, mode_t mode) {
    REAL(chmod);
    return fails_path(MARK, "chmod", AT_FDCWD, path) ? -1 : real(path, mode);
}
int fchmod(int fd, mode_t mode) {
    REAL(fchmod);
    return fails_fd(MARK, "fchmod", fd, NULL) ? -1 : real(fd, mode);
}
int fchmodat(int folder, const char *path, mode_t mode, int flags) {
    REAL(fchmodat);
    return fails_path(MARK, "fchmodat", folder, path) ? -1 : real(folder, path, mode, flags);
}
int utimensat(int folder, const char *path, const struct timespec times[2], int flags) {
    REAL(utimensat);
    return fails_path(MARK, "utimensat", folder, path) ? -1 : real(folder, path, times, flags);
}
int futimens(int fd, const struct timespec times[2]) {
    REAL(futimens);
    return fails_fd(MARK, "futimens", fd, NULL) ? -1 : real(fd, times);
}
