/* LD_PRELOAD library: counts the calls that change files below a folder, and at the N-th kills the process or fails it.
 *
 * It sees what goes through libc's exported functions: Python, torch, Arrow, Rust's standard library. It does not see
 * the writes of stdio (only its fopen) or stores into memory maps.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long number, calls;
static int active, error, lasting, log_file = -1;

/* Count from here on. failure: 0 kills before call `at`, else the errno it fails with; until_the_end: so do all later
 * calls. at 0: only count. log: a descriptor that gets a line `call path` for each, or -1. */
void interpose_start(const char *below, long at, int failure, int until_the_end, int log) {
    strncpy(folder, below, sizeof folder - 1);
    number = at, error = failure, lasting = until_the_end, log_file = log, calls = 0, active = 1;
}

/* The absolute path, of which `path` may be empty (a descriptor alone) or relative to `directory`. */
static const char *absolute(int directory, const char *path, char *whole) {
    char link[32];
    whole[0] = '\0';
    if (path[0] != '/') {
        snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
        ssize_t length = directory == AT_FDCWD ? (getcwd(whole, PATH_MAX) ? (ssize_t)strlen(whole) : 0)
                                               : readlink(link, whole, PATH_MAX);
        whole[length > 0 ? length : 0] = '\0';
        if (path[0])
            strcat(whole, "/");
    }
    return strncat(whole, path, PATH_MAX);
}

/* Whether the call must fail, with errno set. room: a full disk refuses it. Calls on curves, which a thread of their
 * own may write, are not counted, so that the N-th is always the same; on a disk that stays full they fail as well. */
static int refused(const char *call, int directory, const char *path, int room) {
    char whole[2 * PATH_MAX + 2];
    int saved = errno, fails = 0;
    size_t length = strlen(folder);
    if (!active)
        return 0;
    absolute(directory, path, whole);
    if (!strncmp(whole, folder, length) && (!whole[length] || whole[length] == '/')) {
        int counts = !strstr(whole + length, "/tensorboard");
        long now = __atomic_add_fetch(&calls, counts, __ATOMIC_SEQ_CST);
        if (log_file >= 0 && counts)
            dprintf(log_file, "%s %s\n", call, whole[length] ? whole + length + 1 : ".");
        if (now == number && counts && !error)
            for (;;)
                kill(getpid(), SIGKILL);
        fails = error && number && (lasting ? now >= number : counts && now == number) && (room || error != ENOSPC);
    }
    errno = fails ? error : saved;
    return fails;
}

#define CALL(type, name, parameters, arguments, failed, ...)                                                          \
    type name parameters {                                                                                            \
        static type(*real) parameters;                                                                                \
        if (!real)                                                                                                    \
            real = (type(*) parameters)dlsym(RTLD_NEXT, #name);                                                       \
        return refused(#name, __VA_ARGS__) ? failed : real arguments;                                                 \
    }

#define WRITE(type, name, parameters, arguments) CALL(type, name, parameters, arguments, -1, file, "", 1)
WRITE(ssize_t, write, (int file, const void *data, size_t size), (file, data, size))
WRITE(ssize_t, pwrite, (int file, const void *data, size_t size, off_t at), (file, data, size, at))
WRITE(ssize_t, pwrite64, (int file, const void *data, size_t size, off64_t at), (file, data, size, at))
WRITE(ssize_t, writev, (int file, const struct iovec *parts, int count), (file, parts, count))
WRITE(ssize_t, sendfile, (int file, int from, off_t *at, size_t size), (file, from, at, size))
WRITE(ssize_t, sendfile64, (int file, int from, off64_t *at, size_t size), (file, from, at, size))
WRITE(int, fsync, (int file), (file))
WRITE(int, fdatasync, (int file), (file))
WRITE(int, fallocate, (int file, int mode, off_t at, off_t size), (file, mode, at, size))
CALL(int, posix_fallocate, (int file, off_t at, off_t size), (file, at, size), errno, file, "", 1)
CALL(int, posix_fallocate64, (int file, off64_t at, off64_t size), (file, at, size), errno, file, "", 1)
CALL(int, ftruncate, (int file, off_t size), (file, size), -1, file, "", 0)
CALL(int, ftruncate64, (int file, off64_t size), (file, size), -1, file, "", 0)
CALL(ssize_t, copy_file_range, (int from, off64_t *start, int file, off64_t *at, size_t size, unsigned flags),
     (from, start, file, at, size, flags), -1, file, "", 1)

#define PATH(name, parameters, arguments, directory, path, room)                                                      \
    CALL(int, name, parameters, arguments, -1, directory, path, room)
PATH(mkdir, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path, 1)
PATH(mkdirat, (int at, const char *path, mode_t mode), (at, path, mode), at, path, 1)
PATH(symlink, (const char *to, const char *path), (to, path), AT_FDCWD, path, 1)
PATH(symlinkat, (const char *to, int at, const char *path), (to, at, path), at, path, 1)
PATH(link, (const char *to, const char *path), (to, path), AT_FDCWD, path, 1)
PATH(linkat, (int from, const char *to, int at, const char *path, int flags), (from, to, at, path, flags), at, path, 1)
PATH(rename, (const char *from, const char *path), (from, path), AT_FDCWD, path, 0)
PATH(renameat, (int from, const char *old, int at, const char *path), (from, old, at, path), at, path, 0)
PATH(unlink, (const char *path), (path), AT_FDCWD, path, 0)
PATH(unlinkat, (int at, const char *path, int flags), (at, path, flags), at, path, 0)
PATH(rmdir, (const char *path), (path), AT_FDCWD, path, 0)
PATH(truncate, (const char *path, off_t size), (path, size), AT_FDCWD, path, 0)
PATH(truncate64, (const char *path, off64_t size), (path, size), AT_FDCWD, path, 0)

/* open and its kin have a third argument only if they may create the file; reading is no change. */
#define OPEN(name, parameters, directory, ...)                                                                        \
    int name parameters {                                                                                             \
        static int(*real)();                                                                                          \
        va_list more;                                                                                                 \
        va_start(more, flags);                                                                                        \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0;                                     \
        va_end(more);                                                                                                 \
        if (!real)                                                                                                    \
            real = (int(*)())dlsym(RTLD_NEXT, #name);                                                                 \
        int changes = flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC);                                                \
        return changes && refused(#name, directory, path, !!(flags & O_CREAT)) ? -1 : real(__VA_ARGS__, flags, mode); \
    }
OPEN(open, (const char *path, int flags, ...), AT_FDCWD, path)
OPEN(open64, (const char *path, int flags, ...), AT_FDCWD, path)
OPEN(openat, (int at, const char *path, int flags, ...), at, at, path)
OPEN(openat64, (int at, const char *path, int flags, ...), at, at, path)

#define FOPEN(name)                                                                                                   \
    FILE *name(const char *path, const char *mode) {                                                                  \
        static FILE *(*real)(const char *, const char *);                                                             \
        if (!real)                                                                                                    \
            real = (FILE * (*)(const char *, const char *)) dlsym(RTLD_NEXT, #name);                                  \
        return strcspn(mode, "wa+") < strlen(mode) && refused(#name, AT_FDCWD, path, 1) ? NULL : real(path, mode);    \
    }
FOPEN(fopen)
FOPEN(fopen64)
