/* Stops or fails a process at its N-th operation that changes files below a folder.
 *
 * A seccomp filter sends these system calls, whoever makes them (Python, torch, NumPy's stdio, Rust's own raw calls),
 * to the SIGSYS handler here, which counts them, does what was asked at the N-th, and else makes the call itself. The
 * filter lets calls from `raw_call` pass. It stays on after operations_stop (the kernel has no way back) and is
 * inherited by children: only for processes that are thrown away. A program that such a process starts has no handler
 * and dies at its first such call.
 *
 * Stores into memory maps are no calls and are not seen. Linux on x86-64.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/openat2.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>

#ifndef __x86_64__
#error "written for x86-64"
#endif

#define PATH_BYTES 4096
#define CHANGES (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)

enum action { COUNT, KILL_BEFORE, KILL_HALF, KILL_AFTER, FAIL_ONCE, FAIL_FROM, SHORT_THEN_FAIL };

/* Where a call's paths are: the argument that is a folder's descriptor (-1: the working folder) and the one that is a
 * path (-1: the descriptor is the file's own). `size`: the argument that is a number of bytes to write, -1 for none.
 * `room`: it fails on a full disk. */
struct operation {
    long number;
    const char *name;
    struct { int folder, path; } first, second;
    int size, room;
};

#define NONE {-2, -2}
#define IS(name, first, second, size, room) {SYS_##name, #name, first, second, size, room}
#define AT(folder, path) {folder, path}
#define FILE_AT(argument) {argument, -1}

static const struct operation operations[] = {
    IS(open, AT(-1, 0), NONE, -1, 1),
    IS(creat, AT(-1, 0), NONE, -1, 1),
    IS(openat, AT(0, 1), NONE, -1, 1),
    IS(openat2, AT(0, 1), NONE, -1, 1),
    IS(write, FILE_AT(0), NONE, 2, 1),
    IS(pwrite64, FILE_AT(0), NONE, 2, 1),
    IS(writev, FILE_AT(0), NONE, 2, 1),
    IS(pwritev, FILE_AT(0), NONE, 2, 1),
    IS(pwritev2, FILE_AT(0), NONE, 2, 1),
    IS(sendfile, FILE_AT(0), NONE, 3, 1),
    IS(copy_file_range, FILE_AT(2), NONE, 4, 1),
    IS(splice, FILE_AT(2), NONE, 4, 1),
    IS(fsync, FILE_AT(0), NONE, -1, 1),
    IS(fdatasync, FILE_AT(0), NONE, -1, 1),
    IS(sync_file_range, FILE_AT(0), NONE, -1, 1),
    IS(truncate, AT(-1, 0), NONE, -1, 0),
    IS(ftruncate, FILE_AT(0), NONE, -1, 0),
    IS(fallocate, FILE_AT(0), NONE, -1, 1),
    IS(rename, AT(-1, 0), AT(-1, 1), -1, 0),
    IS(renameat, AT(0, 1), AT(2, 3), -1, 0),
    IS(renameat2, AT(0, 1), AT(2, 3), -1, 0),
    IS(link, AT(-1, 0), AT(-1, 1), -1, 1),
    IS(linkat, AT(0, 1), AT(2, 3), -1, 1),
    IS(symlink, AT(-1, 1), NONE, -1, 1),
    IS(symlinkat, AT(1, 2), NONE, -1, 1),
    IS(mkdir, AT(-1, 0), NONE, -1, 1),
    IS(mkdirat, AT(0, 1), NONE, -1, 1),
    IS(mknod, AT(-1, 0), NONE, -1, 1),
    IS(mknodat, AT(0, 1), NONE, -1, 1),
    IS(unlink, AT(-1, 0), NONE, -1, 0),
    IS(unlinkat, AT(0, 1), NONE, -1, 0),
    IS(rmdir, AT(-1, 0), NONE, -1, 0),
    IS(chmod, AT(-1, 0), NONE, -1, 0),
    IS(fchmod, FILE_AT(0), NONE, -1, 0),
    IS(fchmodat, AT(0, 1), NONE, -1, 0),
#ifdef SYS_fchmodat2
    IS(fchmodat2, AT(0, 1), NONE, -1, 0),
#endif
    IS(utimensat, AT(0, 1), NONE, -1, 0),
};
#define OPERATIONS (sizeof operations / sizeof *operations)

static char folder[PATH_BYTES], excluded[PATH_BYTES];
static long number, counted;
static int action, failure, log_descriptor = -1, active, installed;

/* raw_call(number, six arguments): the kernel's answer, -errno on failure. The filter knows it by its address. */
long raw_call(long, long, long, long, long, long, long);
extern const char raw_call_returns[];
__asm__(".text\n"
        ".type raw_call,@function\n"
        "raw_call:\n"
        "mov %rdi,%rax\nmov %rsi,%rdi\nmov %rdx,%rsi\nmov %rcx,%rdx\nmov %r8,%r10\nmov %r9,%r8\nmov 8(%rsp),%r9\n"
        "syscall\n"
        "raw_call_returns:\n"
        "ret\n"
        ".size raw_call,.-raw_call\n");

static long call(const struct operation *operation, const long *arguments) {
    return raw_call(operation->number, arguments[0], arguments[1], arguments[2], arguments[3], arguments[4],
                    arguments[5]);
}

static int inside(const char *path, const char *parent) {
    size_t length = strlen(parent);
    return length > 0 && !strncmp(path, parent, length) && (path[length] == '/' || path[length] == '\0');
}

/* The path of a descriptor, or the working folder's for AT_FDCWD. */
static int path_of_descriptor(int descriptor, char *path) {
    char link[32] = "/proc/self/fd/", digits[12];
    int length = 0, at = 14;
    if (descriptor == AT_FDCWD) {
        long got = raw_call(SYS_getcwd, (long)path, PATH_BYTES, 0, 0, 0, 0);
        return got > 0;
    }
    if (descriptor < 0)
        return 0;
    do
        digits[length++] = '0' + descriptor % 10;
    while (descriptor /= 10);
    while (length)
        link[at++] = digits[--length];
    long got = raw_call(SYS_readlink, (long)link, (long)path, PATH_BYTES - 1, 0, 0, 0);
    path[got > 0 ? got : 0] = '\0';
    return got > 0;
}

static int path_of_argument(const long *arguments, int folder_at, int path_at, char *path) {
    int descriptor = folder_at == -1 ? AT_FDCWD : (int)arguments[folder_at];
    const char *given = path_at == -1 ? "" : (const char *)arguments[path_at];
    if (folder_at == -2)
        return 0;
    if (given == NULL) /* utimensat's way to name the descriptor itself */
        given = "";
    if (given[0] == '/') {
        size_t length = strnlen(given, PATH_BYTES - 1);
        memcpy(path, given, length);
        path[length] = '\0';
        return 1;
    }
    if (!path_of_descriptor(descriptor, path))
        return 0;
    size_t start = strlen(path), length = strnlen(given, PATH_BYTES);
    if (length == 0)
        return 1;
    if (start + 1 + length >= PATH_BYTES)
        return 0;
    path[start] = '/';
    memcpy(path + start + 1, given, length);
    path[start + 1 + length] = '\0';
    return 1;
}

/* Whether the call is one to count; `path` is then the one that is below the folder. */
static int concerns(const struct operation *operation, const long *arguments, char *path) {
    if (path_of_argument(arguments, operation->first.folder, operation->first.path, path) && inside(path, folder))
        return !inside(path, excluded);
    return path_of_argument(arguments, operation->second.folder, operation->second.path, path) &&
           inside(path, folder) && !inside(path, excluded);
}

/* Flags of an opening call; 0 for others. */
static long flags_of(const struct operation *operation, const long *arguments) {
    switch (operation->number) {
    case SYS_open:
        return arguments[1];
    case SYS_openat:
        return arguments[2];
    case SYS_openat2:
        return (long)((const struct open_how *)arguments[2])->flags;
    case SYS_creat:
        return O_CREAT | O_WRONLY | O_TRUNC;
    }
    return 0;
}

static int fails(const struct operation *operation, const long *arguments) {
    if (failure != ENOSPC && failure != EDQUOT)
        return 1;
    long flags = flags_of(operation, arguments);
    return operation->room && (flags == 0 || (flags & (O_CREAT | __O_TMPFILE)) != 0);
}

/* The first half of the bytes of a writing call. */
static long half(const struct operation *operation, const long *arguments) {
    long copy[6];
    memcpy(copy, arguments, sizeof copy);
    if (operation->number != SYS_writev && operation->number != SYS_pwritev && operation->number != SYS_pwritev2) {
        copy[operation->size] /= 2;
        return call(operation, copy);
    }
    const struct iovec *parts = (const struct iovec *)arguments[1];
    size_t total = 0, done = 0;
    for (long index = 0; index < arguments[2]; index++)
        total += parts[index].iov_len;
    for (long index = 0; index < arguments[2] && done < total / 2; index++) {
        size_t length = parts[index].iov_len < total / 2 - done ? parts[index].iov_len : total / 2 - done;
        int placed = operation->number != SYS_writev && arguments[3] >= 0;
        long got = raw_call(placed ? SYS_pwrite64 : SYS_write, arguments[0], (long)parts[index].iov_base, (long)length,
                            placed ? arguments[3] + (long)done : 0, 0, 0);
        if (got < 0)
            return done ? (long)done : got;
        done += (size_t)got;
    }
    return (long)done;
}

static void die(void) {
    for (;;)
        raw_call(SYS_kill, raw_call(SYS_getpid, 0, 0, 0, 0, 0, 0), SIGKILL, 0, 0, 0, 0);
}

static void write_log(const char *name, const char *path) {
    char line[PATH_BYTES + 64];
    size_t first = strlen(name), second = strlen(path);
    if (log_descriptor < 0)
        return;
    memcpy(line, name, first);
    line[first] = ' ';
    memcpy(line + first + 1, path, second);
    line[first + 1 + second] = '\n';
    raw_call(SYS_write, log_descriptor, (long)line, (long)(first + second + 2), 0, 0, 0);
}

static long answer(const struct operation *operation, const long *arguments) {
    char path[PATH_BYTES];
    long flags = flags_of(operation, arguments);
    int opens = operation->number == SYS_openat2; /* the filter has sorted out the others that only read */
    if (!active || (opens && !(flags & CHANGES)) || !concerns(operation, arguments, path))
        return call(operation, arguments);
    long now = __atomic_add_fetch(&counted, 1, __ATOMIC_SEQ_CST);
    write_log(operation->name, path);
    if (number < 1 || now < number || (now > number && action < FAIL_FROM))
        return call(operation, arguments);
    switch (action) {
    case KILL_HALF:
        if (operation->size >= 0)
            half(operation, arguments);
        die();
        break;
    case KILL_BEFORE:
        die();
        break;
    case KILL_AFTER:
        call(operation, arguments);
        die();
        break;
    case SHORT_THEN_FAIL:
        if (now == number && operation->size >= 0 && arguments[operation->size] > 1)
            return half(operation, arguments);
        /* fall through */
    case FAIL_ONCE:
    case FAIL_FROM:
        if (fails(operation, arguments))
            return -failure;
    }
    return call(operation, arguments);
}

static void handle(int signal, siginfo_t *information, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    long arguments[6] = {registers[REG_RDI], registers[REG_RSI], registers[REG_RDX],
                         registers[REG_R10], registers[REG_R8],  registers[REG_R9]};
    (void)signal;
    for (size_t index = 0; index < OPERATIONS; index++)
        if (operations[index].number == information->si_syscall)
            registers[REG_RAX] = answer(&operations[index], arguments);
}

static int install(void) {
    struct sock_filter filter[8 + 4 * OPERATIONS + 1];
    unsigned short length = 0;
#define ADD(...) filter[length++] = (struct sock_filter)__VA_ARGS__
    unsigned long address = (unsigned long)raw_call_returns;
    ADD(BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)));
    ADD(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 1, 0));
    ADD(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW));
    ADD(BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, instruction_pointer)));
    ADD(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)address, 0, 3));
    ADD(BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, instruction_pointer) + 4));
    ADD(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)(address >> 32), 0, 1));
    ADD(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW));
    for (size_t index = 0; index < OPERATIONS; index++) {
        long each = operations[index].number;
        int flags = each == SYS_open ? 1 : each == SYS_openat ? 2 : -1;
        ADD(BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)));
        ADD(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)each, 0, flags < 0 ? 1 : 3));
        if (flags >= 0) {
            ADD(BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args) + 8 * flags));
            ADD(BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, CHANGES, 0, 1));
        }
        ADD(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP));
    }
    ADD(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW));
    struct sock_fprog program = {length, filter};
    struct sigaction handler = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_NODEFER};
    if (sigaction(SIGSYS, &handler, NULL) || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        return errno;
    long got = raw_call(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, (long)&program, 0, 0, 0);
    return got < 0 ? (int)-got : got > 0 ? ESRCH : 0;
}

/* From here on count operations below `below` but not below `except` ("" for none), and do `what` at the `at`-th. A
 * line for each is written to the descriptor `log` (-1: none). Answers 0, or the errno of a system that has no filters. */
int operations_start(const char *below, const char *except, long at, int what, int error, int log) {
    if (strlen(below) >= PATH_BYTES || strlen(except) >= PATH_BYTES)
        return ENAMETOOLONG;
    active = 0;
    strcpy(folder, below);
    strcpy(excluded, except);
    number = at, action = what, failure = error, log_descriptor = log, counted = 0;
    int problem = installed ? 0 : install();
    installed = installed || !problem;
    active = !problem;
    return problem;
}

/* No more counting; answers how many there were. */
long operations_stop(void) {
    active = 0;
    return counted;
}
